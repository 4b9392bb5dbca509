"""The peers that we race are what they claim to be: equal to the official code's golden figures, or the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.peers import (
    angelslim_divprune,
    angelslim_idpruner,
    cdpruner,
    compiled,
    dense_mis,
    divprune,
    evs,
    nms_mis,
    uniattn,
    vidcom2,
)

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


@golden("evs")
def test_evs_is_vllms(case):
    assert_published_mask(evs.retention_mask, case)


@golden("vidcom2")
def test_vidcom2_is_vllms(case):
    assert_published_mask(vidcom2.retention_mask, case)


def assert_published_mask(retention_mask, case):
    g, (frames, h, w) = tensors(case), case["thw"]
    mask = retention_mask(g["features"], (frames, h // case["merge"], w // case["merge"]), case["q"])
    assert mask.dtype == torch.bool and torch.equal(mask, g["mask"])


@golden("divprune")
def test_angelslim_divprune_is_the_official_loop(case):
    g = tensors(case)
    assert angelslim_divprune.maxmin_loop(g["features"], len(g["keep"])).tolist() == g["order"].tolist()


@golden("idpruner")
def test_uniattn_with_the_same_weight_picks_what_idpruner_picks(case):
    g = tensors(case)
    if case["lam"] == 0:
        pytest.skip("UniAttn always weighs importance")
    picks = uniattn.mmr_loop(g["features"], angelslim_idpruner.minmax(g["scores"]), len(g["keep"]), lam=case["lam"])
    assert picks.tolist() == g["order"].tolist()


def uniattn_images():
    generator = torch.Generator().manual_seed(5)
    sizes, ks = [40, 25, 40, 60], [20, 12, 20, 7]
    features = torch.cat([signs(n, 64, seed=i) for i, n in enumerate(sizes)])
    return features, torch.randperm(sum(sizes), generator=generator) / 64, sizes, ks


def test_uniattn_groups_ragged_images_by_size():
    features, importance, sizes, ks = uniattn_images()
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    expected = reference.mmr_select(features, importance, ks, cu_seqlens=bounds, sort=False)
    assert uniattn.mmr_ragged(features, importance, sizes, ks).tolist() == expected.tolist()


def test_uniattn_fused_kernel_is_its_loop(device):
    kernel = pytest.importorskip("benchmarks.peers.uniattn_kernel", reason="no Triton")
    features = torch.stack([signs(40, 64, seed=i) for i in range(3)]).to(device)
    importance = (torch.randint(0, 9, (3, 40), generator=torch.Generator().manual_seed(6)) / 8).to(device)  # ties
    unit = torch.nn.functional.normalize(features, dim=-1)
    picks = kernel.fused_steps(importance, unit @ unit.transpose(1, 2), 11, 1.0)
    assert picks.tolist() == reference.mmr_select(features, importance, 11, sort=False).tolist()


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 64, 160])
def test_nms_sweep_is_the_definition(threshold, n):
    features = signs(n, 16, seed=n)
    importance = torch.rand(n, generator=torch.Generator().manual_seed(1)).mul(50).round()  # many ties
    k = max(1, n // 5)
    picks = nms_mis.mis_sweep(features, importance, k, threshold=threshold)
    assert picks.tolist() == reference.mis_select(features, importance, k, threshold=threshold, sort=False).tolist()


def test_nms_sweep_in_whole_words_of_struck_candidates():
    features = torch.ones(130, 4)
    assert nms_mis.mis_sweep(features, torch.arange(130.0), 3).tolist() == [129, 128, 127]


@golden("idpruner")
def test_compiled_mmr_is_the_official_loop(case):
    g = tensors(case)
    importance = angelslim_idpruner.minmax(g["scores"])
    picks = compiled.mmr_loop(g["features"], importance, len(g["keep"]), lam=case["lam"], backend="eager")
    assert picks.tolist() == g["order"].tolist()


@golden("cdpruner")
def test_compiled_dpp_is_the_official_loop(case):
    g = tensors(case)
    assert compiled.map_loop(g["features"], g["relevance"], len(g["keep"]), backend="eager").tolist() == (
        g["order"].tolist()
    )


@pytest.mark.slow
def test_compiled_by_inductor():
    g = tensors(next(case for case in MANIFEST if case["method"] == "idpruner" and case["lam"] == 0.5))
    picks = compiled.mmr_loop(g["features"], angelslim_idpruner.minmax(g["scores"]), len(g["keep"]))
    assert picks.tolist() == g["order"].tolist()
