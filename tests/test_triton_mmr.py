"""The Triton MMR against the definition."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import greedy
from flashprune.triton_kernels.mmr import mmr_select
from flashprune.triton_kernels.similarity import inverse_norms
from torch import Tensor

import flashprune as fp
from inputs import ADVERSARIAL, adversarial, dyadic, gaussian, signs


def defined(features: Tensor, importance: Tensor, k: int | list[int], **settings: object) -> Tensor:
    return fp.reference.mmr_select(features.double().cpu(), importance.double().cpu(), k, sort=False, **settings)


def check(features: Tensor, importance: Tensor, k: int, lam: float = 0.5, per_round: int = 1) -> None:
    picks = mmr_select(features, importance, [k], None, lam, per_round, False)
    report = fp.testing.check_selection("mmr", features, importance, picks=picks, k=k, lam=lam, per_round=per_round)
    report.raise_if_bad()


@pytest.mark.parametrize(
    "n, k, lam, per_round",
    [(1, 1, 0.5, 1), (31, 31, 0.5, 1), (33, 9, 1.0, 1), (64, 40, 0.25, 5), (65, 30, 0.5, 100), (300, 12, 0.5, 1)],
)
def test_exact(n: int, k: int, lam: float, per_round: int, device: torch.device) -> None:
    features, importance = signs(n, 16, seed=n).to(device), dyadic(n, seed=n).to(device)
    picks = mmr_select(features, importance, [k], None, lam, per_round, False)
    assert picks.cpu().equal(defined(features, importance, k, lam=lam, per_round=per_round))
    assert mmr_select(features, importance, [k], None, lam, per_round, True).equal(picks.sort().values)


def test_every_block_size_gives_the_same_picks(device: torch.device) -> None:
    """Classes of many tokens, so that bounds come from third nominees and groups of picks span rounds."""
    features, importance = signs(70, 16).to(device), dyadic(70).to(device)
    norms = inverse_norms(features)
    for per_round in (1, 3):
        expected = defined(features, importance, 16, per_round=per_round)
        for classes, candidates, cols in ((16, 32, 32), (32, 64, 16)):
            block = {"CLASSES": classes, "CANDIDATES": candidates, "ROWS": 32, "COLS": cols, "DEPTH": 16}
            config = block | {"num_warps": 4, "num_stages": 2}
            picks = greedy.blocked_greedy(
                features,
                importance,
                norms,
                [16],
                None,
                lam=0.5,
                per_round=per_round,
                mmr=True,
                sort=False,
                config=config,
            )
            assert picks.cpu().equal(expected), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_rounding(dtype: torch.dtype, device: torch.device) -> None:
    features, importance = gaussian(50, 40)
    check(features.to(device, dtype), importance.to(device, dtype), 20)
    check(features.to(device, dtype), importance.to(device), 8, lam=0.1, per_round=4)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name: str, device: torch.device) -> None:
    features, importance = (x.to(device) for x in adversarial(name, 40))
    check(features, importance, 20)


def test_packed_segments(device: torch.device) -> None:
    """Ragged and empty segments, k from 0 to all; each as it is alone."""
    sizes, ks = [0, 40, 1, 0, 35, 7], [0, 12, 1, 0, 9, 0]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    features, importance = signs(sum(sizes), 16).to(device), dyadic(sum(sizes)).to(device)
    cu_seqlens = starts.to(device, torch.int32)
    picks = mmr_select(features, importance, ks, cu_seqlens, 0.5, 1, False)
    alone = [
        mmr_select(features[a:b], importance[a:b], [k], None, 0.5, 1, False) + int(a)
        for a, b, k in zip(starts[:-1], starts[1:], ks, strict=True)
        if k
    ]
    assert picks.equal(torch.cat(alone))
    assert picks.cpu().equal(defined(features, importance, ks, cu_seqlens=cu_seqlens.cpu()))
    ascending = mmr_select(features, importance, ks, cu_seqlens, 0.5, 1, True)
    assert ascending.equal(torch.cat([x.sort().values for x in picks.split(ks)]))


@pytest.mark.parametrize("per_round", [9, 100])
def test_many_tokens_a_round(per_round: int, device: torch.device) -> None:
    """Where the first picks are ranked at once, NaN and ties too; batched, and packed with equal and ragged budgets."""
    features, importance = signs(2, 50, 16).to(device), dyadic(2, 50).to(device)
    importance[:, 3:7] = torch.nan
    picks = mmr_select(features, importance, [33], None, 0.5, per_round, False)
    assert picks.cpu().equal(defined(features, importance, 33, per_round=per_round))
    features, importance = features.view(100, 16), importance.view(100)
    cu_seqlens = torch.tensor([0, 40, 40, 52, 100], dtype=torch.int32)
    for ks in ([40, 0, 7, 31], [9, 0, 9, 9]):
        picks = mmr_select(features, importance, ks, cu_seqlens.to(device), 0.5, per_round, False)
        assert picks.cpu().equal(defined(features, importance, ks, per_round=per_round, cu_seqlens=cu_seqlens))


def test_equal_budgets_of_packed_segments(device: torch.device) -> None:
    features, importance = signs(60, 16).to(device), dyadic(60).to(device)
    cu_seqlens = torch.tensor([0, 20, 53, 60], dtype=torch.int32, device=device)
    picks = mmr_select(features, importance, [7, 7, 7], cu_seqlens, 0.5, 2, False)
    assert picks.cpu().equal(defined(features, importance, 7, per_round=2, cu_seqlens=cu_seqlens.cpu()))


def test_batch_and_strides(device: torch.device) -> None:
    features, importance = signs(2, 30, 40).to(device), dyadic(2, 30).to(device)
    for view in (features[..., :16], features[..., 1:17], features.transpose(0, 1)[..., :16].transpose(0, 1)):
        picks = mmr_select(view, importance, [8], None, 0.5, 1, False)
        assert picks.shape == (2, 8)
        assert picks.cpu().equal(defined(view, importance, 8))
    columns = signs(16, 30).to(device).T
    assert (
        mmr_select(columns, importance[0, :30], [9], None, 0.5, 1, False)
        .cpu()
        .equal(defined(columns, importance[0, :30], 9))
    )
    assert mmr_select(features, importance, [0], None, 0.5, 1, False).shape == (2, 0)


def test_hostile_cu_seqlens_stay_inside(device: torch.device) -> None:
    """The lengths of packed segments are unknown to the host: whatever they are, the call ends and writes inside."""
    features, importance = signs(40, 16).to(device), dyadic(40).to(device)
    for ends in ([0, 3, 40], [-9, 99, 7], [30, 10, 40], [0, 0, 0]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        picks = mmr_select(features, importance, [5, 6], cu_seqlens, 0.5, 1, False)
        assert ((picks >= 0) & (picks <= 40)).all()


def test_repeats(device: torch.device) -> None:
    features, importance = (x.to(device) for x in gaussian(40, 24, seed=5))
    first = mmr_select(features, importance, [12], None, 0.5, 1, False)
    assert all(mmr_select(features, importance, [12], None, 0.5, 1, False).equal(first) for _ in range(2))
