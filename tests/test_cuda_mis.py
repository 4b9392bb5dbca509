"""The CUDA independent set, emulated, against the definition."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

import flashprune as fp
from emulated import SEEDS, numbers
from inputs import (
    ADVERSARIAL,
    BY_NAME,
    DISTANCES,
    VARIANTS,
    Variant,
    adversarial,
    chain,
    exact,
    gaussian,
    raster,
    signs,
)

MIS = [variant for variant in VARIANTS if variant.method == "mis"]


def run(emulation: ModuleType, operands: tuple, sort: bool = False, **sizes: int) -> tuple[Tensor, int, int]:
    """Picks, launches and bytes of workspace of an operator's operands."""
    features, importance, k, positions, cu_seqlens, *rest = operands
    places = None if positions is None else positions.contiguous().numpy()
    starts = None if cu_seqlens is None else cu_seqlens.numpy()
    out, *costs = emulation.mis_select(numbers(features), numbers(importance), k, places, starts, *rest, sort, **sizes)
    picks = torch.from_numpy(out)
    return (picks if features.ndim == 2 else picks.view(len(features), k[0]), *costs)


def select(
    emulation: ModuleType,
    variant: Variant,
    features: Tensor,
    importance: Tensor,
    k: int | list[int],
    cu_seqlens: Tensor | None = None,
    sort: bool = False,
    **sizes: int,
) -> Tensor:
    *operands, _ = variant.operands(features, importance, k, cu_seqlens=cu_seqlens)
    return run(emulation, operands, sort, **sizes)[0]


@pytest.mark.parametrize("variant", MIS, ids=lambda v: v.name)
def test_exact_features_give_the_picks_of_the_definition(variant: Variant, emulation: ModuleType) -> None:
    features, importance = exact(variant, 150)
    for k, sizes in ((40, {"block": 128}), (150, {"seed": 1, "blocks": 1}), (40, {"seed": 2, "chunk": 64})):
        picks = select(emulation, variant, features, importance, k, **sizes)
        assert torch.equal(picks, variant.define(features, importance, k, sort=False))


def test_large_tiles(emulation: ModuleType) -> None:
    features, importance = exact(MIS[0], 140)
    for variant in (BY_NAME["mis-suppress"], BY_NAME["mis-wide"]):
        picks = select(emulation, variant, features, importance, 90, tile=128, block=128)
        assert torch.equal(picks, variant.define(features, importance, 90, sort=False))


@pytest.mark.parametrize("variant", [BY_NAME["mis-suppress"], BY_NAME["mis-wide"], DISTANCES[1]], ids=lambda v: v.name)
def test_three_panels(variant: Variant, emulation: ModuleType) -> None:
    features, importance = exact(variant, 300)
    for k in (120, 290):
        picks = select(emulation, variant, features, importance, k, block=128, chunk=128)
        assert torch.equal(picks, select(emulation, variant, features, importance, k, seed=1))
        for blocks in (1, 3):
            again = select(emulation, variant, features, importance, k, block=128, seed=blocks, blocks=blocks)
            assert torch.equal(picks, again)
        variant.check(features, importance, k, picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [BY_NAME["mis"], *DISTANCES], ids=lambda v: v.name)
def test_any_features(variant: Variant, dtype: torch.dtype, emulation: ModuleType) -> None:
    features, importance = gaussian(140, 24)
    features, importance = (features + 0.4).to(dtype), importance.to(dtype)
    picks = select(emulation, variant, features, importance, 100, block=128)
    variant.check(features, importance, 100, picks)
    assert torch.equal(picks, select(emulation, variant, features, importance, 100, seed=1))
    in_order = select(emulation, variant, features, importance, 100, sort=True)
    assert torch.equal(picks.sort().values, in_order)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name: str, emulation: ModuleType) -> None:
    features, importance = adversarial(name, 66)
    for seed, variant in enumerate((BY_NAME["mis"], BY_NAME["mis-suppress"], BY_NAME["mis-banded"])):
        picks = select(emulation, variant, features, importance, 50, seed=seed)
        variant.check(features, importance, 50, picks)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65, 127, 129])
