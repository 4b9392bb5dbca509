"""Each method is its importance and its selector with the documented settings, on every layout."""

from __future__ import annotations

import math

import pytest
import torch

import flashprune as fp
from flashprune import selectors

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(fp.backends()["cpu"] != "ready", reason=fp.backends()["cpu"])),
]
N, D, K = 36, 16, 10


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator) + torch.randn(1, D, generator=generator)
    return features, torch.rand(N, generator=generator), torch.rand(N, generator=generator) + 0.1


METHODS = {
    "d2pruner": lambda x, w, k, **o: fp.d2pruner(x, w, k, threshold=0.3, **o),
    "idpruner": fp.idpruner,
    "divprune": lambda x, w, k, **o: fp.divprune(x, k, **o),
    "cdpruner": fp.cdpruner,
    "fastv": lambda x, w, k, **o: fp.fastv(w, k, **o),
    "naive_hybrid": lambda x, w, k, **o: fp.naive_hybrid(x, w, k, pool_ratio=1.5, **o),
}


# --- settings


@pytest.mark.parametrize("backend", BACKENDS)
def test_d2pruner_debiases_and_pins_seven_tenths(tokens, backend):
    features, attention, prior = tokens
    scores = attention / (prior + 1e-7)
    expected = fp.mis_select(features, scores, K, threshold=0.8, pivots=7, sort=False, backend=backend)
    actual = fp.d2pruner(features, attention, K, prior=prior, sort=False, backend=backend)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:7], scores.topk(7).indices)
    plain = fp.d2pruner(features, attention, K, sort=False, backend=backend)
    assert torch.equal(plain[:7], attention.topk(7).indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_d2pruner_strikes_what_resembles_a_kept_token(backend):
    features = torch.eye(8).repeat_interleave(2, 0)  # eight pairs of equal tokens
    attention = torch.arange(16, 0, -1).float()
    attention[[1, 2]] = attention[[2, 1]]
    options = {"pivot_ratio": 0.25, "sort": False, "backend": backend}
    # Pivots 0 and 2 strike nothing, so that their twins come next; then one of each pair, in order of importance.
    assert fp.d2pruner(features, attention, 8, **options).tolist() == [0, 2, 1, 3, 4, 6, 8, 10]
    struck = fp.d2pruner(features, attention, 8, pivots_suppress=True, **options)
    assert struck.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    full = fp.d2pruner(features, attention, 12, pivot_ratio=0.0, sort=False, backend=backend)
    assert full.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7]  # then by importance


def spy(monkeypatch, name):
    calls = []

    def record(*args, **options):
        calls.append(options)
        return torch.zeros(0, dtype=torch.int64)

    monkeypatch.setattr(selectors, name, record)
    return calls


def test_d2pruner_passes_every_setting_on(monkeypatch, tokens):
    features, attention, _ = tokens
    calls = spy(monkeypatch, "mis_select")
    settings = {
        "grid": (6, 6),
        "positions": torch.zeros(N, 3, dtype=torch.int32),
        "alpha": 0.25,
        "threshold": 0.625,
        "similarity": "half_cosine",
        "proximity": "gaussian",
        "radius": 3,
        "sigma": 2.5,
        "temporal_radius": 2,
        "pivots_suppress": True,
        "cu_seqlens": torch.tensor([0, N], dtype=torch.int32),
        "sort": False,
        "backend": "reference",
    }
    fp.d2pruner(features, attention, K, pivot_ratio=0.5, **settings)
    assert calls == [settings | {"pivots": 5}]
    fp.d2pruner(features, attention, K)
    assert (calls[1]["alpha"], calls[1]["threshold"], calls[1]["pivots"], calls[1]["proximity"]) == (
        1.0,
        0.8,
        7,
        "chebyshev",
    )


@pytest.mark.parametrize(
    ("ratio", "k", "pivots"),
    [
        (0.7, 10, 7),
        (0.7, 64, 44),
        (0.29, 100, 29),
        (0.7, 1, 0),
        (1.0, 5, 5),
        (0.0, 5, 0),
        (0.7, [10, 0, 64], [7, 0, 44]),
    ],
)
def test_d2pruner_rounds_pivots_down(monkeypatch, ratio, k, pivots):
    calls = spy(monkeypatch, "mis_select")
    fp.d2pruner(torch.randn(200, 4), torch.rand(200), k, pivot_ratio=ratio)
    assert calls[0]["pivots"] == pivots


