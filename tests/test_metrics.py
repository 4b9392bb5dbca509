"""Metrics against their formulas, written with the whole distance matrix."""

from __future__ import annotations

import math

import pytest
import torch

import flashprune as fp
from flashprune import metrics


def test_importance_retention_is_the_share():
    importance = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert fp.metrics.importance_retention(importance, torch.tensor([1, 2])) == pytest.approx(0.7)
    assert fp.metrics.importance_retention(importance, torch.arange(4)) == 1.0
    assert fp.metrics.importance_retention(importance, torch.arange(0)) == 0.0
    assert fp.metrics.importance_retention(importance.bfloat16(), torch.tensor([1])) == pytest.approx(0.4, rel=1e-2)
    assert math.isnan(fp.metrics.importance_retention(torch.zeros(3), torch.tensor([1])))


def test_topk_retains_most():
    importance = torch.rand(200)
    best = fp.metrics.importance_retention(importance, importance.topk(50).indices)
    assert best > fp.metrics.importance_retention(importance, torch.randperm(200)[:50])


def clumped_and_spread(n=256, d=64, k=32, seed=0):
    """Features in 32 tight clusters; indices of one cluster after the other, and of one token a cluster."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator)
    features = centres.repeat_interleave(n // k, 0) + 0.1 * torch.randn(n, d, generator=generator)
    return features, torch.arange(k), torch.arange(0, n, n // k)


def dense_hopkins(features, indices, points):
    features, points = features.double(), points.double()
    kept = torch.nn.functional.normalize(features[indices])
    distances = 1 - kept @ kept.T + 2 * torch.eye(len(kept), dtype=torch.float64)
    apart = distances.amin(1).sum()
    away = (1 - torch.nn.functional.normalize(points) @ kept.T).amin(1).sum()
    return float(away / (away + apart))


@pytest.mark.parametrize("block", [3, 1024])
def test_hopkins_is_the_formula(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    features, clumped, spread = clumped_and_spread()
    for indices in (clumped, spread, torch.randperm(256)[:40]):
        k = len(indices)
        drawn = torch.randperm(256, generator=torch.Generator().manual_seed(3))[:k]
        tokens = fp.metrics.hopkins(features, indices, seed=3)
        assert tokens == pytest.approx(dense_hopkins(features, indices, features[drawn]), rel=1e-4)
        low, high = features.amin(0), features.amax(0)
        uniform = torch.rand(k, 64, generator=torch.Generator().manual_seed(3))
        box = fp.metrics.hopkins(features, indices, reference="box", seed=3)
        assert box == pytest.approx(dense_hopkins(features, indices, low + (high - low) * uniform), rel=1e-4)


@pytest.mark.parametrize("reference", ["tokens", "box"])
def test_hopkins_tells_clumps_from_spread(reference):
    features, clumped, spread = clumped_and_spread()
    assert fp.metrics.hopkins(features, clumped, reference=reference) > 0.8
    assert fp.metrics.hopkins(features, spread, reference=reference) < 0.6


def test_hopkins_depends_on_the_seed_alone():
    features, _, spread = clumped_and_spread()
    first = fp.metrics.hopkins(features, spread, seed=1)
    torch.manual_seed(99)
    assert fp.metrics.hopkins(features, spread, seed=1) == pytest.approx(first, rel=1e-5)
    assert fp.metrics.hopkins(features, spread, seed=2) != pytest.approx(first, rel=1e-3)


def test_hopkins_where_it_is_undefined():
    features = torch.randn(8, 4)
    assert math.isnan(fp.metrics.hopkins(features, torch.tensor([3])))
    assert math.isnan(fp.metrics.hopkins(features, torch.arange(0)))
    assert math.isnan(fp.metrics.hopkins(torch.eye(1).expand(8, 1), torch.tensor([1, 2])))


def test_hopkins_of_rows_without_a_direction():
    features = torch.zeros(8, 4)
    features[0, 0] = math.inf
    assert fp.metrics.hopkins(features, torch.arange(4)) == 0.5  # every distance is 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, w, i: m.importance_retention([1.0], i), TypeError, "importance must be a torch.Tensor"),
        (lambda m, w, i: m.importance_retention(w.long(), i), TypeError, "importance must be float32"),
        (lambda m, w, i: m.importance_retention(w[None], i), ValueError, r"importance must be \[N\], got \[1, 4\]"),
        (lambda m, w, i: m.importance_retention(w - 2, i), ValueError, "finite and not negative"),
        (lambda m, w, i: m.importance_retention(w / 0, i), ValueError, "finite and not negative"),
        (lambda m, w, i: m.importance_retention(w, [0]), TypeError, "indices must be an int64 tensor, got list"),
        (lambda m, w, i: m.importance_retention(w, i.int()), TypeError, "int64 tensor, got torch.int32"),
        (lambda m, w, i: m.importance_retention(w, i[None]), ValueError, r"indices must be \[K\], got \[1, 2\]"),
        (lambda m, w, i: m.importance_retention(w, i + 3), ValueError, r"between 0 and N-1=3, got 3\.\.5"),
        (lambda m, w, i: m.importance_retention(w, i * 0), ValueError, "indices must be distinct"),
        (lambda m, w, i: m.hopkins(w, i), ValueError, r"features must be \[N, D\], got \[4\]"),
        (lambda m, w, i: m.hopkins(w[:, None].int(), i), TypeError, "features must be float32"),
        (
            lambda m, w, i: m.hopkins(w[:, None], i, reference="x"),
            ValueError,
            "reference must be one of 'tokens', 'box'",
        ),
        (lambda m, w, i: m.hopkins(w[:, None], i, seed=0.5), TypeError, "seed must be a host int"),
        (lambda m, w, i: m.hopkins(w[:, None], i - 1), ValueError, "between 0 and N-1=3"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(fp.metrics, torch.ones(4), torch.tensor([0, 2]))
