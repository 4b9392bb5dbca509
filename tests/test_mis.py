import math

import pytest
import torch

import flashprune as fp
from flashprune import grids
from inputs import VARIANTS, chain, dyadic, exact, gaussian, raster, signs

MIS = [variant for variant in VARIANTS if variant.method == "mis"]


def pick(*args: object, **settings: object) -> list[int]:
    return fp.mis_select(*args, sort=False, **settings).tolist()


@pytest.mark.parametrize("variant", MIS, ids=lambda v: v.name)
@pytest.mark.parametrize("k", [5, 40, 150])
def test_the_property_that_defines_it(variant: object, k: int, backend: str) -> None:
    """No two of the set are adjacent; whoever was struck has a kept neighbour before it; filling goes by importance."""
    features, importance = exact(variant, 150)
    params = variant.params(features, k)
    picks = pick(features, importance, k, backend=backend, **params)
    edges = adjacency(features, **params)
    order = sorted(range(150), key=lambda i: (-float(importance[i]), i))
    rank = {token: place for place, token in enumerate(order)}
    pivots = params.get("pivots", 0)
    assert picks[:pivots] == order[:pivots]
    strikers = picks[:pivots] if params.get("pivots_suppress") else []

    independent = []
    for token in picks[pivots:]:
        before = [i for i in strikers + independent if edges[i, token]]
        if before or (independent and rank[token] < rank[independent[-1]]):
            break
        independent.append(token)
    filling = picks[pivots + len(independent) :]
    if filling:
        outside = [i for i in order if i not in picks[: pivots + len(independent)]]
        assert filling == outside[: len(filling)]
    reached = 150 if filling or len(picks) < k else rank[independent[-1]]
    for token in order[pivots:reached]:
        if token not in independent:
            assert any(edges[i, token] and (i in strikers or rank[i] < rank[token]) for i in strikers + independent)


