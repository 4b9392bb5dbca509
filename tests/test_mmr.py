import math

import pytest
import torch

import flashprune as fp
from inputs import adversarial, dyadic, gaussian, signs

# Cosines to row 0: 1, 0.5, 0, -0.5, -1 (exact: D = 16).
LADDER = torch.ones(5, 16)
for _row, _flips in enumerate((0, 4, 8, 12, 16)):
    LADDER[_row, :_flips] = -1


def pick(*args: object, **settings: object) -> list[int]:
    return fp.mmr_select(*args, sort=False, **settings).tolist()


def test_by_hand(backend: str) -> None:
    importance = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.5])
    # After 0: 0.25, 0.25, 0.375, 0.75. After 4, whose cosine to row i is minus row 0's: 0.25, 0.25, -0.125.
    assert pick(LADDER, importance, 5, backend=backend) == [0, 4, 1, 2, 3]
    assert pick(LADDER, importance, 2, lam=0.75, backend=backend) == [0, 1]


def test_a_negative_cosine_raises_the_score_after_the_first_pick(backend: str) -> None:
    """Token 4 starts last and becomes second: a bound from before the first pick would pass it over."""
    importance = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.3])
    assert pick(LADDER, importance, 2, backend=backend) == [0, 4]
    features, importance = signs(400, 64), 0.5 + dyadic(400) / 4
    importance[7], importance[399] = 1.0, 0.4  # the first pick, and its opposite as the least important of all
    features[399] = -features[7]
    assert pick(features, importance, 2, backend=backend) == [7, 399]


def test_rounds_do_not_compare_their_own_picks(backend: str) -> None:
    importance = torch.tensor([0.5, 1.0, 1.0, 0.75, 0.25])
    same = torch.ones(5, 16)
    same[4] = -1
    assert pick(same, importance, 5, per_round=2, backend=backend) == [1, 2, 4, 3, 0]
    assert pick(same, importance, 3, per_round=2, backend=backend) == [1, 2, 4]
    assert pick(same, importance, 5, per_round=9, backend=backend) == [1, 2, 3, 0, 4]


@pytest.mark.parametrize("name", ["one ulp", "odd scores", "equal scores", "odd features"])
def test_importance_alone_is_topk(name: str, backend: str) -> None:
    """With lam = 1 the score is the importance itself, so a lead of one ulp decides."""
    features, importance = adversarial(name, 97)
    expected = fp.topk_select(importance, 50, sort=False, backend=backend)
    for settings in ({"lam": 1.0}, {"per_round": 97}):
        assert torch.equal(fp.mmr_select(features, importance, 50, sort=False, backend=backend, **settings), expected)


def test_diversity_alone_with_equal_importance(backend: str) -> None:
    """All scores are equal at first: index 0; then the row farthest from it."""
    assert pick(LADDER, torch.ones(5), 3, lam=0.0, backend=backend) == [0, 4, 2]


def test_invalid_rows_have_cosine_zero(backend: str) -> None:
    features = torch.ones(6, 16)
    features[1] = 0
    features[2, 0] = math.nan
    features[3, 0] = -math.inf
    features[4] = 3e38
    importance = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 0.75])
    # Rows 1 to 4 keep 0.25, above row 5's 0.375 - 0.5.
    assert pick(features, importance, 6, backend=backend) == [0, 1, 2, 3, 4, 5]


def test_scores_of_minus_infinity_still_fill_the_budget(backend: str) -> None:
    importance = torch.tensor([math.nan, 0.5, -math.inf, math.nan, 0.25])
    assert pick(LADDER, importance, 5, backend=backend) == [1, 4, 0, 2, 3]


def test_infinite_importance_wins_whatever_its_cosine(backend: str) -> None:
    importance = torch.tensor([math.inf, 1.0, 0.0, math.inf, 0.0])
    assert pick(LADDER, importance, 3, backend=backend)[:2] == [0, 3]
    # lam = 0 turns infinity into NaN, which counts as -inf.
    assert pick(LADDER, importance, 5, lam=0.0, backend=backend) == [0, 4, 2, 1, 3]


def test_float64_features_are_worked_on_in_float64() -> None:
    features, importance = gaussian(60, 8)
    close = importance.double().round(decimals=1) + torch.arange(60) * 1e-12
    assert pick(features.double(), close, 1, backend="reference") == [int(close.argmax())]
    fp.testing.check_selection(
        "mmr", features.double(), close, picks=fp.reference.mmr_select(features.double(), close, 30, sort=False)
    ).raise_if_bad()


def test_importance_may_have_another_dtype(backend: str) -> None:
    features, importance = signs(64, 16), dyadic(64)
    expected = pick(features, importance, 20, backend=backend)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert pick(features, importance.to(dtype), 20, backend=backend) == expected
