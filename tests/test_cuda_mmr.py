"""The CUDA MMR on the host emulation, against the definition."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from emulated import SEEDS, lengths, numbers
from flashprune.replay import cosine_bound
from inputs import ADVERSARIAL, adversarial, dyadic, gaussian, signs


@pytest.fixture(params=[False, True], ids=["computed", "stored"])
def mmr(request: pytest.FixtureRequest, emulation: ModuleType) -> Any:
    """With cosines computed when they are needed, and with a stored matrix of them."""

    def select(
        features: Tensor,
        importance: Tensor,
        k: list[int],
        cu_seqlens: Tensor | None = None,
        lam: float = 0.5,
        per_round: int = 1,
        sort: bool = False,
        **how: int,
    ) -> Tensor:
        spans = None if cu_seqlens is None else cu_seqlens.numpy()
        how = {"stored": request.param} | how
        picks = emulation.mmr_select(numbers(features), numbers(importance), k, spans, lam, per_round, sort, **how)
        return torch.from_numpy(picks)

    return select


def defined(features: Tensor, importance: Tensor, k: int | list[int], **settings: Any) -> Tensor:
    return fp.reference.mmr_select(features.double(), importance.double(), k, sort=False, **settings).flatten()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    "n, k, lam, per_round",
    [(1, 1, 0.5, 1), (31, 31, 0.5, 1), (33, 9, 1.0, 1), (64, 40, 0.25, 5), (65, 30, 0.5, 100), (300, 40, 0.5, 1)],
)
def test_exact(mmr: Any, n: int, k: int, lam: float, per_round: int, blocks: int) -> None:
    features, importance = lengths(signs(n, 16, seed=n)), dyadic(n, seed=n)
    settings = {"lam": lam, "per_round": per_round}
    expected = defined(features, importance, k, **settings)
    for seed in SEEDS:
        assert mmr(features, importance, [k], **settings, seed=seed, blocks=blocks).equal(expected)
    assert mmr(features, importance, [k], **settings, sort=True, blocks=blocks).equal(expected.sort().values)


def test_every_size_of_block_and_team_gives_the_same_picks(mmr: Any) -> None:
    """Small blocks, so that bounds come from tokens that a thread, a block or the round leaves out."""
    features, importance = lengths(signs(200, 16)), dyadic(200)
    for per_round in (1, 3):
        expected = defined(features, importance, 40, per_round=per_round)
        for block, blocks, threads in ((1, 1, 64), (7, 2, 32), (33, 5, 32), (0, 4, 128)):
            picks = mmr(
                features, importance, [40], per_round=per_round, block=block, blocks=blocks, threads=threads, seed=9
            )
            assert picks.equal(expected), (per_round, block, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_within_rounding(mmr: Any, dtype: torch.dtype, blocks: int) -> None:
    features, importance = gaussian(90, 72)
    features = features.to(dtype)
    for scores, k, lam, per_round in ((importance, 40, 0.5, 1), (importance.to(dtype), 20, 0.1, 4)):
        picks = mmr(features, scores, [k], lam=lam, per_round=per_round, blocks=blocks)
        fp.testing.check_selection(
            "mmr", features, scores, picks=picks, k=k, lam=lam, per_round=per_round
        ).raise_if_bad()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(mmr: Any, name: str) -> None:
    features, importance = adversarial(name, 70)
    for seed, blocks in ((0, 1), (1, 3)):
        picks = mmr(features, importance, [35], seed=seed, blocks=blocks)
        fp.testing.check_selection("mmr", features, importance, picks=picks, k=35).raise_if_bad()


@pytest.mark.parametrize("blocks", [1, 3, 14])
def test_packed_segments(mmr: Any, blocks: int) -> None:
    """Ragged and empty segments, k from 0 to all, one team for several segments and several blocks for one."""
    sizes, ks = [0, 40, 1, 0, 35, 7], [0, 12, 1, 0, 9, 0]
    features, importance = signs(sum(sizes), 16), dyadic(sum(sizes))
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    expected = defined(features, importance, ks, cu_seqlens=cu_seqlens)
    for seed in SEEDS:
        assert mmr(features, importance, ks, cu_seqlens, seed=seed, blocks=blocks).equal(expected)
    ascending = torch.cat([x.sort().values for x in expected.split(ks)])
    assert mmr(features, importance, ks, cu_seqlens, sort=True, blocks=blocks).equal(ascending)


def test_equal_budgets_of_packed_segments(mmr: Any) -> None:
    features, importance = signs(60, 16), dyadic(60)
    cu_seqlens = torch.tensor([0, 20, 53, 60], dtype=torch.int32)
    expected = defined(features, importance, 7, per_round=2, cu_seqlens=cu_seqlens)
    assert mmr(features, importance, [7, 7, 7], cu_seqlens, per_round=2, blocks=2).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_and_strides(mmr: Any, dtype: torch.dtype) -> None:
    """Rows that are 16-byte aligned and rows that are not."""
    features, importance = signs(2, 30, 48).to(dtype), dyadic(2, 30)
    for view in (features[..., :16], features[..., 1:17], features.transpose(0, 1)[..., :16].transpose(0, 1)):
        assert mmr(view, importance, [8], blocks=3).equal(defined(view, importance, 8))
    every_other = dyadic(60).to(dtype)[::2]
    assert mmr(features[0, :, :16], every_other, [9]).equal(defined(features[0, :, :16], every_other, 9))
    assert mmr(features, importance, [0]).shape == (0,)


def test_hostile_cu_seqlens_stay_inside(mmr: Any) -> None:
    """The lengths of packed segments are unknown to the host: whatever they are, the call ends and writes inside."""
    features, importance = signs(40, 16), dyadic(40)
    for ends in ([0, 3, 40], [-9, 99, 7], [30, 10, 40], [0, 0, 0], [0, 40, 40]):
        for sort in (False, True):
            cu_seqlens = torch.tensor(ends, dtype=torch.int32)
            picks = mmr(features, importance, [5, 6], cu_seqlens, sort=sort, blocks=2)
            assert ((picks >= 0) & (picks <= 40)).all(), ends


@pytest.mark.parametrize("stored", [False, True])
def test_launches_do_not_grow_with_the_picks(emulation: ModuleType, stored: bool) -> None:
    arrays = [numbers(x) for x in gaussian(50, 16)]
    for k in (1, 25, 50):
        for sort in (False, True):
            emulation.mmr_select(*arrays, [k], None, 0.5, 1, sort, stored=stored, blocks=2)
            assert emulation.launches() == 2 + stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long_sums_on_tensor_cores(mmr: Any, dtype: torch.dtype) -> None:
    """The copy of the first pick is worse than another token by a little more than the bound: sums that are cut off at
    every step would take its cosine of 1 for less."""
    features = gaussian(2, 4096)[0].to(dtype)[[0, 0, 1]]
    cosine = torch.nn.functional.cosine_similarity(features[0].double(), features[2].double(), dim=0).item()
    gap = 2.1 * cosine_bound(features.float())
    importance = torch.tensor([5.0, 2.0, 1.0 + cosine + gap])
    picks = mmr(features, importance, [2], threads=32)  # one warp, which computes the whole sum
    fp.testing.check_selection("mmr", features, importance, picks=picks, k=2, sort=False).raise_if_bad()
    assert picks.tolist() == [0, 2]
