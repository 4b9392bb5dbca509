"""The Triton kernels of received attention against the definition in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from flashprune.triton_kernels import received_attention as kernels

import flashprune as fp
from inputs import halves

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGE = 5e-3  # float32 holds a score of some 20,000 to 2 ** -10
RAGGED = [0, 0, 32, 36, 36, 168, 240, 240]  # empty, whole blocks, few tokens, more than a block, empty at both ends


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What no kernel wrote is NaN."""

    def poisoned(size, **kwargs):
        return torch.full((size,) if isinstance(size, int) else size, math.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)


def random_qk(device, tokens, heads=2, kv_heads=1, d=16, batch=(), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*batch, tokens, heads, d, generator=generator) * 2
    key = torch.randn(*batch, tokens, kv_heads, d, generator=generator) * 2
    return query.to(device, dtype), key.to(device, dtype)


def spans(bounds, device):
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def launch(query, key, *, cu_seqlens=None, max_seqlen=None, scale=None, lse=None, pool=1, prior=None, eps=1e-7):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return kernels.received_attention(query, key, cu_seqlens, max_seqlen, scale, lse, pool, prior, eps)


def define(query, key, *, lse=None, prior=None, **settings):
    lse, prior = (x if x is None else x.double() for x in (lse, prior))
    return fp.reference.received_attention(query.double(), key.double(), lse=lse, prior=prior, **settings)


def normaliser(query, key, bounds=None):
    """float32 natural-log sums `[.., H, N]`, of each segment by itself."""
    key = key.double().repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    scores = torch.einsum("...rhd,...lhd->...hrl", query.double(), key) * query.shape[-1] ** -0.5
    if bounds is None:
        return scores.logsumexp(-1).float()
    return torch.cat([scores[:, a:b, a:b].logsumexp(-1) for a, b in pairwise(bounds)], -1).float()


def check(query, key, *, rtol=2e-5, **settings):
    got, expected = launch(query, key, **settings), define(query, key, **settings)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=2e-6 / max(1, expected.shape[-1]))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_lse", [False, True])
def test_is_the_definition(device, dtype, kv_heads, with_lse):
    query, key = random_qk(device, 70, heads=4, kv_heads=kv_heads, dtype=dtype)
    check(query, key, lse=normaliser(query, key) if with_lse else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 64, 72, 96, 128, 256])
def test_head_dimensions(device, dtype, d):
    check(*random_qk(device, 40, d=d, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65, 127, 128, 129])