def test_sizes_and_budgets(n: int, emulation: ModuleType) -> None:
    variant = BY_NAME["mis-pivots"]
    features, importance = exact(variant, n)
    for k in {0, 1, n}:
        picks = select(emulation, variant, features, importance, k)
        assert torch.equal(picks, variant.define(features, importance, k, sort=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_through_panels(seed: int, emulation: ModuleType) -> None:
    """Each token is decided by the one before it, across words, blocks and panels."""
    features, importance = chain(200)
    variant = Variant("chain", "mis", {"threshold": 0.4})
    picks = select(emulation, variant, features, importance, 200, block=128, seed=seed)
    assert picks.tolist() == list(range(0, 200, 2)) + list(range(1, 200, 2))
    assert select(emulation, variant, features, importance, 37, seed=seed).tolist() == list(range(0, 74, 2))


@pytest.mark.parametrize("proximity", ["chebyshev", "gaussian", "linear"])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_edges_are_those_of_the_definition(proximity: str, alpha: float, emulation: ModuleType) -> None:
    """Thresholds that weights meet exactly, or miss by the last bit."""
    features, importance = signs(80, 64), torch.linspace(1, 0, 80)
    places = raster(features, width=8, frame=40).clone()
    places[40:, 1:] *= 3
    settings = {"radius": 2, "sigma": 2.5, "temporal_radius": 1, "proximity": proximity, "alpha": alpha}
    near = fp.reference.segments.nearness(places, torch.tensor(3), torch.float32, proximity, 2, 2.5, 1)
    cosines = features @ features[3] / 64
    weights = (alpha * cosines + (1 - alpha) * near).unique()
    for threshold in weights[weights < weights.max()][[0, len(weights) // 3, len(weights) // 2, -2]]:
        for limit in (threshold, torch.nextafter(threshold, torch.tensor(-9.0))):
            graph = (alpha, float(limit), "cosine", proximity, 2, 2.5, 1)
            picks, *_ = run(emulation, (features, importance, [60], places, None, *graph, [5], True))
            expected = fp.reference.mis_select(
                features, importance, 60, positions=places, threshold=float(limit), pivots=5, pivots_suppress=True,
                sort=False, **settings,
            )  # fmt: skip
            assert torch.equal(picks, expected)


def test_far_places_and_a_single_one(emulation: ModuleType) -> None:
    """Differences of places beyond 31 bits; a box without extent."""
    features, importance = signs(12, 16).abs(), torch.linspace(1, 0, 12)
    for places in (
        torch.tensor([-(2**31), 2**31 - 1, 0]).int()[torch.arange(36).view(12, 3) * 7 % 5 % 3],
        torch.full((12, 3), 7, dtype=torch.int32),
    ):
        for proximity in ("chebyshev", "gaussian", "linear"):
            for radius in (0, 2**31 - 1):
                graph = (0.5, 0.75, "cosine", proximity, radius, 1e6, radius)
                picks, *_ = run(emulation, (features, importance, [12], places, None, *graph, [0], False))
                expected = fp.reference.mis_select(
                    features, importance, 12, positions=places, alpha=0.5, threshold=0.75, proximity=proximity,
                    radius=radius, sigma=1e6, temporal_radius=radius, sort=False,
                )  # fmt: skip
                assert torch.equal(picks, expected)


@pytest.mark.parametrize("sort", [False, True])
def test_ragged_segments_do_not_depend_on_each_other(sort: bool, emulation: ModuleType) -> None:
    starts, k = [0, 0, 1, 150, 150, 213, 230], [0, 1, 90, 0, 63, 5]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    for variant in (BY_NAME["mis-suppress"], BY_NAME["mis-banded"]):
        features, importance = exact(variant, 230)
        picks = select(emulation, variant, features, importance, k, cu_seqlens, sort, block=128, chunk=64)
        assert torch.equal(picks, variant.define(features, importance, k, cu_seqlens=cu_seqlens, sort=sort))


def test_rows_of_odd_length_in_ragged_segments(emulation: ModuleType) -> None:
    variant = DISTANCES[1]
    features, importance = gaussian(140, 19)
    starts, k = [0, 75, 75, 140], [30, 0, 65]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    picks = select(emulation, variant, features, importance, k, cu_seqlens)
    variant.check(features, importance, k, picks, cu_seqlens=cu_seqlens)
    places = raster(features)
    for (start, end), part, count in zip(pairwise(starts), picks.split(k), k, strict=True):
        if count:
            pivots = variant.params(features, count)["pivots"]
            alone = fp.reference.mis_select(
                features[start:end], importance[start:end], count, positions=places[start:end], sort=False,
                **{**variant.settings, "pivots": pivots},
            )  # fmt: skip
            assert torch.equal(part - start, alone)


def test_more_segments_than_lanes(emulation: ModuleType) -> None:
    variant = BY_NAME["mis"]
    features, importance = exact(variant, 140)
    cu_seqlens = torch.arange(0, 141, 4, dtype=torch.int32)
    picks = select(emulation, variant, features, importance, 3, cu_seqlens)
    assert torch.equal(picks, variant.define(features, importance, 3, cu_seqlens=cu_seqlens, sort=False))


def test_batches_and_strides(emulation: ModuleType) -> None:
    variant = BY_NAME["mis-wide"]
    wide, importance = signs(2, 40, 20), torch.stack([exact(variant, 40, seed=s)[1] for s in (0, 1)])
    for features in (wide[..., :16], wide[..., 3:19], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., :16]):
        expected = variant.define(features, importance, 23, sort=False)
        spread = torch.stack([importance, importance], -1)[..., 0]
        assert torch.equal(select(emulation, variant, features, spread, 23), expected)
        for item in range(2):
            alone = select(emulation, variant, features[item], importance[item], 23)
            assert torch.equal(alone, expected[item])


def test_scores_that_are_no_numbers(emulation: ModuleType) -> None:
    features = torch.ones(6, 16)
    importance = torch.tensor([0.2, 0.6, -math.inf, -0.0, math.nan, 0.0])
    assert select(emulation, BY_NAME["mis"], features, importance, 6).tolist() == [1, 0, 3, 5, 2, 4]


def test_bounds_beyond_the_tokens_stay_inside(emulation: ModuleType) -> None:
    """Values of cu_seqlens cannot be checked on a device without waiting for it."""
    features, importance = gaussian(140, 16)
    graph = (1.0, 0.5, "cosine", "chebyshev", 1, 1.0, 0)
    for bounds, k in (
        ([0, 290], [70]), ([0, 290], [160]), ([-5, 130], [134]), ([30, 10], [20]), ([0, 140, 0, 140], [9, 9, 140])
    ):  # fmt: skip
        starts = torch.tensor(bounds, dtype=torch.int32)
        for sort in (False, True):
            pivots = [0] * len(k)
            picks, *_ = run(emulation, (features, importance, k, None, starts, *graph, pivots, False), sort, block=128)
            assert picks.min() >= 0 and picks.max() < 140


def test_launches(emulation: ModuleType) -> None:
    """Norms and ranks, edges, picks; with more than a chunk their merging; with more than a panel all later ones."""
    features, importance = exact(MIS[0], 300)
    *operands, _ = MIS[0].operands(features, importance, 20)
    assert run(emulation, operands)[1] == 3
    assert run(emulation, operands, chunk=128)[1] == 4
    assert run(emulation, operands, block=128)[1] == 4


def test_memory(emulation: ModuleType) -> None:
    for packed, segments in ((False, 1), (True, 1), (True, 100)):
        for sort in (False, True):
            assert emulation.mis_workspace(65536, segments, packed, sort) <= 64 << 20
    assert emulation.mis_workspace(1 << 20, 500, True, True) < 320 << 20


@pytest.mark.parametrize("k", [20, 130])
def test_sorting_without_shared_memory(k: int, emulation: ModuleType) -> None:
    """As for more tokens than the marks of a block's shared memory."""
    variant = BY_NAME["mis-pivots"]
    features, importance = exact(variant, 150)
    expected = variant.define(features, importance, k)
    picks = select(emulation, variant, features, importance, k, sort=True, block=128, shared_bytes=0)
    assert torch.equal(picks, expected)
    starts = torch.tensor([0, 150], dtype=torch.int32)
    assert torch.equal(select(emulation, variant, features, importance, [k], starts, True, shared_bytes=0), expected)
