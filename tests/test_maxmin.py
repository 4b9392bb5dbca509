import pytest
import torch

import flashprune as fp
from inputs import gaussian, signs


def pick(features: torch.Tensor, k: int, backend: str) -> list[int]:
    return fp.maxmin_select(features, k, sort=False, backend=backend).tolist()


def rows(*flips: int) -> torch.Tensor:
    """Rows of 16 ones with the first so many negated; cosine 1 - |difference| / 8."""
    features = torch.ones(len(flips), 16)
    for row, count in zip(features, flips, strict=True):
        row[:count] = -1
    return features


def test_by_hand(backend: str) -> None:
    # Nearest others are 1, 1, 3, 4 flips away: start at 3; farthest from it 0 (8), then 2 (4), then 1.
    assert pick(rows(0, 1, 4, 8), 4, backend) == [3, 0, 2, 1]


def test_the_first_pick_is_the_loneliest_not_the_first(backend: str) -> None:
    assert pick(rows(0, 2, 0, 2, 9), 1, backend) == [4]


def test_equal_distances_go_by_index(backend: str) -> None:
    assert pick(rows(0, 4, 8, 12, 16), 5, backend) == [0, 4, 2, 1, 3]
    assert pick(rows(8, 8, 8, 8), 4, backend) == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, 1])
def test_a_single_token(k: int, backend: str) -> None:
    assert pick(torch.ones(1, 16), k, backend) == [0][:k]
    assert pick(torch.zeros(1, 16), k, backend) == [0][:k]


def test_opposite_rows_are_farthest(backend: str) -> None:
    assert pick(rows(0, 3, 16, 13), 2, backend) == [0, 2]


def test_zero_rows_are_at_distance_one_even_from_each_other(backend: str) -> None:
    features = rows(0, 0, 1, 1)
    features[1] = 0
    features[3] = 0
    # 1 and 3 have every cosine 0; 0 and 2 are 0.125 apart.
    assert pick(features, 4, backend) == [1, 0, 3, 2]


def test_a_cosine_that_vanishes_in_one_minus_cosine_is_a_tie(backend: str) -> None:
    """Scores are 1 - cosine in float32: cosines of 1e-9 and 2e-9 are the same distance, so the index decides."""
    features = torch.eye(3, 16)
    features[1, 0], features[2, 0] = 2e-9, 1e-9
    assert pick(features, 3, backend) == [0, 1, 2]


def test_many_sizes_against_the_definition(backend: str) -> None:
    for n in (2, 3, 17, 40):
        features = signs(n, 64, seed=n)
        expected = fp.reference.maxmin_select(features.double(), n, sort=False).tolist()
        assert pick(features, n, backend) == expected


def test_scaling_rows_changes_nothing(backend: str) -> None:
    features, _ = gaussian(50, 16)
    powers = 2.0 ** torch.arange(50).remainder(9)
    expected = pick(features, 20, backend)
    assert pick(features * powers[:, None], 20, backend) == expected