def test_sizes(device, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        check(*random_qk(device, tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("pool", [1, 4])
def test_ragged_segments(device, dtype, with_lse, pool):
    query, key = random_qk(device, RAGGED[-1], dtype=dtype)
    lse = normaliser(query, key, RAGGED) if with_lse else None
    cu_seqlens = spans(RAGGED, device)
    prior = torch.rand(RAGGED[-1] // pool, device=device) / 50
    scores = check(query, key, cu_seqlens=cu_seqlens, lse=lse, pool=pool)
    assert abs(scores.sum().item() - 4) < 1e-4  # one for each segment that is not empty
    check(query, key, cu_seqlens=cu_seqlens, max_seqlen=132, lse=lse, pool=pool, prior=prior)


@pytest.mark.parametrize(
    "bounds", [[0, 1], [0, 1, 2, 3], [0, 0, 0, 5], [0, 5, 5, 5], [0, 31, 62, 93], [0, 63, 64, 129], [0, 127, 255, 256]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_segments_at_the_edges_of_blocks(device, bounds, dtype):
    query, key = random_qk(device, bounds[-1], dtype=dtype)
    check(query, key, cu_seqlens=spans(bounds, device))


def test_many_segments(device, monkeypatch):
    """More segments than one step of the search looks at."""
    monkeypatch.setattr(kernels, "SEARCH", 16)
    sizes = torch.randint(0, 4, (36,), generator=torch.Generator().manual_seed(0))
    bounds = [0, *sizes.cumsum(0).tolist()]
    query, key = random_qk(device, bounds[-1], heads=1)
    check(query, key, cu_seqlens=spans(bounds, device))


def test_a_segment_does_not_depend_on_its_neighbours(device):
    query, key = halves(*random_qk(device, RAGGED[-1], dtype=torch.bfloat16))
    packed = launch(query, key, cu_seqlens=spans(RAGGED, device))
    for start, end in pairwise(RAGGED):
        rows = slice(start, end)
        assert torch.equal(packed[rows], launch(query[rows], key[rows])), f"segment {start}:{end}"
    items = launch(torch.stack([query[168:], query[:72]]), torch.stack([key[168:], key[:72]]))
    assert torch.equal(items[0], packed[168:])


@pytest.mark.parametrize("with_lse", [False, True])
def test_batch(device, with_lse):
    query, key = random_qk(device, 66, batch=(3,))
    lse = normaliser(query, key) if with_lse else None
    prior = torch.rand(3, 33, device=device) / 50
    check(query, key, lse=lse, pool=2, prior=prior)
    check(query, key, lse=lse, pool=2, prior=prior[0])


@pytest.mark.parametrize("pool", [1, 3, 45])
def test_pool_and_prior(device, pool):
    query, key = random_qk(device, 90)
    prior = torch.rand(2 * 90 // pool, device=device)[::2].bfloat16()
    prior[0] = 0
    check(query, key, pool=pool, prior=prior, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "wider rows", "offset", "last stride"])
def test_any_strides(device, dtype, layout):
    query, key = random_qk(device, 70, d=40, batch=(2,), dtype=dtype)

    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "wider rows":
            return torch.cat([x, x + 1], -1)[..., :40]
        if layout == "offset":
            return torch.cat([x[:, :1] + 1, x], 1)[:, 1:, :, 1:]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    query, key = view(query), view(key)
    lse = normaliser(query, key)
    check(query, key)
    check(query, key, lse=lse.transpose(1, 2).contiguous().transpose(1, 2))


def test_spans_need_not_be_contiguous(device):
    query, key = halves(*random_qk(device, 70))
    got = launch(query, key, cu_seqlens=spans([0, 9, 30, 9, 70, 9], device)[::2])
    assert torch.equal(got, launch(query, key, cu_seqlens=spans([0, 30, 70], device)))


@pytest.mark.parametrize(
    "bounds", [[0, 500], [5, 40], [-7, 30, 99999], [0, 60, 20, 70], [70, 0], [-(2**31), 2**31 - 1]]
)
def test_spans_that_are_wrong_stay_in_bounds(device, monkeypatch, bounds):
    """The device cannot check their values; memory around what the kernels may write must stay as it was."""
    query, key = random_qk(device, 70)
    buffers = []

    def guarded(size, **kwargs):
        size = (size,) if isinstance(size, int) else size
        buffers.append(torch.full((math.prod(size) + 2048,), 7.0, **kwargs))
        return buffers[-1][1024:-1024].view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    launch(query, key, cu_seqlens=spans(bounds, device))
    assert len(buffers) == 3
    assert all((buffer[:1024] == 7).all() and (buffer[-1024:] == 7).all() for buffer in buffers)


def test_large_scores_do_not_overflow(device):
    query, key = halves(*random_qk(device, 100))
    check(query * 64, key * 64, rtol=LARGE)
    check(-query * 64, key * 64, rtol=LARGE)


def test_nan_stays_in_its_segment(device):
    query, key = random_qk(device, 140)
    key[100, 0, 3] = math.nan
    got = launch(query, key, cu_seqlens=spans([0, 70, 140], device))
    assert not got[:70].isnan().any()
    assert got[70:].isnan().all()


def test_a_given_normaliser_is_used(device):
    query, key = random_qk(device, 70)
    lse = normaliser(query, key)
    torch.testing.assert_close(launch(query, key, lse=lse + math.log(2)), launch(query, key, lse=lse) / 2)


def test_nothing_to_score(device):
    query, key = random_qk(device, 0)
    assert launch(query, key).shape == (0,)
    assert launch(query, key, cu_seqlens=spans([0, 0, 0], device), pool=4).shape == (0,)
    query, key = random_qk(device, 8, batch=(0,))
    assert launch(query, key, pool=4).shape == (0, 2)


def test_repeats_are_equal(device):
    query, key = halves(*random_qk(device, 140, dtype=torch.bfloat16))
    assert torch.equal(launch(query, key), launch(query, key))
