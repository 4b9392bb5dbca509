"""The CUDA max-min on the host emulation, against the definition."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from emulated import SEEDS, lengths, numbers
from inputs import ADVERSARIAL, adversarial, gaussian, signs


@pytest.fixture(params=[False, True], ids=["computed", "stored"])
def maxmin(request: pytest.FixtureRequest, emulation: ModuleType) -> Any:
    """With cosines computed when they are needed, and with a stored matrix of them."""

    def select(
        features: Tensor, k: list[int], cu_seqlens: Tensor | None = None, sort: bool = False, **how: int
    ) -> Tensor:
        spans = None if cu_seqlens is None else cu_seqlens.numpy()
        how = {"stored": request.param} | how
        return torch.from_numpy(emulation.maxmin_select(numbers(features), k, spans, sort, **how))

    return select


def defined(features: Tensor, k: int | list[int], **settings: Any) -> Tensor:
    return fp.reference.maxmin_select(features.double(), k, sort=False, **settings).flatten()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n, k", [(1, 1), (2, 2), (31, 31), (33, 9), (64, 40), (129, 50)])
def test_exact(maxmin: Any, n: int, k: int, blocks: int) -> None:
    features = lengths(signs(n, 16, seed=n))
    expected = defined(features, k)
    for seed in SEEDS:
        assert maxmin(features, [k], seed=seed, blocks=blocks).equal(expected)
    assert maxmin(features, [k], sort=True, blocks=blocks).equal(expected.sort().values)


def test_every_size_of_block_and_team_gives_the_same_picks(maxmin: Any) -> None:
    features = lengths(signs(150, 16))
    expected = defined(features, 40)
    for block, blocks, threads in ((1, 1, 64), (7, 2, 32), (33, 5, 32), (0, 4, 128)):
        assert maxmin(features, [40], block=block, blocks=blocks, threads=threads, seed=9).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_within_rounding(maxmin: Any, dtype: torch.dtype, blocks: int) -> None:
    features = gaussian(90, 72)[0].to(dtype)
    picks = maxmin(features, [40], blocks=blocks)
    fp.testing.check_selection("maxmin", features, picks=picks, k=40).raise_if_bad()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(maxmin: Any, name: str) -> None:
    features, _ = adversarial(name, 70)
    for seed, blocks in ((0, 1), (1, 3)):
        picks = maxmin(features, [35], seed=seed, blocks=blocks)
        fp.testing.check_selection("maxmin", features, picks=picks, k=35).raise_if_bad()


@pytest.mark.parametrize("blocks", [1, 3, 14])
def test_packed_segments(maxmin: Any, blocks: int) -> None:
    sizes, ks = [0, 40, 1, 0, 35, 7], [0, 12, 1, 0, 9, 0]
    features = signs(sum(sizes), 16)
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    expected = defined(features, ks, cu_seqlens=cu_seqlens)
    for seed in SEEDS:
        assert maxmin(features, ks, cu_seqlens, seed=seed, blocks=blocks).equal(expected)
    ascending = torch.cat([x.sort().values for x in expected.split(ks)])
    assert maxmin(features, ks, cu_seqlens, sort=True, blocks=blocks).equal(ascending)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_and_strides(maxmin: Any, dtype: torch.dtype) -> None:
    features = signs(2, 30, 48).to(dtype)
    for view in (features[..., :16], features[..., 1:17], features.transpose(0, 1)[..., :16].transpose(0, 1)):
        assert maxmin(view, [8], blocks=3).equal(defined(view, 8))
    assert maxmin(features, [0]).shape == (0,)


def test_hostile_cu_seqlens_stay_inside(maxmin: Any) -> None:
    features = signs(40, 16)
    for ends in ([0, 3, 40], [-9, 99, 7], [30, 10, 40], [0, 0, 0], [0, 40, 40]):
        for sort in (False, True):
            picks = maxmin(features, [5, 6], torch.tensor(ends, dtype=torch.int32), sort=sort, blocks=2)
            assert ((picks >= 0) & (picks <= 40)).all(), ends


@pytest.mark.parametrize("stored", [False, True])
def test_launches_do_not_grow_with_the_picks(emulation: ModuleType, stored: bool) -> None:
    arrays = [numbers(x) for x in gaussian(50, 16)]
    for k in (1, 25, 50):
        for sort in (False, True):
            emulation.maxmin_select(arrays[0], [k], None, sort, stored=stored, blocks=2)
            assert emulation.launches() == 3
