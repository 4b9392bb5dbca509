"""The CUDA top-k, run on the host emulation, against the definition to the last index."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashprune as fp
from emulated import SEEDS, numbers
from inputs import dyadic

both_orders = pytest.mark.parametrize("sort", [True, False])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
WILD = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5, 0.5, 3e38, -math.nan])


def wild(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    special = WILD[torch.randint(len(WILD), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.5, special, scores)


class Topk:
    """The emulated operator on tensors; counts launches."""

    def __init__(self, emulation: ModuleType) -> None:
        self.emulation, self.launches = emulation, 0

    def __call__(self, scores: Tensor, k: int | list[int], bounds: list[int] | None = None, **more: Any) -> Tensor:
        cu_seqlens = None if bounds is None else np.array(bounds, dtype=np.int32)
        ks = k if isinstance(k, list) else [k]
        picks, self.launches = self.emulation.topk_select(numbers(scores), ks, cu_seqlens, **{"threads": 64} | more)
        return torch.from_numpy(picks)


@pytest.fixture
def topk(emulation: ModuleType) -> Topk:
    return Topk(emulation)


@both_orders
@each_dtype
@pytest.mark.parametrize("n", [1, 31, 33, 64, 129])
def test_any_scores(n: int, dtype: torch.dtype, sort: bool, topk: Topk) -> None:
    for scores in (wild(n, seed=n), dyadic(n), torch.full((n,), -0.0), torch.full((n,), math.nan)):
        scores = scores.to(dtype)
        for k in {0, 1, n // 3, n}:
            assert torch.equal(topk(scores, k, sort=sort), fp.reference.topk_select(scores, k, sort=sort)), k


@both_orders
@pytest.mark.parametrize("threads", [32, 128, 256])
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_and_their_order_do_not_show(seed: int, threads: int, sort: bool, topk: Topk) -> None:
    one_ulp = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(seed)) * torch.finfo(torch.float32).eps
    for scores in (wild(300, seed), dyadic(300, levels=3), one_ulp):
        expected = fp.reference.topk_select(scores, 90, sort=sort)
        assert torch.equal(topk(scores, 90, sort=sort, threads=threads, seed=seed), expected)
        assert topk.launches == 1


@both_orders
def test_the_plan_of_its_own(sort: bool, topk: Topk) -> None:
    scores = wild(700)
    assert torch.equal(topk(scores, 70, sort=sort, threads=0), fp.reference.topk_select(scores, 70, sort=sort))
    assert topk.launches == 1


@both_orders
@pytest.mark.parametrize(("n", "k"), [(2305, 576), (8192, 8192), (30_000, 9000), (65_536, 65_536), (70_000, 3)])
def test_many_scores(n: int, k: int, sort: bool, topk: Topk) -> None:
    for scores in (wild(n), dyadic(n)):
        assert torch.equal(topk(scores, k, sort=sort, threads=0), fp.reference.topk_select(scores, k, sort=sort))
        assert topk.launches == (1 if sort or k <= 8192 else 3)


@both_orders
@pytest.mark.parametrize("k", [1, 64, 65, 200, 300])
def test_scores_that_do_not_fit_and_picks_sorted_in_parts(k: int, sort: bool, topk: Topk) -> None:
    for seed, scores in enumerate((wild(300), dyadic(300, levels=3))):
        expected = fp.reference.topk_select(scores, k, sort=sort)
        for staged, sorted_ in ((100, 512), (300, 64), (100, 64)):
            assert torch.equal(topk(scores, k, sort=sort, staged=staged, sorted=sorted_, seed=seed), expected)
        assert topk.launches == (1 if sort or k <= 64 else 3)


@both_orders
@each_dtype
def test_batches_and_strides(sort: bool, dtype: torch.dtype, topk: Topk) -> None:
    wide = wild(4 * 100).reshape(4, 100).to(dtype)
    for scores in (wide, wide[:, 1:50], wide[::2, ::3], wide[:, :7].T, wide[1:2].expand(3, 100), wide[:0]):
        expected = fp.reference.topk_select(scores, 4, sort=sort)
        assert torch.equal(topk(scores, 4, sort=sort).reshape(expected.shape), expected)


@both_orders
@pytest.mark.parametrize("sorted_", [0, 64])
@pytest.mark.parametrize("ks", [[9, 0, 0, 31, 1, 20], [1] * 6, [0] * 6, [33, 0, 5, 70, 1, 40]])
def test_segments_do_not_see_their_neighbours(ks: list[int], sorted_: int, sort: bool, topk: Topk) -> None:
    sizes = [33, 0 if ks[1] == 0 else 2, 5, 90, 1, 40]
    bounds = [0, *np.cumsum(sizes).tolist()]
    scores = wild(bounds[-1], seed=2)
    for seed in SEEDS:
        got = topk(scores, ks, bounds, sort=sort, sorted=sorted_, staged=64, seed=seed).split(ks)
        for (start, end), k, picks in zip(pairwise(bounds), ks, got, strict=True):
            assert torch.equal(picks - start, fp.reference.topk_select(scores[start:end], k, sort=sort))


def test_packed_scores_apart_in_memory(topk: Topk) -> None:
    scores = wild(3 * 60).reshape(60, 3)[:, 1]
    bounds = torch.tensor([0, 21, 60], dtype=torch.int32)
    expected = fp.reference.topk_select(scores, [7, 13], cu_seqlens=bounds)
    assert torch.equal(topk(scores, [7, 13], bounds.tolist()), expected)


@both_orders
@pytest.mark.parametrize("bounds", [[0, 50, 20], [-9, 70, 99], [10, 10, 10], [60, 0, 60]])
def test_wrong_bounds_stay_in_bounds(bounds: list[int], sort: bool, topk: Topk) -> None:
    picks = topk(wild(60), [30, 9], bounds, sort=sort)
    assert picks.shape == (39,) and int(picks.min()) >= 0 and int(picks.max()) < 60


@pytest.mark.parametrize("count", [0, 1, 512, 1300])
def test_host_ints_reach_the_device(count: int, emulation: ModuleType) -> None:
    assert emulation.host_ints(list(range(count))).tolist() == list(range(count))
