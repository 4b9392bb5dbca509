"""check_selection passes what is right, within rounding, and catches what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from flashprune.testing import Report, check_selection
from inputs import DISTANCES, VARIANTS, Variant, chain, gaussian

every_variant = pytest.mark.parametrize("variant", VARIANTS + DISTANCES, ids=lambda v: v.name)


def report(variant: Variant, features: Tensor, importance: Tensor, k: Any, picks: Tensor, **more: Any) -> Report:
    tensors, params = variant.tensors(features, importance), variant.params(features, k)
    return check_selection(variant.method, *tensors, picks=picks, k=k, **params, **more)


@every_variant
def test_the_definition_passes_and_a_planted_pick_does_not(variant: Variant) -> None:
    features, importance = gaussian(80, 24)
    picks = variant.define(features, importance, 40, sort=False)
    right = report(variant, features, importance, 40, picks)
    assert right.ok and right.largest_regret <= right.bound
    right.raise_if_bad()
    left_out = next(i for i in importance.argsort().tolist() if i not in picks)
    for step in (0, 7, 20, 39):
        planted = picks.clone()
        planted[step] = left_out
        wrong = report(variant, features, importance, 40, planted)
        assert not wrong.ok, f"step {step}"
        assert wrong.largest_regret > wrong.bound
        with pytest.raises(AssertionError, match=f"^{variant.method}: segment 0, step "):
            wrong.raise_if_bad()


@every_variant
def test_the_right_set_in_the_wrong_order(variant: Variant) -> None:
    features, importance = gaussian(80, 24)
    picks = variant.define(features, importance, 40, sort=False)
    assert not report(variant, features, importance, 40, picks.flip(0)).ok
    picks[[2, 3]] = picks[[3, 2]]
    wrong = report(variant, features, importance, 40, picks)
    # Two tokens of one round may change places only with each other's index; everything else is an order.
    assert not wrong.ok
    assert wrong.step in (2, 3)


@every_variant
def test_it_says_where_in_a_packed_batch(variant: Variant) -> None:
    features, importance = gaussian(120, 24)
    cu_seqlens, ks = torch.tensor([0, 50, 50, 120], dtype=torch.int32), [20, 0, 30]
    picks = variant.define(features, importance, ks, cu_seqlens=cu_seqlens, sort=False)
    assert report(variant, features, importance, ks, picks, cu_seqlens=cu_seqlens).ok
    if "pivots" not in variant.settings:  # a share of k, so k must be known
        tensors, params = variant.tensors(features, importance), variant.params(features, ks)
        assert check_selection(variant.method, *tensors, picks=picks, cu_seqlens=cu_seqlens, **params).ok
    picks[[25, 26]] = picks[[26, 25]]
    wrong = report(variant, features, importance, ks, picks, cu_seqlens=cu_seqlens)
    assert not wrong.ok
    assert (wrong.segment, wrong.step) in ((2, 5), (2, 6))


@every_variant
def test_batches(variant: Variant) -> None:
    features, importance = gaussian(3, 40, 24)
    picks = variant.define(features, importance, 12, sort=False)
    assert report(variant, features, importance, 12, picks).ok
    picks[1] = picks[1].flip(0)
    wrong = report(variant, features, importance, 12, picks)
    assert not wrong.ok and wrong.segment == 1


@pytest.mark.parametrize(
    ("name", "claimed", "actual"),
    [
        ("mmr", {"lam": 0.5}, {"lam": 0.49}),
        ("mmr", {"per_round": 1}, {"per_round": 2}),
        ("mis", {"threshold": 0.2}, {"threshold": 0.21}),
        ("mis", {"similarity": "cosine"}, {"similarity": "half_cosine"}),
        ("mis", {"threshold": 0.2}, {"threshold": 0.2, "pivots": 9}),
        ("mis", {"pivots": 9, "threshold": 0.2}, {"pivots": 9, "threshold": 0.2, "pivots_suppress": True}),
        ("mis", {"alpha": 0.5, "threshold": 0.5}, {"alpha": 0.5, "threshold": 0.5, "radius": 2}),
        ("mis", {"alpha": 0.5, "threshold": 0.5}, {"alpha": 0.5, "threshold": 0.5, "proximity": "linear"}),
    ],
)
def test_picks_of_other_settings(name: str, claimed: dict[str, Any], actual: dict[str, Any]) -> None:
    features, importance = gaussian(400, 16)
    grid = {"grid": (20, 20)} if name == "mis" else {}
    select = getattr(fp.reference, f"{name}_select")
    picks = select(features, importance, 150, sort=False, **actual, **grid)
    assert check_selection(name, features, importance, picks=picks, **actual, **grid).ok
    assert not check_selection(name, features, importance, picks=picks, **claimed, **grid).ok


def test_a_tie_by_index_where_nothing_is_computed() -> None:
    scores = torch.tensor([0.5, 1.0, 1.0, 0.0, -0.0, math.nan, -math.inf])
    for picks, ok in (([1, 2, 0, 3, 4, 5, 6], True), ([2, 1, 0, 3, 4, 5, 6], False), ([1, 2, 0, 4, 3, 5, 6], False),
                      ([1, 2, 0, 3, 4, 6, 5], False)):  # fmt: skip
        assert check_selection("topk", scores, picks=torch.tensor(picks)).ok is ok
        features = torch.eye(7)
        assert check_selection("mmr", features, scores, picks=torch.tensor(picks), per_round=7).ok is ok
        assert check_selection("mis", features, scores, picks=torch.tensor(picks)).ok is ok
    assert check_selection("topk", scores, picks=torch.tensor([1, 2]), sort=True).ok
    assert "token 2" in check_selection("topk", scores, picks=torch.tensor([0, 1]), sort=True).message


@pytest.mark.parametrize(("lead", "ok"), [(0.0, True), (1e-8, True), (1e-4, False)])
def test_rounding_excuses_a_near_tie_and_no_more(lead: float, ok: bool) -> None:
    """After pick 0, token 1 leads token 2 by a little of its cosine."""
    features = torch.eye(3, 16, dtype=torch.float32)
    features[1, 0], features[2, 0] = 0.5, 0.5 + 2 * lead
    importance = torch.tensor([1.0, 0.5, 0.5])
    found = check_selection("mmr", features, importance, picks=torch.tensor([0, 2, 1]))
    assert found.ok is ok
    if lead == 1e-4:
        assert found.step == 1 and 1e-5 < found.largest_regret < 1e-3 and found.bound < 1e-5


def test_dpp_bound_stays_far_below_the_gains() -> None:
    """A bound that grows with every pick would excuse anything."""
    features, relevance = gaussian(400, 256)
    picks = fp.reference.dpp_select(features, relevance, 200, sort=False)
    late = picks.clone()
    late[[195, 199]] = late[[199, 195]]
    found = check_selection("dpp", features, relevance, picks=late)
    assert not found.ok and found.step == 195 and found.bound < 1e-4


def test_dpp_spent_tokens() -> None:
    features = torch.eye(4, 16)
    features[1] = features[0]
    relevance = torch.tensor([1.0, 0.9, 0.25, 0.5])
    for picks, ok in (([0, 3, 2, 1], True), ([0, 1, 3, 2], False), ([0, 3, 1, 2], False), ([0, 2, 3, 1], False)):
        assert check_selection("dpp", features, relevance, picks=torch.tensor(picks)).ok is ok
    features[:] = 0
    for picks, ok in (([0, 1, 3, 2], True), ([0, 1, 2, 3], False)):
        found = check_selection("dpp", features, relevance, picks=torch.tensor(picks))
        assert found.ok is ok
    assert "relevance" in found.message


@pytest.mark.parametrize(
    ("picks", "in_order", "as_set", "says"),
    [
        ([0, 2, 4], True, True, "every pick is the best"),
        ([0, 1, 2], False, False, ""),  # 1 is a neighbour of 0
        ([0, 4, 2], False, True, "token 2 has no kept neighbour"),
        ([0, 2, 5], False, False, "token 4 has no kept neighbour"),
        ([1, 3, 5], False, False, "token 0 has no kept neighbour"),
        ([0, 2, 4, 6, 1], True, True, ""),  # the filling starts with the most important
        ([0, 2, 4, 6, 3], False, False, "1"),
        ([0, 2, 4, 6, 1, 5], False, False, "3"),
    ],
)
def test_mis_by_hand(picks: list[int], in_order: bool, as_set: bool, says: str) -> None:
    features, importance = chain(7)
    found = check_selection("mis", features, importance, picks=torch.tensor(picks), threshold=0.4)
    assert found.ok is in_order
    assert in_order or says in found.message
    ascending = torch.tensor(sorted(picks))
    found = check_selection("mis", features, importance, picks=ascending, threshold=0.4, sort=True)
    assert found.ok is as_set


@pytest.mark.parametrize("variant", [v for v in VARIANTS + DISTANCES if v.method == "mis"], ids=lambda v: v.name)
def test_mis_sets(variant: Variant) -> None:
    features, importance = gaussian(120, 12)
    for k in (0, 1, 30, 60, 110, 120):
        picks = variant.define(features, importance, k)
        assert report(variant, features, importance, k, picks, sort=True).ok
    picks = variant.define(features, importance, 60)
    for step in (0, 20, 59):
        outside = next(i for i in importance.argsort().tolist() if i not in picks)
        planted = picks.clone()
        planted[step] = outside
        assert not report(variant, features, importance, 60, planted.sort().values, sort=True).ok


def test_mis_edges_at_the_threshold_may_go_either_way() -> None:
    features = torch.eye(3, 16)
    features[1] = torch.tensor([0.6, 0.8] + [0.0] * 14)  # cosine to row 0: 0.6 as near as float32 has it
    importance = torch.tensor([1.0, 0.9, 0.8])
    for picks, step in (([0, 1], 1), ([0, 2], 1)):
        for threshold in (0.6, 0.6 + 5e-7, 0.6 - 5e-7):
            found = check_selection("mis", features, importance, picks=torch.tensor(picks), threshold=threshold)
            assert found.ok
            assert found.step in (-1, step) and found.largest_regret < 1e-6
    for picks, threshold in (([0, 1], 0.599), ([0, 2], 0.601)):
        for sort in (False, True):
            found = check_selection(
                "mis", features, importance, picks=torch.tensor(picks), threshold=threshold, sort=sort
            )
            assert not found.ok and found.largest_regret > 0.99e-3


def test_validity_of_a_row_is_that_of_the_working_precision() -> None:
    """A norm that overflows float32 is finite in float64."""
    features, importance = torch.ones(3, 16), torch.tensor([1.0, 0.9, 0.8])
    features[1] *= 1e25
    picks = torch.tensor([0, 1, 2])
    assert check_selection("mmr", features, importance, picks=picks).ok
    assert not check_selection("mmr", features.double(), importance.double(), picks=picks[[0, 2, 1]]).ok
    assert check_selection("mmr", features.double(), importance.double(), picks=picks).ok


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        (torch.tensor([0, 3, 3]), "a token is picked twice"),
        (torch.tensor([0, 1, 9]), "pick 9 is outside its 9 tokens"),
        (torch.tensor([0, -1, 2]), "pick -1 is outside its 9 tokens"),
        (torch.tensor([0, 1]), "picks must be [3], got [2]"),
        (torch.tensor([[0, 1, 2]]), "picks must be [3], got [1, 3]"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "picks must be int64, got torch.int32"),
    ],
)
def test_malformed_picks(picks: Tensor, message: str) -> None:
    features, importance = gaussian(9, 4)
    for method, tensors in (("topk", (importance,)), ("maxmin", (features,)), ("dpp", (features, importance))):
        found = check_selection(method, *tensors, picks=picks, k=3)
        assert not found.ok and message in found.message and found.largest_regret == math.inf


def test_malformed_sets_and_segments() -> None:
    scores, cu_seqlens = torch.rand(9), torch.tensor([0, 4, 9], dtype=torch.int32)
    unsorted = check_selection("topk", scores, picks=scores.argsort(descending=True), sort=True)
    assert "not ascending" in unsorted.message
    elsewhere = check_selection("topk", scores, picks=torch.tensor([5, 6]), k=1, cu_seqlens=cu_seqlens)
    assert "segment 0: pick 5 is outside its 4 tokens" in elsewhere.message


def test_wrong_calls() -> None:
    features, importance = gaussian(9, 4)
    picks = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="method must be one of"):
        check_selection("nms", features, picks=picks)
    with pytest.raises(ValueError, match="mmr is replayed in pick order, so sort must be False, got True"):
        check_selection("mmr", features, importance, picks=picks, sort=True)
    with pytest.raises(TypeError, match="lambda_"):
        check_selection("mmr", features, importance, picks=picks, lambda_=0.5)
    with pytest.raises(ValueError, match="lam=2"):
        check_selection("mmr", features, importance, picks=picks, lam=2)
    with pytest.raises(ValueError, match="k=10 exceeds N=9"):
        check_selection("mmr", features, importance, picks=picks, k=10)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.method != "topk"], ids=lambda v: v.name)
def test_float64_selections_are_held_to_float64(variant: Variant) -> None:
    features, importance = (x.double() for x in gaussian(60, 12))
    picks = variant.define(features, importance, 30, sort=False)
    assert report(variant, features, importance, 30, picks).ok
    assert report(variant, features, importance, 30, picks).bound < 1e-12
