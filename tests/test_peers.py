"""The peers that we race are what they claim to be: equal to the official code's golden figures, or the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.peers import angelslim_idpruner, cdpruner, dense_mis, divprune

from flashprune import reference

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def golden(method):
    cases = [case for case in MANIFEST if case["method"] == method]
    assert cases, f"no golden case of {method}"
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["file"].removesuffix(".npz"))


def tensors(case):
    with np.load(GOLDEN / case["file"]) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def signs(n, d, seed):
    """Features of ±1: with D a power of 4 every cosine is exact in any summation order."""
    bits = torch.randint(0, 2, (n, d), generator=torch.Generator().manual_seed(seed))
    return (2 * bits - 1).float()


@golden("idpruner")
def test_angelslim_idpruner_is_the_official_loop(case):
    g = tensors(case)
    picks = angelslim_idpruner.idpruner(g["features"], g["scores"], len(g["keep"]), lam=case["lam"])
    assert picks.tolist() == g["order"].tolist()


@golden("idpruner_per_round")
def test_angelslim_idpruner_with_parallel_k_is_the_official_loop(case):
    g = tensors(case)
    k, parallel_k = len(g["keep"]), case["per_round"]
    picks = angelslim_idpruner.idpruner(g["features"], g["scores"], k, lam=case["lam"], parallel_k=parallel_k)
    assert picks.sort().values.tolist() == g["keep"].tolist()


@golden("divprune")
def test_divprune_is_the_official_loop(case):
    g = tensors(case)
    assert divprune.maxmin_loop(g["features"], len(g["keep"])).tolist() == g["order"].tolist()


@golden("cdpruner")
def test_cdpruner_is_the_official_loop(case):
    g = tensors(case)
    assert cdpruner.map_loop(g["features"], g["relevance"], len(g["keep"])).tolist() == g["order"].tolist()


def test_cdpruner_treats_each_image_of_a_batch_alone():
    cases = [case for case in MANIFEST if case["file"] in ("cdpruner_0_10.npz", "cdpruner_0_25.npz")]
    first, second = (tensors(case) for case in cases)
    relevance = torch.stack([first["relevance"], second["relevance"].flip(0)])
    features = torch.stack([first["features"], second["features"].flip(0)])
    picks = cdpruner.map_loop_batched(features, relevance, 14)
    alone = [cdpruner.map_loop(features[b], relevance[b], 14).tolist() for b in range(2)]
    assert picks.tolist() == alone


# At 0.25 the set is maximal early and most of the budget is backfill; at 0.9 nobody is struck.
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("pivots", [0, 1, 20, 32])
def test_dense_mis_is_the_definition(threshold, pivots):
    features = signs(160, 16, seed=pivots)
    importance = torch.rand(160, generator=torch.Generator().manual_seed(1)).mul(50).round()  # many ties
    picks = dense_mis.mis_loop(features, importance, 32, threshold=threshold, pivots=pivots)
    expected = reference.mis_select(features, importance, 32, threshold=threshold, pivots=pivots, sort=False)
    assert picks.tolist() == expected.tolist()


def test_dense_d2pruner_is_the_method():
    features = signs(144, 64, seed=3)
    attention = torch.rand(144, generator=torch.Generator().manual_seed(4))
    prior = torch.linspace(0.5, 1.5, 144)
    picks = dense_mis.d2pruner(features, attention, 30, prior=prior, threshold=0.2)
    expected = reference.d2pruner(features, attention, 30, prior=prior, threshold=0.2, sort=False)
    assert picks.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angelslim_computes_in_float32(dtype):
    g = tensors(next(case for case in MANIFEST if case["method"] == "idpruner"))
    features = g["features"].to(dtype)
    widened = angelslim_idpruner.idpruner(features.float(), g["scores"], 14)
    assert torch.equal(angelslim_idpruner.idpruner(features, g["scores"], 14), widened)