@pytest.mark.parametrize("backend", BACKENDS)
def test_idpruner_scales_scores(tokens, backend):
    features, scores, _ = tokens
    for shift, scale in ((0.0, 1.0), (-5.0, 40.0)):
        raw = scores * scale + shift
        expected = fp.mmr_select(features, fp.minmax(raw), K, lam=0.3, per_round=2, sort=False, backend=backend)
        assert torch.equal(fp.idpruner(features, raw, K, lam=0.3, per_round=2, sort=False, backend=backend), expected)
    default = fp.mmr_select(features, fp.minmax(scores), K, lam=0.5, backend=backend)
    assert torch.equal(fp.idpruner(features, scores, K, backend=backend), default)


@pytest.mark.parametrize("backend", BACKENDS)
def test_baselines_are_their_selectors(tokens, backend):
    features, weights, _ = tokens
    for sort in (True, False):
        options = {"sort": sort, "backend": backend}
        assert torch.equal(fp.divprune(features, K, **options), fp.maxmin_select(features, K, **options))
        assert torch.equal(fp.cdpruner(features, weights, K, **options), fp.dpp_select(features, weights, K, **options))
        assert torch.equal(fp.fastv(weights, K, **options), fp.topk_select(weights, K, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_naive_hybrid_is_max_min_inside_the_pool(tokens, backend):
    features, weights, _ = tokens
    pool = weights.topk(15).indices.sort().values
    inside = fp.maxmin_select(features[pool], K, sort=False, backend=backend)
    assert torch.equal(fp.naive_hybrid(features, weights, K, pool_ratio=1.5, sort=False, backend=backend), pool[inside])


@pytest.mark.parametrize("backend", BACKENDS)
def test_naive_hybrid_lies_between_topk_and_divprune(tokens, backend):
    features, weights, _ = tokens
    narrow = fp.naive_hybrid(features, weights, K, pool_ratio=1, backend=backend)
    assert torch.equal(narrow, fp.topk_select(weights, K, backend=backend))
    for wide in (3.6, 100.0):
        every = fp.naive_hybrid(features, weights, K, pool_ratio=wide, sort=False, backend=backend)
        assert torch.equal(every, fp.divprune(features, K, sort=False, backend=backend))


def test_naive_hybrid_rounds_the_pool_up(monkeypatch):
    features, weights = torch.randn(100, 4), torch.rand(100)
    sizes = []
    monkeypatch.setattr(selectors, "topk_select", lambda s, k, **o: sizes.append(k) or torch.arange(k))
    for ratio, k in ((1.1, 30), (1.5, 3), (2.0, 60)):
        fp.naive_hybrid(features, weights, k, pool_ratio=ratio, backend="reference")
    assert sizes == [33, 5, 100]


# --- layouts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_each_item(tokens, method, sort, backend):
    features, weights, _ = tokens
    x, w = features.reshape(3, 12, D), weights.reshape(3, 12)
    actual = METHODS[method](x, w, 5, sort=sort, backend=backend)
    expected = [METHODS[method](x[b], w[b], 5, sort=sort, backend=backend) for b in range(3)]
    assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, [2, 0, 7, 4]])