def adjacency(
    features: torch.Tensor,
    positions: torch.Tensor | None = None,
    alpha: float = 1.0,
    threshold: float = 0.8,
    similarity: str = "cosine",
    radius: int = 1,
    temporal_radius: int = 0,
    **_: object,
) -> torch.Tensor:
    """The whole graph, N x N, chebyshev proximity only."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    weights = unit @ unit.T if similarity == "cosine" else (1 + unit @ unit.T) / 2
    if positions is not None:
        gaps = (positions[:, None] - positions[None]).abs()
        near = (gaps[..., 1:].amax(-1) <= radius) & (gaps[..., 0] <= temporal_radius)
        weights = alpha * weights + (1 - alpha) * near
    return weights > threshold


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, [0, 1]), (0.4999999, [0, 2])])
def test_an_edge_weighs_strictly_more_than_the_threshold(threshold: float, expected: list[int], backend: str) -> None:
    features = torch.ones(3, 16)
    features[1, :4] = -1  # cosine to row 0 is exactly 0.5
    features[2, :8] = -1
    importance = torch.tensor([1.0, 0.9, 0.8])
    assert pick(features, importance, 2, threshold=threshold, backend=backend) == expected
    half = (1 + threshold) / 2
    assert pick(features, importance, 2, threshold=half, similarity="half_cosine", backend=backend) == expected


@pytest.mark.parametrize("n", [64, 300])
def test_a_chain_in_order_of_importance(n: int, backend: str) -> None:
    """Every second token is kept, each decided by the one before: N / 2 rounds for a parallel sweep."""
    features, importance = chain(n)
    half = (n + 1) // 2
    assert pick(features, importance, half, threshold=0.4, backend=backend) == list(range(0, n, 2))
    everything = pick(features, importance, n, threshold=0.4, backend=backend)
    assert everything == list(range(0, n, 2)) + list(range(1, n, 2))


def test_filling_ignores_edges_and_goes_by_importance(backend: str) -> None:
    features, importance = torch.ones(6, 16), torch.tensor([0.2, 0.6, 0.4, 0.6, math.nan, 0.5])
    assert pick(features, importance, 6, backend=backend) == [1, 3, 5, 2, 0, 4]
    assert pick(features, importance, 3, backend=backend) == [1, 3, 5]


def test_pivots_stand_outside_the_graph_unless_they_suppress(backend: str) -> None:
    features = torch.eye(6, 16)
    features[1] = features[0]
    features[3] = features[2]
    importance = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert pick(features, importance, 4, backend=backend) == [0, 2, 4, 5]
    assert pick(features, importance, 4, pivots=2, backend=backend) == [0, 1, 2, 4]
    assert pick(features, importance, 4, pivots=1, backend=backend) == [0, 1, 2, 4]
    assert pick(features, importance, 4, pivots=1, pivots_suppress=True, backend=backend) == [0, 2, 4, 5]
    assert pick(features, importance, 4, pivots=4, backend=backend) == [0, 1, 2, 3]
    assert pick(features, importance, 6, pivots=3, pivots_suppress=True, backend=backend) == [0, 1, 2, 4, 5, 3]


def test_each_term_alone_makes_no_edge(backend: str) -> None:
    """With alpha 0.5 and threshold 0.8 both terms must be high: neither twins far apart nor strangers side by side."""
    features = torch.eye(4, 16)
    features[2] = features[0]
    importance = torch.tensor([1.0, 0.9, 0.8, 0.7])
    apart = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 9, 9], [0, 5, 5]], dtype=torch.int32)
    assert pick(features, importance, 3, alpha=0.5, positions=apart, backend=backend) == [0, 1, 2]
    beside = apart.clone()
    beside[2] = torch.tensor([0, 1, 0])
    assert pick(features, importance, 3, alpha=0.5, positions=beside, backend=backend) == [0, 1, 3]
    later = beside.clone()
    later[2, 0] = 1  # the next frame
    assert pick(features, importance, 3, alpha=0.5, positions=later, backend=backend) == [0, 1, 2]
    assert pick(features, importance, 3, alpha=0.5, positions=later, temporal_radius=1, backend=backend) == [0, 1, 3]


@pytest.mark.parametrize(
    ("proximity", "settings", "distance"),
    [
        ("chebyshev", {"radius": 0}, 0),
        ("chebyshev", {"radius": 3}, 3),
        ("gaussian", {"sigma": 1.0}, 1),  # exp(-d² / 2) > 0.5 up to d = 1.17
        ("gaussian", {"sigma": 3.0}, 3),  # d = 3.53
        ("linear", {}, 5),  # 1 - d / 11 > 0.5 up to 5.5
    ],
)
def test_reach_of_each_proximity(proximity: str, settings: dict, distance: int, backend: str) -> None:
    """Twins on a line: token 0 strikes just those within reach."""
    n = 12
    features, importance = torch.ones(n, 16), torch.linspace(1, 0.5, n)
    line = {"grid": (1, n), "alpha": 0.5, "threshold": 0.75, "proximity": proximity, **settings}
    picks = pick(features, importance, n, backend=backend, **line)
    independent = list(range(0, n, distance + 1))
    assert picks == independent + [i for i in range(n) if i not in independent]


def test_linear_proximity_of_a_single_place_is_one(backend: str) -> None:
    """The diagonal of the box is 0."""
    features, importance = torch.ones(3, 16), torch.tensor([1.0, 0.9, 0.8])
    same = torch.tensor([[0, 2, 2], [0, 2, 2], [1, 2, 2]], dtype=torch.int32)
    settings = {"positions": same, "alpha": 0.5, "threshold": 0.9, "proximity": "linear"}
    assert pick(features, importance, 2, backend=backend, **settings) == [0, 2]
    assert pick(features, importance, 2, temporal_radius=1, backend=backend, **settings) == [0, 1]


def test_negative_positions_in_a_banded_graph(backend: str) -> None:
    """Cells of a banded graph must round towards minus infinity."""
    features, importance = signs(300, 16), dyadic(300)
    settings = {"alpha": 0.5, "threshold": 0.6, "radius": 1}
    places = raster(features, width=20, frame=400)
    expected = pick(features, importance, 300, positions=places, backend="reference", **settings)
    for shift in (-3, -10, 100_000):
        moved = places + torch.tensor([0, shift, shift - 4], dtype=torch.int32)
        assert pick(features, importance, 300, positions=moved, backend=backend, **settings) == expected


@pytest.mark.parametrize("sort", [False, True])
def test_grids_are_positions(sort: bool, backend: str) -> None:
    features, importance = gaussian(2, 24, 16)
    settings = {"alpha": 0.5, "threshold": 0.3, "sort": sort, "backend": backend}
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).int()

    def same(
        first: dict, second: dict, x: torch.Tensor, scores: torch.Tensor, k: int | list[int], **more: object
    ) -> None:
        one, two = (fp.mis_select(x, scores, k, **form, **settings, **more) for form in (first, second))
        assert torch.equal(one, two)

    same({"grid": (2, 3, 4)}, {"positions": places}, features[0], importance[0], 9)
    same({"grid": [(2, 3, 4)]}, {"positions": places}, features[0], importance[0], 9)
    same({"grid": (2, 3, 4)}, {"positions": places.expand(2, -1, -1)}, features, importance, 9)
    flat = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6)).int()
    same({"grid": [(2, 3, 4), (4, 6)]}, {"positions": torch.stack([places, flat])}, features, importance, 9)
    cu_seqlens = torch.tensor([0, 24, 24, 48], dtype=torch.int32)[[0, 1, 3]]
    packed = features.flatten(0, 1), importance.flatten()
    both = {"positions": torch.cat([places, flat])}
    same({"grid": [(2, 3, 4), (4, 6)]}, both, *packed, [9, 4], cu_seqlens=cu_seqlens)
    same({"grid": (4, 6)}, {"positions": flat.repeat(2, 1)}, *packed, 9, cu_seqlens=cu_seqlens)


def test_similarity_alone_ignores_a_grid(backend: str) -> None:
    features, importance = gaussian(24, 8)
    with_grid = fp.mis_select(features, importance, 9, threshold=0.3, grid=(4, 6), backend=backend)
    assert torch.equal(with_grid, fp.mis_select(features, importance, 9, threshold=0.3, backend=backend))


@pytest.mark.parametrize("packed", [False, True])
def test_a_lattice_is_made_once_for_each_grid(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments may be a hundred thousand."""
    made, lattice = [], grids.lattice
    monkeypatch.setattr(grids, "lattice", lambda sides, device: made.append(sides) or lattice(sides, device))
    few = [(2, 3), (3, 2)] * 50
    bounds = torch.arange(0, 601, 6, dtype=torch.int32) if packed else None
    tokens = torch.empty(600) if packed else torch.empty(100, 6)
    for grid in ((2, 3), few):
        found = grids.token_positions(tokens, grid, None, bounds)
        each = few if grid is few else [grid] * 100
        expected = torch.cat([lattice((1, *sides), tokens.device) for sides in each]).view(*tokens.shape, 3)
        assert torch.equal(found, expected)
    assert sorted(made) == [(1, 2, 3), (1, 2, 3), (1, 3, 2)]
