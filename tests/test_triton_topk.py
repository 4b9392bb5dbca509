"""Top-k in Triton against the definition, to the last index."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from flashprune.triton_kernels import configs
from flashprune.triton_kernels.topk import topk_select

import flashprune as fp
from inputs import dyadic

both_orders = pytest.mark.parametrize("sort", [True, False])
WILD = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5, 0.5, 3e38, -math.nan])

BLOCK = configs.choose("topk", "fp32", "consumer")["BLOCK"]


def wild(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    special = WILD[torch.randint(len(WILD), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.5, special, scores)


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 31, 33, 64, 129])
def test_any_scores(n: int, dtype: torch.dtype, sort: bool, device: torch.device) -> None:
    for scores in (wild(n, seed=n), dyadic(n), torch.full((n,), -0.0), torch.full((n,), math.nan)):
        scores = scores.to(dtype)
        for k in {0, 1, n // 3, n}:
            expected = fp.reference.topk_select(scores, k, sort=sort)
            assert torch.equal(topk_select(scores.to(device), [k], None, sort).cpu(), expected), k


@both_orders
@pytest.mark.parametrize("n", [BLOCK, 2 * BLOCK + 5])
def test_more_than_one_step(n: int, sort: bool, device: torch.device) -> None:
    for scores in (wild(n), dyadic(n, levels=3), 1 + torch.randperm(n) * torch.finfo(torch.float32).eps):
        expected = fp.reference.topk_select(scores, 300, sort=sort)
        assert torch.equal(topk_select(scores.to(device), [300], None, sort).cpu(), expected)


@both_orders
def test_batches_and_strides(sort: bool, device: torch.device) -> None:
    wide = wild(4 * 200).reshape(4, 200).to(device)
    for scores in (wide, wide[:, 1:150], wide[::2, ::3], wide[:, :7].T, wide[1:2].expand(3, 200)):
        expected = fp.reference.topk_select(scores, 4, sort=sort)
        assert torch.equal(topk_select(scores, [4], None, sort), expected)
    assert topk_select(wide[:0], [4], None, sort).shape == (0, 4)


@both_orders
@pytest.mark.parametrize("ks", [[9, 0, 0, 31, 1, 20], [1] * 6, [0, 0, 0, 0, 0, 0], [33, 0, 5, 64, 1, 40]])
def test_segments_do_not_see_their_neighbours(ks: list[int], sort: bool, device: torch.device) -> None:
    sizes = [33, 0 if ks[1] == 0 else 2, 5, 64, 1, 40]
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    scores = wild(bounds[-1], seed=2).to(device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    got = topk_select(scores, ks, cu_seqlens, sort).split(ks)
    for (start, end), k, picks in zip(pairwise(bounds), ks, got, strict=True):
        assert torch.equal(picks, start + topk_select(scores[start:end], [k], None, sort))
        assert torch.equal(picks - start, fp.reference.topk_select(scores[start:end], k, sort=sort))


@pytest.mark.parametrize("bounds", [[0, 50, 20], [-9, 70, 99], [10, 10, 10]])
def test_wrong_bounds_stay_in_bounds(bounds: list[int], device: torch.device) -> None:
    scores = wild(60).to(device)
    picks = topk_select(scores, [30, 9], torch.tensor(bounds, dtype=torch.int32, device=device), False)
    assert picks.shape == (39,) and int(picks.min()) >= 0 and int(picks.max()) < 60


def test_many_budgets_reach_the_device(device: torch.device) -> None:
    from flashprune.triton_kernels.host_ints import budget_starts

    ks = list(range(20))
    assert budget_starts(ks, device).tolist() == [0, *torch.tensor(ks).cumsum(0).tolist()]
    assert budget_starts([7, 7, 7], device).tolist() == [0, 7, 14, 21]
