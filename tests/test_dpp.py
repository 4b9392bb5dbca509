import math

import pytest
import torch

import flashprune as fp
from flashprune.reference.segments import DPP_RANK_TOL
from inputs import dyadic, gaussian, hadamard, signs


def pick(*args: object, **settings: object) -> list[int]:
    return fp.dpp_select(*args, sort=False, **settings).tolist()


def brute_force(features: torch.Tensor, relevance: torch.Tensor, k: int) -> list[int]:
    """Greedy MAP by determinants, without a Cholesky factor."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    chosen: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(features)) if i not in chosen]
        sets = [[*chosen, i] for i in rest]
        volumes = [float(torch.linalg.det(kernel[one][:, one])) for one in sets]
        chosen.append(rest[volumes.index(max(volumes))])
    return chosen


def test_picks_have_the_largest_determinant(backend: str) -> None:
    for seed in range(4):
        features, relevance = gaussian(30, 24, seed=seed)
        assert pick(features, relevance, 10, backend=backend) == brute_force(features, relevance, 10)


def test_by_hand(backend: str) -> None:
    features = torch.eye(4, 16)
    features[1] = features[0]  # a twin of the best: no gain left after it
    relevance = torch.tensor([1.0, 0.9, 0.25, 0.5])
    assert pick(features, relevance, 4, backend=backend) == [0, 3, 2, 1]


def test_when_the_rank_is_used_up_relevance_fills(backend: str) -> None:
    """16 directions among 100 tokens: each once, the most relevant of each, then all others by relevance."""
    features, relevance = hadamard(100, 16), dyadic(100)
    picks = pick(features, relevance, 100, backend=backend)
    rank = int(torch.linalg.matrix_rank(features))
    rest = [i for i in range(100) if i not in picks[:rank]]
    assert picks[rank:] == sorted(rest, key=lambda i: (-float(relevance[i]), i))
    assert int(torch.linalg.matrix_rank(features[picks[:rank]])) == rank


def test_random_low_rank(backend: str) -> None:
    features, relevance = gaussian(200, 8)
    picks = pick(features, relevance, 60, backend=backend)
    assert int(torch.linalg.matrix_rank(features[picks[:8]])) == 8
    rest = [i for i in range(200) if i not in picks[:8]]
    assert picks[8:] == sorted(rest, key=lambda i: (-float(relevance[i]), i))[:52]


def test_a_row_without_a_norm_has_no_gain(backend: str) -> None:
    features = torch.eye(5, 16)
    features[0] = 0
    features[1, 3] = math.nan
    relevance = torch.tensor([9.0, 8.0, 0.5, 1.0, 0.25])
    assert pick(features, relevance, 5, backend=backend) == [3, 2, 4, 0, 1]


def test_odd_relevance(backend: str) -> None:
    """Only finite gains above zero count; what is left goes by relevance itself, -inf and NaN last, by index."""
    relevance = torch.tensor([math.nan, 0.0, -1.0, 0.5, math.inf, -math.inf, 0.25])
    assert pick(torch.eye(7, 16), relevance, 7, backend=backend) == [2, 3, 6, 4, 1, 0, 5]


@pytest.mark.parametrize(("factor", "expected"), [(1.5, [0, 1, 2]), (0.67, [0, 2, 1])])
def test_spent_means_a_gain_of_float32_noise(factor: float, expected: list[int], backend: str) -> None:
    """Token 1 is almost token 0: what is left of it lies above, or below, DPP_RANK_TOL of its own entry.

    Token 2 has a smaller gain than either, so it comes last unless token 1 is spent.
    """
    left = DPP_RANK_TOL * factor
    features = torch.zeros(3, 16)
    features[0, 0] = 1
    features[1, 0], features[1, 1] = math.sqrt(1 - left), math.sqrt(left)
    features[2, 2] = 1
    relevance = torch.tensor([1.0, 1.0, 1e-3 if factor > 1 else 1e-4])
    assert pick(features, relevance, 3, backend=backend) == expected


def test_signs_within_the_bound(backend: str) -> None:
    """Many equal cosines: long runs of near-ties."""
    features, relevance = signs(128, 64), dyadic(128)
    picks = fp.dpp_select(features, relevance, 100, sort=False, backend=backend)
    fp.testing.check_selection("dpp", features, relevance, picks=picks).raise_if_bad()
