"""Attention importance against a dense float64 definition, and the elementwise functions against their formulas."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashprune as fp
from flashprune import attention

BACKENDS = ("reference", "cpu")


def random_qk(rows, keys, heads=4, kv_heads=4, d=16, batch=(), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*batch, rows, heads, d, generator=generator) * 2
    key = torch.randn(*batch, keys, kv_heads, d, generator=generator) * 2
    return query.to(dtype), key.to(dtype)


def dense_scores(query, key, scale=None):
    """float64 scores [H, R, L] of one item, written as loops over heads."""
    query, key = query.double(), key.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    return torch.stack([scale * query[:, h] @ key[:, h // group].T for h in range(query.shape[1])])


def dense(query, key, scale=None):
    return dense_scores(query, key, scale).softmax(-1).mean((0, 1))


def close(actual, expected, dtype=torch.float32):
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=10 * tolerance, atol=tolerance / max(1, len(expected)))


# --- query attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_query_attention(backend, dtype, kv_heads):
    query, key = random_qk(3, 70, heads=8, kv_heads=kv_heads, dtype=dtype)
    close(fp.query_attention(query, key, backend=backend), dense(query, key), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("visual", [slice(5, 41), slice(2, None, 3), slice(7, 7), torch.tensor([3, 9, 4, 69]), None])
def test_query_attention_reads_visual_positions(backend, with_lse, visual):
    query, key = random_qk(2, 70, heads=4, kv_heads=2)
    lse = dense_scores(query, key).logsumexp(-1).float() if with_lse else None
    actual = fp.query_attention(query, key, lse=lse, visual=visual, backend=backend)
    close(actual, dense(query, key)[slice(None) if visual is None else visual])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_query_attention_of_a_batch(backend, with_lse):
    query, key = random_qk(2, 30, heads=4, kv_heads=2, batch=(3,))
    lse = (
        torch.stack([dense_scores(q, k, 0.3).logsumexp(-1) for q, k in zip(query, key, strict=True)])
        if with_lse
        else None
    )
    prior = torch.rand(10) + 0.1
    actual = fp.query_attention(query, key, scale=0.3, lse=lse, visual=slice(20), prior=None, backend=backend)
    expected = torch.stack([dense(q, k, 0.3)[:20] for q, k in zip(query, key, strict=True)])
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)
    debiased = fp.query_attention(query, key, scale=0.3, visual=slice(0, 20, 2), prior=prior, backend=backend)
    torch.testing.assert_close(debiased.double(), expected[:, ::2] / (prior + 1e-7), rtol=2e-5, atol=1e-6)
    assert fp.query_attention(query[:0], key[:0], visual=slice(20), backend=backend).shape == (0, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_takes_any_strides(backend):
    query, key = random_qk(12, 12, heads=4, kv_heads=2)
    swapped = query.transpose(0, 1).contiguous().transpose(0, 1)  # [H, N, d] in memory
    wide = torch.cat([key, key], dim=-1)[..., :16]
    assert not swapped.is_contiguous() and not wide.is_contiguous()
    for function in (fp.query_attention, fp.received_attention):
        torch.testing.assert_close(function(swapped, wide, backend=backend), function(query, key, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    query, key = random_qk(2, 40)
    actual = fp.query_attention(query * 1e4, key, backend=backend)
    assert actual.isfinite().all()
    close(actual, dense(query * 1e4, key))


# --- received attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("with_lse", [False, True])
def test_received_attention(backend, dtype, kv_heads, with_lse):
    query, key = random_qk(70, 70, heads=8, kv_heads=kv_heads, dtype=dtype)
    lse = dense_scores(query, key).logsumexp(-1) if with_lse else None
    close(fp.received_attention(query, key, lse=lse, backend=backend), dense(query, key), dtype)


RAGGED = [0, 8, 8, 44, 48, 112]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("pool", [1, 4])
@pytest.mark.parametrize("with_prior", [False, True])
def test_received_attention_of_ragged_segments(backend, with_lse, pool, with_prior):
    query, key = random_qk(112, 112, heads=4, kv_heads=2)
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)
    spans = [slice(a, b) for a, b in pairwise(RAGGED) if b > a]
    lse = torch.cat([dense_scores(query[s], key[s]).logsumexp(-1) for s in spans], dim=1).float() if with_lse else None
    prior = torch.rand(112 // pool) * 0.1 if with_prior else None
    actual = fp.received_attention(
        query, key, cu_seqlens=cu_seqlens, max_seqlen=64, lse=lse, pool=pool, prior=prior, eps=1e-3, backend=backend
    )
    expected = torch.cat([dense(query[s], key[s]) for s in spans]).reshape(-1, pool).sum(1)
    if with_prior:
        expected = expected / (prior.double() + 1e-3)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_received_attention_of_a_batch(backend):
    query, key = random_qk(24, 24, batch=(2,))
    lse = torch.stack([dense_scores(q, k).logsumexp(-1) for q, k in zip(query, key, strict=True)])
    expected = torch.stack([dense(q, k).reshape(6, 4).sum(1) for q, k in zip(query, key, strict=True)])
    for norm in (None, lse):
        actual = fp.received_attention(query, key, lse=norm, pool=4, backend=backend)
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(actual.sum(1), torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_does_not_depend_on_its_neighbours(backend):
    query, key = random_qk(112, 112)
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)
    packed = fp.received_attention(query, key, cu_seqlens=cu_seqlens, backend=backend)
    alone = fp.received_attention(query[48:], key[48:], backend=backend)
    torch.testing.assert_close(packed[48:], alone, rtol=2e-6, atol=0)  # PyTorch's products: to rounding
    query[:48], key[:48] = math.nan, math.inf
    among_others = fp.received_attention(query, key, cu_seqlens=cu_seqlens, backend=backend)[48:]
    torch.testing.assert_close(among_others, alone, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_received_attention_of_nothing(backend):
    query, key = random_qk(0, 0)
    assert fp.received_attention(query, key, backend=backend).shape == (0,)
    empty = torch.zeros(3, dtype=torch.int32)
    assert fp.received_attention(query, key, cu_seqlens=empty, pool=4, backend=backend).shape == (0,)
    assert fp.received_attention(query, key, cu_seqlens=empty[:1], backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_normaliser_is_used(backend):
    query, key = random_qk(20, 20, heads=4, kv_heads=2)
    lse = dense_scores(query, key).logsumexp(-1).float() + math.log(2)
    for function in (fp.query_attention, fp.received_attention):
        actual = function(query, key, lse=lse, backend=backend)
        torch.testing.assert_close(actual, function(query, key, backend=backend) / 2)


# --- the block-wise implementation


@pytest.mark.parametrize("block", [1, 50, 400, 3000])
@pytest.mark.parametrize("with_lse", [False, True])
def test_any_block_size_gives_the_same_scores(monkeypatch, block, with_lse):
    query, key = random_qk(40, 40, heads=8, kv_heads=2)
    lse = dense_scores(query, key).logsumexp(-1).float() if with_lse else None
    expected = dense(query, key)
    monkeypatch.setattr(attention, "_BLOCK", block)
    close(fp.received_attention(query, key, lse=lse, backend="cpu"), expected)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and the number of score products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        self.products += func is torch.ops.aten.bmm.default
        return result


@pytest.mark.parametrize("with_lse", [False, True])
def test_memory_is_bounded_by_the_block(monkeypatch, with_lse):
    n, heads, d = 512, 4, 8
    query, key = random_qk(n, n, heads=heads, d=d)
    lse = dense_scores(query, key).logsumexp(-1).float() if with_lse else None
    monkeypatch.setattr(attention, "_BLOCK", 1 << 15)  # 64 rows of one head
    with LargestTensor() as seen:
        attention.received_attention_cpu(query, key, None, None, d**-0.5, lse, 1, None, 1e-7)
    assert seen.largest == 1 << 15  # where one head's matrix has 512 * 512
    assert seen.products == (1 if with_lse else 2) * heads * n // 64


# --- operators


OPERATOR_CASES = {
    "query": lambda: (
        torch.ops.flashprune.query_attention,
        (*random_qk(2, 30), 0.25, None, None, [5, 25, 1], None, 1e-7),
    ),
    "query-indexed": lambda: (
        torch.ops.flashprune.query_attention,
        (*random_qk(2, 30, batch=(2,)), 0.25, torch.zeros(2, 4, 2), torch.tensor([1, 4]), [], torch.ones(2), 1e-7),
    ),
    "received": lambda: (
        torch.ops.flashprune.received_attention,
        (*random_qk(24, 24), torch.tensor([0, 8, 24], dtype=torch.int32), 16, 0.25, None, 4, torch.ones(6), 1e-7),
    ),
    "received-batch": lambda: (
        torch.ops.flashprune.received_attention,
        (*random_qk(24, 24, batch=(2,), dtype=torch.bfloat16), None, None, 0.25, torch.zeros(2, 4, 24), 1, None, 1e-7),
    ),
}


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck(case):
    operator, args = OPERATOR_CASES[case]()
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_tensors_on_several_devices_are_refused(case):
    operator, args = OPERATOR_CASES[case]()
    names = [argument.name for argument in operator.default._schema.arguments]
    for moved, x in enumerate(args):
        if moved and isinstance(x, torch.Tensor):
            mixed = [*args[:moved], x.to("meta"), *args[moved + 1 :]]
            with pytest.raises(ValueError, match=f"^{names[moved]} must be on the device of query, cpu, got meta"):
                operator(*mixed)


def test_compiled_attention_is_the_eager_one():
    query, key = random_qk(2, 112, heads=4, kv_heads=2)
    patches, _ = random_qk(112, 112, seed=1)
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)

    def step(query, key, patches, cu_seqlens):
        attended = fp.query_attention(query, key, visual=slice(8, 36), backend="cpu")
        received = fp.received_attention(patches, patches, cu_seqlens=cu_seqlens, max_seqlen=64, pool=4)
        return fp.minmax(fp.debias(received, attended)), fp.soft_topk(received, 0.2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(query, key, patches, cu_seqlens)
    for actual, wanted in zip(compiled(query, key, patches, cu_seqlens), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_compiled_attention_checks_the_values_of_cu_seqlens():
    query, key = random_qk(16, 16)

    def step(query, key, cu_seqlens):
        return fp.received_attention(query, key, cu_seqlens=cu_seqlens)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="cu_seqlens must end at T=16, got 15"):
        compiled(query, key, torch.tensor([0, 15], dtype=torch.int32))


# --- debias, minmax, soft_topk, resize_prior


def test_debias_is_the_formula():
    attention_, prior = torch.rand(2, 9), torch.rand(2, 9)
    assert torch.equal(fp.debias(attention_, prior, eps=0.5), attention_ / (prior + 0.5))
    assert torch.equal(fp.debias(attention_, prior[0]), attention_ / (prior[0] + 1e-7))
    assert fp.debias(attention_.bfloat16(), prior.half()).dtype == torch.float32
    assert fp.debias(torch.ones(1), torch.zeros(1)).isfinite().all()


def test_minmax_is_the_formula_per_segment():
    scores = torch.randn(12)
    parts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    expected = torch.cat([(s - s.min()) / (s.max() - s.min() + 1e-6) for s in (scores[p] for p in parts)])
    cu_seqlens = torch.tensor([0, 5, 5, 6, 12, 12], dtype=torch.int32)
    assert torch.equal(fp.minmax(scores, cu_seqlens=cu_seqlens), expected)
    rows = scores.reshape(2, 6)
    assert torch.equal(fp.minmax(rows), torch.stack([fp.minmax(row) for row in rows]))
    assert torch.equal(fp.minmax(torch.full((4,), 3.0)), torch.zeros(4))
    assert fp.minmax(torch.ones(3, dtype=torch.float16)).dtype == torch.float32
    assert fp.minmax(torch.ones(3).double()).dtype == torch.float64
    assert fp.minmax(torch.empty(0)).shape == (0,)


def test_minmax_of_scores_that_are_not_finite():
    scores = torch.tensor([1.0, math.nan, 3.0, math.inf, 2.0, -math.inf])
    expected = torch.tensor([0.0, math.nan, 1.0, math.inf, 0.5, -math.inf])
    torch.testing.assert_close(fp.minmax(scores), expected, equal_nan=True)
    spans = torch.tensor([0, 6], dtype=torch.int32)
    torch.testing.assert_close(fp.minmax(scores, cu_seqlens=spans), expected, equal_nan=True)
    assert fp.minmax(torch.full((2,), math.nan)).isnan().all()


@pytest.mark.parametrize("n", [1, 2, 7, 400])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.999])
def test_soft_topk_sums_to_the_share(n, ratio):
    for spread in (0.0, 1e-3, 1.0, 30.0):
        scores = torch.randn(2, 3, n, dtype=torch.float64) * spread + 5
        weights = fp.soft_topk(scores, ratio)
        target = torch.full((2, 3), min(max(ratio * n, 1e-4), n - 1e-4), dtype=torch.float64)
        torch.testing.assert_close(weights.sum(-1), target, rtol=1e-9, atol=1e-9)
        offset = torch.logit(weights) - scores  # one offset a row; saturated weights cannot show it
        clear = (weights > 1e-6) & (weights < 1 - 1e-6)
        for row, seen in zip(offset.reshape(-1, n), clear.reshape(-1, n), strict=True):
            if seen.any():
                assert float(row[seen].max() - row[seen].min()) < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_minmax_of_the_widest_scores(packed):
    scores = torch.tensor([-3e38, 3e38, 0.0, 1e38])
    spans = torch.tensor([0, 4], dtype=torch.int32) if packed else None
    expected = torch.tensor([0.0, 1.0, 0.5, 2 / 3])
    torch.testing.assert_close(fp.minmax(scores, cu_seqlens=spans), expected, rtol=1e-6, atol=0)
    picks = fp.idpruner(torch.eye(4), scores, 2, cu_seqlens=spans, sort=False)
    assert picks.tolist() == [1, 3]


def test_soft_topk_of_the_widest_scores():
    torch.testing.assert_close(fp.soft_topk(torch.full((4,), -3e38), 0.5), torch.full((4,), 0.5))


def arithmetic():
    """Every function of importance, each with float32 and with bfloat16 inputs, by name."""
    query, key = random_qk(3, 48, kv_heads=2)
    patches, more = random_qk(48, 48, seed=1)
    scores, embeds, texts = torch.randn(48), torch.randn(48, 32), torch.randn(2, 32)
    scorer, spans = fp.VisionSelector(32, 16).requires_grad_(False), torch.tensor([0, 16, 48], dtype=torch.int32)
    calls = {
        "text_relevance": (fp.text_relevance, embeds, texts),
        "VisionSelector": (scorer, embeds),
        "VisionSelector-packed": (lambda x: scorer(x, cu_seqlens=spans), embeds),
        "soft_topk": (lambda x: fp.soft_topk(x, 0.25), scores),
        "minmax": (fp.minmax, scores),
        "debias": (fp.debias, scores, scores.exp()),
        "resize_prior": (lambda x: fp.importance.resize_prior(x, (6, 8), (3, 5)), scores),
        "hopkins": (lambda x: torch.tensor(fp.metrics.hopkins(x, torch.arange(0, 48, 3))), embeds),
    }
    for backend in BACKENDS:
        calls[f"query_attention-{backend}"] = (partial(fp.query_attention, backend=backend), query, key)
        calls[f"received_attention-{backend}"] = (partial(fp.received_attention, backend=backend), patches, more)
        calls[f"mmr_select-{backend}"] = (partial(fp.mmr_select, k=9, backend=backend), embeds, scores)
    return calls


@pytest.mark.parametrize("name", arithmetic())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_a_call_changes_nothing(name, dtype):
    function, *inputs = arithmetic()[name]
    inputs = [x.to(dtype) for x in inputs]
    expected = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)  # bfloat16 is off by a thousandth and more


def test_soft_topk_at_its_limits():
    scores = torch.randn(50)
    assert fp.soft_topk(scores, 0.0).sum() < 2e-4
    torch.testing.assert_close(fp.soft_topk(scores, 1.0).sum(), torch.tensor(50.0), atol=2e-4, rtol=0)
    assert fp.soft_topk(torch.empty(3, 0), 0.5).shape == (3, 0)
    assert fp.soft_topk(scores.bfloat16(), 0.5).dtype == torch.float32


def test_resize_prior():
    prior = torch.rand(2, 6)
    assert torch.equal(fp.importance.resize_prior(prior, (2, 3), (2, 3)), prior)
    flat = fp.importance.resize_prior(torch.full((12,), 0.25), (3, 4), (7, 5))
    torch.testing.assert_close(flat, torch.full((35,), 0.25))
    ramp = fp.importance.resize_prior(torch.tensor([0.0, 1.0]), (2, 1), (4, 1))
    torch.testing.assert_close(ramp, torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_reference_offers_the_same_functions():
    query, key = random_qk(3, 20)
    torch.testing.assert_close(fp.reference.query_attention(query, key), fp.query_attention(query, key))
    torch.testing.assert_close(fp.reference.received_attention(key, key), fp.received_attention(key, key))
    for name in ("debias", "minmax", "soft_topk"):
        assert getattr(fp.reference, name) is getattr(fp, name)


# --- wrong inputs

Q, K = random_qk(4, 20, heads=4, kv_heads=2)
N = torch.randn(20, 4, 16)
SPANS = torch.tensor([0, 8, 20], dtype=torch.int32)


def spans(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


WRONG = {
    "query no tensor": (lambda: fp.query_attention([1], K), TypeError, "query must be a torch.Tensor, got list"),
    "key dtype": (lambda: fp.query_attention(Q, K.half()), TypeError, "key must have query's dtype"),
    "int dtype": (lambda: fp.query_attention(Q.int(), K.int()), TypeError, "query must be float32.*got int32"),
    "dims": (lambda: fp.query_attention(Q[0], K), ValueError, r"query must be \[tokens, H, d\].*got \[4, 16\]"),
    "key dims": (lambda: fp.query_attention(Q, K[None]), ValueError, "key must have as many dimensions as query"),
    "head dim": (lambda: fp.query_attention(Q, K[..., :8]), ValueError, "head dimension d=16"),
    "heads": (lambda: fp.query_attention(Q[:, :3], K), ValueError, "H=3 heads must be a multiple of key's Hkv=2"),
    "no rows": (lambda: fp.query_attention(Q[:0], K), ValueError, "query must hold at least one row"),
    "batch": (lambda: fp.query_attention(Q[None], K.expand(2, -1, -1, -1)), ValueError, "batch size 1"),
    "scale": (lambda: fp.query_attention(Q, K, scale=math.nan), ValueError, "scale=nan must be finite"),
    "eps": (lambda: fp.query_attention(Q, K, eps=-1.0), ValueError, "eps=-1.0 must be at least 0"),
    "grad": (lambda: fp.query_attention(Q.clone().requires_grad_(), K), ValueError, "query requires grad"),
    "backend": (lambda: fp.query_attention(Q, K, backend="gpu"), ValueError, "gpu"),
    "visual type": (lambda: fp.query_attention(Q, K, visual=[1]), TypeError, "visual must be a slice.*got list"),
    "visual dtype": (lambda: fp.query_attention(Q, K, visual=spans(1)), TypeError, "visual must be int64"),
    "visual range": (
        lambda: fp.query_attention(Q, K, visual=torch.tensor([3, 20])),
        ValueError,
        r"visual must lie between 0 and L-1=19, got 3\.\.20",
    ),
    "visual step": (lambda: fp.query_attention(Q, K, visual=slice(9, 1, -1)), ValueError, "step >= 1"),
    "lse shape": (
        lambda: fp.query_attention(Q, K, lse=torch.zeros(4, 5)),
        ValueError,
        r"lse must be \[4, 4\].*\[4, 5\]",
    ),
    "lse dtype": (lambda: fp.query_attention(Q, K, lse=torch.zeros(4, 4).long()), TypeError, "lse must be float32"),
    "prior shape": (
        lambda: fp.query_attention(Q, K, visual=slice(10), prior=torch.ones(20)),
        ValueError,
        r"prior must be \[10\], one value a score, got \[20\]",
    ),
    "received tokens": (lambda: fp.received_attention(N, K[:19]), ValueError, "key must have query's tokens"),
    "pool": (lambda: fp.received_attention(N, N, pool=3), ValueError, "pool=3 does not divide the 20 tokens"),
    "pool zero": (lambda: fp.received_attention(N, N, pool=0), ValueError, "pool=0 must be at least 1"),
    "pool of a segment": (
        lambda: fp.received_attention(N, N, pool=4, cu_seqlens=spans(0, 6, 20)),
        ValueError,
        "pool=4 does not divide the 6 tokens of segment 0",
    ),
    "max_seqlen": (
        lambda: fp.received_attention(N, N, cu_seqlens=SPANS, max_seqlen=9),
        ValueError,
        "max_seqlen=9 is less than the 12 tokens of segment 1",
    ),
    "max_seqlen dense": (
        lambda: fp.received_attention(N, N, max_seqlen=9),
        ValueError,
        "max_seqlen=9 is less than N=20",
    ),
    "cu_seqlens dtype": (
        lambda: fp.received_attention(N, N, cu_seqlens=spans(0, 20, dtype=torch.int64)),
        TypeError,
        "cu_seqlens must be int32",
    ),
    "cu_seqlens end": (lambda: fp.received_attention(N, N, cu_seqlens=spans(0, 19)), ValueError, "end at T=20, got 19"),
    "cu_seqlens falls": (lambda: fp.received_attention(N, N, cu_seqlens=spans(0, 9, 5, 20)), ValueError, "fall"),
    "cu_seqlens batch": (
        lambda: fp.received_attention(N[None], N[None], cu_seqlens=SPANS),
        ValueError,
        r"query must be packed \[T, H, d\]",
    ),
    "pooled prior": (
        lambda: fp.received_attention(N, N, pool=4, prior=torch.ones(20)),
        ValueError,
        r"prior must be \[5\]",
    ),
    "debias shape": (lambda: fp.debias(torch.ones(3), torch.ones(4)), ValueError, r"prior must be \[3\].*got \[4\]"),
    "debias batch": (
        lambda: fp.debias(torch.ones(2, 3), torch.ones(2)),
        ValueError,
        r"prior must be \[2, 3\] or \[3\].*got \[2\]",
    ),
    "debias dtype": (lambda: fp.debias(torch.ones(3).long(), torch.ones(3)), TypeError, "attention must be float32"),
    "minmax shape": (lambda: fp.minmax(torch.ones(1, 2, 3)), ValueError, r"scores must be \[N\] or \[B, N\]"),
    "minmax packed": (lambda: fp.minmax(torch.ones(1, 2), cu_seqlens=spans(0, 2)), ValueError, r"packed \[T\]"),
    "minmax end": (lambda: fp.minmax(torch.ones(3), cu_seqlens=spans(0, 2)), ValueError, "end at T=3, got 2"),
    "minmax dtype": (lambda: fp.minmax(torch.ones(3).int()), TypeError, "scores must be float32.*got int32"),
    "soft ratio": (lambda: fp.soft_topk(torch.ones(3), 1.5), ValueError, "ratio=1.5 must be between 0 and 1"),
    "soft nan": (lambda: fp.soft_topk(torch.ones(3), math.nan), ValueError, "ratio=nan must be finite"),
    "soft type": (lambda: fp.soft_topk(torch.ones(3), "1"), TypeError, "ratio must be a host number"),
    "soft scalar": (lambda: fp.soft_topk(torch.ones(()), 0.5), ValueError, r"scores must be \[..., N\]"),
    "soft grad": (lambda: fp.soft_topk(torch.ones(3, requires_grad=True), 0.5), ValueError, "scores requires grad"),
    "prior grid": (
        lambda: fp.importance.resize_prior(torch.ones(6), (2, 2), (4, 4)),
        ValueError,
        r"prior must be \[..., 4\] for grid=\(2, 2\), got \[6\]",
    ),
    "grid form": (lambda: fp.importance.resize_prior(torch.ones(6), 6, (4, 4)), ValueError, r"grid must be \(h, w\)"),
    "grid side": (
        lambda: fp.importance.resize_prior(torch.ones(6), (2, 3), (0, 4)),
        ValueError,
        r"new_grid\[0\]=0 must be at least 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", [fp.query_attention, fp.received_attention])
def test_the_reference_checks_too(function):
    with pytest.raises(ValueError, match=r"eps=-1.0 must be at least 0"):
        function(N, N, eps=-1.0, backend="reference")


def test_grad_is_fine_under_no_grad():
    with torch.no_grad():
        assert not fp.query_attention(Q.clone().requires_grad_(), K).requires_grad


def shapes():
    """Importance and methods on packed, batched and single tensors; each call gives one tensor."""
    spans = torch.tensor([0, 16, 48], dtype=torch.int32)
    scorer = fp.VisionSelector(32, 16).requires_grad_(False)
    query, key = random_qk(48, 48)
    embeds, scores = torch.randn(48, 32), torch.rand(48)
    return {
        "query_attention": (fp.query_attention, query[:2], key),
        "query_attention-index": (lambda q, k, at: fp.query_attention(q, k, visual=at), query, key, torch.tensor([3])),
        "received_attention": (lambda q, k, cu: fp.received_attention(q, k, cu_seqlens=cu, pool=4), query, key, spans),
        "minmax": (lambda x, cu: fp.minmax(x, cu_seqlens=cu), scores, spans),
        "soft_topk": (lambda x: fp.soft_topk(x, 0.3), scores),
        "text_relevance": (fp.text_relevance, embeds, embeds[:3]),
        "VisionSelector": (lambda x, cu, *w: torch.func.functional_call(scorer, dict(zip(WEIGHTS, w, strict=True)), x,
                           {"cu_seqlens": cu}), embeds, spans, *scorer.parameters()),
        "idpruner": (lambda x, s, cu: fp.idpruner(x, s, [4, 9], cu_seqlens=cu), embeds, scores, spans),
        "d2pruner": (lambda x, s: fp.d2pruner(x, s, 9, alpha=0.5, grid=(6, 8)), embeds, scores),
        "divprune": (lambda x, cu: fp.divprune(x, 4, cu_seqlens=cu), embeds, spans),
        "cdpruner": (lambda x, s, cu: fp.cdpruner(x, s, 4, cu_seqlens=cu), embeds, scores, spans),
        "fastv": (lambda s, cu: fp.fastv(s, 4, cu_seqlens=cu), scores, spans),
        "naive_hybrid": (lambda x, s, cu: fp.naive_hybrid(x, s, 4, pool_ratio=2, cu_seqlens=cu), embeds, scores, spans),
    }  # fmt: skip


WEIGHTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_values(name, kind):
    function, *inputs = shapes()[name]
    expected = function(*inputs)
    if kind == "fake":
        with FakeTensorMode() as mode:
            found = function(*map(mode.from_tensor, inputs))
    else:
        found = function(*(x.to("meta") for x in inputs))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