def test_packed_segments_are_each_segment(tokens, method, sort, backend, k):
    features, weights, _ = tokens
    bounds = [0, 4, 7, 14, 36]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    actual = METHODS[method](features, weights, k, cu_seqlens=cu_seqlens, sort=sort, backend=backend)
    ks = [k] * 4 if isinstance(k, int) else k
    parts = [
        METHODS[method](features[a:b], weights[a:b], each, sort=sort, backend=backend) + a
        for a, b, each in zip(bounds, bounds[1:], ks, strict=False)
    ]
    assert actual.dtype == torch.int64
    assert torch.equal(actual, torch.cat(parts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_empty_segments_and_extreme_budgets(tokens, method, backend):
    features, weights, _ = tokens
    assert METHODS[method](features, weights, 0, backend=backend).shape == (0,)
    assert METHODS[method](features, weights, N, backend=backend).tolist() == list(range(N))
    assert METHODS[method](features[:1], weights[:1], 1, backend=backend).tolist() == [0]
    assert METHODS[method](features[:0], weights[:0], 0, backend=backend).shape == (0,)
    spans = torch.tensor([0, 0, N, N], dtype=torch.int32)
    packed = METHODS[method](features, weights, [0, K, 0], cu_seqlens=spans, backend=backend)
    assert torch.equal(packed, METHODS[method](features, weights, K, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_d2pruner_on_grids(tokens, backend):
    features, attention, prior = tokens
    options = {"alpha": 0.5, "threshold": 0.6, "pivot_ratio": 0.2, "prior": prior, "backend": backend}
    one = fp.d2pruner(features, attention, K, grid=(6, 6), **options)
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    positions = torch.stack([torch.zeros(36), y.flatten(), x.flatten()], -1).int()
    assert torch.equal(one, fp.d2pruner(features, attention, K, positions=positions, **options))
    spans = torch.tensor([0, 16, 36], dtype=torch.int32)
    both = fp.d2pruner(features, attention, [4, 6], grid=[(4, 4), (4, 5)], cu_seqlens=spans, **options)
    options["prior"] = prior[:16]
    first = fp.d2pruner(features[:16], attention[:16], 4, grid=(4, 4), **options)
    assert torch.equal(both[:4], first)


@pytest.mark.skipif(fp.backends()["cpu"] != "ready", reason=fp.backends()["cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_methods_are_the_eager_ones(tokens, method):
    features, weights, _ = tokens
    spans = torch.tensor([0, 16, 36], dtype=torch.int32)

    def step(features, weights, spans):
        packed = METHODS[method](features, weights, [4, 6], cu_seqlens=spans, backend="cpu")
        return packed, METHODS[method](features, weights, K, backend="cpu") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(features, weights, spans)
    for actual, wanted in zip(compiled(features, weights, spans), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_offers_the_methods(tokens, method):
    features, weights, _ = tokens
    assert callable(getattr(fp.reference, method))
    if method == "idpruner":
        pinned = fp.reference.idpruner(features, weights, K)
        assert torch.equal(pinned, fp.idpruner(features, weights, K, backend="reference"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(tokens, method, dtype):
    features, weights, _ = tokens
    features, weights = features.to(dtype), weights.to(dtype)
    actual = METHODS[method](features, weights, K, backend="reference")
    assert torch.equal(actual, METHODS[method](features.float(), weights.float(), K, backend="reference"))


# --- wrong inputs

X, W = torch.randn(N, D), torch.rand(N)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fp.d2pruner(X, W[:9], K), ValueError, r"attention must be \[36\].*got \[9\]"),
        (lambda: fp.d2pruner(X, W, K, prior=W[:9]), ValueError, r"prior must be \[36\].*got \[9\]"),
        (lambda: fp.d2pruner(X, W, K, prior=W, eps=-1), ValueError, "eps=-1 must be at least 0"),
        (lambda: fp.d2pruner(X, W, K, pivot_ratio=1.2), ValueError, "pivot_ratio=1.2 must be between 0 and 1"),
        (lambda: fp.d2pruner(X, W, K, pivot_ratio=math.nan), ValueError, "pivot_ratio=nan must be finite"),
        (lambda: fp.d2pruner(X, W, K, alpha=0.5), ValueError, "grid or positions"),
        (lambda: fp.d2pruner(X, W, K, threshold=math.nan), ValueError, "threshold=nan must be finite"),
        (lambda: fp.d2pruner(X, W, 0.25), TypeError, "k must be a host int, got float"),
        (lambda: fp.d2pruner(X, W, 99), ValueError, "k=99 exceeds N=36"),
        (lambda: fp.d2pruner(X, W.clone().requires_grad_(), K), ValueError, "attention requires grad"),
        (lambda: fp.idpruner(X, W[:9], K), ValueError, r"scores must be \[36\].*got \[9\]"),
        (lambda: fp.idpruner(X, W.clone().requires_grad_(), K), ValueError, "scores requires grad"),
        (lambda: fp.idpruner(X, W, K, lam=2), ValueError, "lam=2 must be between 0 and 1"),
        (lambda: fp.idpruner(X, W, K, per_round=0), ValueError, "per_round=0 must be at least 1"),
        (lambda: fp.divprune(X[0], K), ValueError, "features must be"),
        (lambda: fp.cdpruner(X, W[:9], K), ValueError, r"relevance must be \[36\].*got \[9\]"),
        (lambda: fp.fastv(W.long(), K), TypeError, "scores must be float32"),
        (lambda: fp.naive_hybrid(X, W, K, pool_ratio=0.5), ValueError, "pool_ratio=0.5 must be at least 1"),
        (lambda: fp.naive_hybrid(X, W, K, pool_ratio=math.inf), ValueError, "pool_ratio=inf must be finite"),
        (lambda: fp.naive_hybrid(X, W[:9], K, pool_ratio=2), ValueError, r"importance must be \[36\].*got \[9\]"),
        (lambda: fp.naive_hybrid(X, W, 99, pool_ratio=2), ValueError, "k=99 exceeds N=36"),
        (lambda: fp.naive_hybrid(X, W, K), TypeError, "pool_ratio"),
        (lambda: fp.idpruner(X, W, K, backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
