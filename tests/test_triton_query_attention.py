"""The Triton kernels of query attention against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashprune.triton_kernels import configs
from flashprune.triton_kernels import query_attention as kernels

import flashprune as fp
from inputs import halves

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = slice(5, 41)
LARGE = 5e-3  # float32 holds a score of some 20,000 to 2 ** -10


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What no kernel wrote is NaN."""

    def poisoned(size, **kwargs):
        return torch.full((size,) if isinstance(size, int) else size, math.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)


def random_qk(device, positions, keys, heads=4, kv_heads=2, d=16, batch=(), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*batch, positions, heads, d, generator=generator) * 2
    key = torch.randn(*batch, keys, kv_heads, d, generator=generator) * 2
    return query.to(device, dtype), key.to(device, dtype)


def launch(query, key, *, scale=None, lse=None, visual=None, prior=None, eps=1e-7):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    span = list(visual.indices(key.shape[-3])) if isinstance(visual, slice) else []
    index = visual if isinstance(visual, Tensor) else None
    return kernels.query_attention(query, key, scale, lse, index, span, prior, eps)


def define(query, key, *, lse=None, visual=None, prior=None, **settings):
    lse, prior = (x if x is None else x.double() for x in (lse, prior))
    return fp.reference.query_attention(query.double(), key.double(), lse=lse, visual=visual, prior=prior, **settings)


def normaliser(query, key):
    """float32 natural-log sums `[.., H, Lq]`."""
    key = key.double().repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    scores = torch.einsum("...rhd,...lhd->...hrl", query.double(), key) * query.shape[-1] ** -0.5
    return scores.logsumexp(-1).float()


def check(query, key, *, rtol=2e-5, **settings):
    got, expected = launch(query, key, **settings), define(query, key, **settings)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=2e-6 / max(1, expected.shape[-1]))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_is_the_definition(device, dtype, kv_heads):
    check(*random_qk(device, 2, 150, heads=8, kv_heads=kv_heads, dtype=dtype), visual=HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 24, 64, 72, 80, 112, 192, 256])
def test_head_dimensions(device, dtype, d):
    check(*random_qk(device, 1, 70, heads=2, kv_heads=1, d=d, dtype=dtype))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    "visual", [HALF, slice(2, None, 3), slice(7, 7), slice(9, 2), torch.tensor([3, 9, 4, 69, 9]), None]
)
def test_reads_visual_positions(device, with_lse, visual):
    query, key = random_qk(device, 3, 70)
    visual = visual.to(device) if isinstance(visual, Tensor) else visual
    check(query, key, visual=visual, lse=normaliser(query, key) if with_lse else None)


@pytest.mark.parametrize("heads", [1, 16, 17])
@pytest.mark.parametrize("positions", [1, 5])
def test_blocks_of_query_rows(device, heads, positions):
    check(*random_qk(device, positions, 40, heads=heads, kv_heads=1))


def test_many_query_rows_and_their_normaliser(device):
    query, key = random_qk(device, 45, 70, heads=6, kv_heads=2)
    check(query, key)
    check(query, key, lse=normaliser(query, key))


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129, 385])
def test_ranges_of_keys(device, keys):
    check(*random_qk(device, 1, keys, heads=2, kv_heads=1))


def test_a_range_a_program_grows_with_the_keys(device, monkeypatch):
    tile = configs.choose("query few", "fp32", "consumer", 64) | {"MAX_SPLITS": 2}
    monkeypatch.setattr(kernels, "config", lambda kind, *size: tile if "query" in kind else configs.config(kind, *size))
    check(*random_qk(device, 1, 321, heads=2, kv_heads=1))


@pytest.mark.parametrize("with_lse", [False, True])
def test_batch(device, with_lse):
    query, key = halves(*random_qk(device, 2, 140, batch=(3,)))
    lse = normaliser(query, key) if with_lse else None
    prior = torch.rand(3, 36, device=device) / 50
    got = check(query, key, lse=lse, visual=HALF)
    check(query, key, lse=lse, visual=HALF, prior=prior)
    check(query, key, lse=lse, visual=HALF, prior=prior[1])
    for b in range(3):
        alone = launch(query[b], key[b], lse=None if lse is None else lse[b], visual=HALF)
        assert torch.equal(got[b], alone), f"item {b} depends on its neighbours"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prior(device, dtype):
    query, key = random_qk(device, 1, 70)
    prior = torch.rand(72, device=device).to(dtype)
    prior[3] = 0
    check(query, key, visual=HALF, prior=prior[::2], eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "wider rows", "offset", "last stride"])
def test_any_strides(device, dtype, layout):
    query, key = random_qk(device, 3, 70, d=40, batch=(2,), dtype=dtype)
    lse = normaliser(query, key)

    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "wider rows":
            return torch.cat([x, x + 1], -1)[..., :40]
        if layout == "offset":
            return torch.cat([x[:, :1] + 1, x], 1)[:, 1:, :, 1:]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    check(view(query), view(key), visual=slice(1, None, 2))
    if layout != "offset":
        check(view(query), view(key), lse=lse.transpose(1, 2).contiguous().transpose(1, 2))


def test_large_scores_do_not_overflow(device):
    query, key = halves(*random_qk(device, 2, 150))
    check(query * 64, key * 64, rtol=LARGE)
    check(-query * 64, key * 64, visual=HALF, rtol=LARGE)


def test_a_range_of_keys_without_weight(device):
    query, key = random_qk(device, 1, 300, heads=2, kv_heads=1)
    query[..., 0], key[:, :, 0], key[130:, :, 0] = 1, 0, -math.inf
    got = launch(query, key)
    assert torch.equal(got[130:], torch.zeros_like(got[130:]))
    torch.testing.assert_close(got[:130].double(), define(query, key[:130]), rtol=2e-5, atol=1e-8)


def test_nan_in_a_row_reaches_every_score(device):
    query, key = random_qk(device, 1, 70)
    key[50, 0, 3] = math.nan
    assert launch(query, key, visual=HALF).isnan().all()


def test_a_given_normaliser_is_used(device):
    query, key = random_qk(device, 2, 70)
    lse = normaliser(query, key)
    torch.testing.assert_close(launch(query, key, lse=lse + math.log(2)), launch(query, key, lse=lse) / 2)


def test_positions_outside_the_keys_give_nan(device):
    query, key = halves(*random_qk(device, 1, 70))
    visual = torch.tensor([3, -1, 69, 70, 1 << 40], device=device)
    got = launch(query, key, visual=visual)
    assert got.isnan().tolist() == [False, True, False, True, True]
    assert torch.equal(got[[0, 2]], launch(query, key, visual=visual[[0, 2]]))


def test_nothing_to_score(device):
    query, key = random_qk(device, 1, 70, batch=(0,))
    assert launch(query, key).shape == (0, 70)
    query, key = random_qk(device, 1, 0)
    assert launch(query, key).shape == (0,)


def test_repeats_are_equal(device):
    query, key = halves(*random_qk(device, 3, 200, dtype=torch.bfloat16))
    assert torch.equal(launch(query, key, visual=HALF), launch(query, key, visual=HALF))


def test_head_parts_cover_the_head():
    for d in range(1, 257):
        first, second = kernels.head_parts(d)
        assert d <= first + second <= max(16, 2 * d)
        assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (first, second))
    assert [sum(kernels.head_parts(d)) for d in (64, 72, 80, 96, 112, 192)] == [64, 80, 80, 96, 128, 192]


def test_too_large_a_head_is_refused(device):
    with pytest.raises(ValueError, match=r"d=257 exceeds 256"):
        launch(*random_qk(device, 1, 10, d=257))
