"""The Triton independent set against the definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import mis
from torch import Tensor

import flashprune as fp
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


def select(
    variant: Variant,
    features: Tensor,
    importance: Tensor,
    k: int | list[int],
    device: torch.device,
    cu_seqlens: Tensor | None = None,
    sort: bool = False,
    panel_words: int | None = None,
) -> Tensor:
    *operands, _ = variant.operands(features, importance, k, cu_seqlens=cu_seqlens)
    operands = [x.to(device) if isinstance(x, Tensor) else x for x in operands]
    return mis.mis_select(*operands, sort, panel_words).cpu()


@pytest.mark.parametrize("variant", MIS, ids=lambda v: v.name)
def test_exact_features_give_the_picks_of_the_definition(variant: Variant, device: torch.device) -> None:
    features, importance = exact(variant, 100)
    for k, words in ((30, None), (100, 2)):
        picks = select(variant, features, importance, k, device, panel_words=words)
        assert torch.equal(picks, variant.define(features, importance, k, sort=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [BY_NAME["mis"], *DISTANCES], ids=lambda v: v.name)
def test_any_features(variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    features, importance = gaussian(90, 24)
    features, importance = (features + 0.4).to(dtype), importance.to(dtype)
    picks = select(variant, features, importance, 70, device, panel_words=2)
    variant.check(features, importance, 70, picks)
    assert torch.equal(picks, select(variant, features, importance, 70, device))
    assert torch.equal(picks.sort().values, select(variant, features, importance, 70, device, sort=True))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name: str, device: torch.device) -> None:
    features, importance = adversarial(name, 66)
    for variant in (BY_NAME["mis"], BY_NAME["mis-suppress"]):
        picks = select(variant, features, importance, 50, device)
        variant.check(features, importance, 50, picks)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65])
def test_sizes_and_budgets(n: int, device: torch.device) -> None:
    variant = BY_NAME["mis-pivots"]
    features, importance = exact(variant, n)
    for k in {0, 1, n}:
        picks = select(variant, features, importance, k, device)
        assert torch.equal(picks, variant.define(features, importance, k, sort=False))


def test_a_chain_through_panels(device: torch.device) -> None:
    """Each token is decided by the one before it, across words and panels."""
    features, importance = chain(140)
    picks = select(Variant("chain", "mis", {"threshold": 0.4}), features, importance, 140, device, panel_words=2)
    assert picks.tolist() == list(range(0, 140, 2)) + list(range(1, 140, 2))


@pytest.mark.parametrize("sort", [False, True])
def test_ragged_segments_do_not_depend_on_each_other(sort: bool, device: torch.device) -> None:
    variant = BY_NAME["mis-suppress"]
    features, importance = exact(variant, 150)
    starts, k = [0, 0, 1, 70, 70, 133, 150], [0, 1, 40, 0, 63, 5]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    picks = select(variant, features, importance, k, device, cu_seqlens, sort, 2)
    assert torch.equal(picks, variant.define(features, importance, k, cu_seqlens=cu_seqlens, sort=sort))


def test_rows_of_odd_length_in_ragged_segments(device: torch.device) -> None:
    variant = DISTANCES[1]
    features, importance = gaussian(140, 19)
    starts, k = [0, 75, 75, 140], [30, 0, 65]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    picks = select(variant, features, importance, k, device, cu_seqlens)
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


def test_batches_and_strides(device: torch.device) -> None:
    variant = BY_NAME["mis-wide"]
    wide, importance = signs(2, 40, 20), torch.stack([exact(variant, 40, seed=s)[1] for s in (0, 1)])
    for features in (wide[..., :16], wide[..., 3:19], wide.mT.contiguous().mT[..., :16]):
        expected = variant.define(features, importance, 23, sort=False)
        assert torch.equal(select(variant, features, importance, 23, device), expected)
        for item in range(2):
            alone = select(variant, features[item], importance[item], 23, device)
            assert torch.equal(alone, expected[item])
    assert select(variant, features[:0], importance[:0], 3, device).shape == (0, 3)


def test_scores_that_are_no_numbers(device: torch.device) -> None:
    features = torch.ones(6, 16)
    importance = torch.tensor([0.2, 0.6, -math.inf, -0.0, math.nan, 0.0])
    picks = select(BY_NAME["mis"], features, importance, 6, device)
    assert picks.tolist() == [1, 0, 3, 5, 2, 4]


def test_bounds_beyond_the_tokens_stay_inside(device: torch.device) -> None:
    """Values of cu_seqlens cannot be checked on a device without waiting for it."""
    features, importance = gaussian(40, 16)
    for bounds, k in (([0, 90], 20), ([0, 90], 60), ([-5, 30], 34), ([30, 10], 20)):
        starts = torch.tensor(bounds, dtype=torch.int32, device=device)
        picks = mis.mis_select(
            features.to(device), importance.to(device), [k], None, starts, 1.0, 0.5, "cosine", "chebyshev", 1, 1.0,
            0, [0], False, True,
        )  # fmt: skip
        assert picks.min() >= 0 and picks.max() < 40
