"""The CUDA DPP on the host emulation, against the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashprune as fp
from emulated import SEEDS, numbers
from inputs import ADVERSARIAL, adversarial, gaussian, hadamard

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def dpp(emulation: ModuleType) -> Any:
    def select(
        features: Tensor,
        relevance: Tensor,
        k: list[int],
        cu_seqlens: Tensor | None = None,
        sort: bool = False,
        **how: int,
    ) -> Tensor:
        spans = None if cu_seqlens is None else cu_seqlens.numpy()
        return torch.from_numpy(emulation.dpp_select(numbers(features), numbers(relevance), k, spans, sort, **how))

    return select


def powers(*shape: int, seed: int = 0) -> Tensor:
    """Powers of two, as relevance or factors of rows, so that gains, their roots and norms are exact."""
    return 2.0 ** -torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))


def defined(features: Tensor, relevance: Tensor, k: int | list[int], **settings: Any) -> Tensor:
    return fp.reference.dpp_select(features.double(), relevance.double(), k, sort=False, **settings).flatten()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n, d, k", [(1, 16, 1), (17, 16, 17), (64, 64, 20), (50, 16, 50), (200, 256, 110)])
def test_exact(dpp: Any, n: int, d: int, k: int, blocks: int) -> None:
    """Orthogonal and equal or opposite rows of several lengths; beyond the rank, relevance fills."""
    features, relevance = hadamard(n, d, seed=n) * powers(n, 1, seed=n + 1), powers(n, seed=n)
    expected = defined(features, relevance, k)
    for seed in SEEDS:
        assert dpp(features, relevance, [k], seed=seed, blocks=blocks).equal(expected)
    assert dpp(features, relevance, [k], sort=True, blocks=blocks).equal(expected.sort().values)


def test_every_size_of_block_and_team_gives_the_same_picks(dpp: Any) -> None:
    """Tokens absorb a pick within a round or later: the numbers are the same, so the picks are on any features."""
    features, relevance = hadamard(100, 64), powers(100)
    close, weights = gaussian(100, 64, seed=2)
    expected, first = defined(features, relevance, 45), dpp(close, weights, [45])
    for block, blocks, threads in ((1, 1, 64), (7, 2, 32), (33, 5, 32), (0, 4, 128)):
        how = {"block": block, "blocks": blocks, "seed": 9}
        assert dpp(features, relevance, [45], **how, threads=threads).equal(expected), how
        # the warps share out a row's features, so their number is part of a cosine's rounding
        assert dpp(close, weights, [45], **how).equal(first), how
    fp.testing.check_selection("dpp", close, weights, picks=first, k=45).raise_if_bad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_within_rounding(dpp: Any, dtype: torch.dtype, blocks: int) -> None:
    features, relevance = gaussian(90, 72)
    features = features.to(dtype)
    for scores in (relevance, relevance.to(dtype)):
        picks = dpp(features, scores, [40], blocks=blocks)
        fp.testing.check_selection("dpp", features, scores, picks=picks, k=40).raise_if_bad()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(dpp: Any, name: str) -> None:
    features, relevance = adversarial(name, 70)
    for seed, blocks in ((0, 1), (1, 3)):
        picks = dpp(features, relevance, [35], seed=seed, blocks=blocks)
        fp.testing.check_selection("dpp", features, relevance, picks=picks, k=35).raise_if_bad()


def test_rank_used_up(dpp: Any) -> None:
    features, relevance = gaussian(60, 8)
    picks = dpp(features, relevance, [50], blocks=2)
    rest = [i for i in range(60) if i not in picks[:8]]
    assert picks[8:].tolist() == sorted(rest, key=lambda i: (-float(relevance[i]), i))[:42]


def test_odd_relevance_and_rows_without_a_norm(dpp: Any) -> None:
    relevance = torch.tensor([math.nan, 0.0, -1.0, 0.5, math.inf, -math.inf, 0.25])
    eye = torch.eye(7, 16)
    assert dpp(eye, relevance, [7]).tolist() == [2, 3, 6, 4, 1, 0, 5]
    eye[0] = 0
    eye[1, 3] = math.nan
    relevance = torch.tensor([9.0, 8.0, 0.5, 1.0, 0.25])
    assert dpp(eye[:5], relevance, [5]).tolist() == [3, 2, 4, 0, 1]


@pytest.mark.parametrize(("factor", "expected"), [(1.5, [0, 1, 2]), (0.67, [0, 2, 1])])
def test_spent_means_a_gain_of_float32_noise(dpp: Any, factor: float, expected: list[int]) -> None:
    left = fp.reference.segments.DPP_RANK_TOL * factor
    features = torch.zeros(3, 16)
    features[0, 0] = features[2, 2] = 1
    features[1, 0], features[1, 1] = math.sqrt(1 - left), math.sqrt(left)
    relevance = torch.tensor([1.0, 1.0, 1e-3 if factor > 1 else 1e-4])
    assert dpp(features, relevance, [3]).tolist() == expected


def test_golden(dpp: Any) -> None:
    cases = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    case = min((case for case in cases if case["method"] == "cdpruner"), key=lambda case: (case["N"], case["K"]))
    with np.load(GOLDEN / case["file"]) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    assert dpp(data["features"], data["relevance"], [case["K"]], blocks=2).equal(data["order"])


@pytest.mark.parametrize("blocks", [1, 3, 14])
def test_packed_segments(dpp: Any, blocks: int) -> None:
    sizes, ks = [0, 33, 1, 0, 9, 7], [0, 5, 1, 0, 9, 0]
    features, relevance = hadamard(sum(sizes), 16), powers(sum(sizes))
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    expected = defined(features, relevance, ks, cu_seqlens=cu_seqlens)
    for seed in SEEDS:
        assert dpp(features, relevance, ks, cu_seqlens, seed=seed, blocks=blocks).equal(expected)
    ascending = torch.cat([x.sort().values for x in expected.split(ks)])
    assert dpp(features, relevance, ks, cu_seqlens, sort=True, blocks=blocks).equal(ascending)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_and_strides(dpp: Any, dtype: torch.dtype) -> None:
    wide, relevance = hadamard(60, 64).reshape(2, 30, 64).to(dtype), powers(2, 30)
    for view in (wide[..., :16], wide[..., 16:32], wide.transpose(0, 1)[..., :16].transpose(0, 1)):
        assert dpp(view, relevance, [6], blocks=3).equal(defined(view, relevance, 6))
    every_other = powers(60).to(dtype)[::2]
    assert dpp(wide[0], every_other, [5]).equal(defined(wide[0], every_other, 5))
    assert dpp(wide, relevance, [0]).shape == (0,)


def test_hostile_cu_seqlens_stay_inside(dpp: Any) -> None:
    features, relevance = gaussian(40, 16)
    for ends in ([0, 3, 40], [-9, 99, 7], [30, 10, 40], [0, 0, 0], [0, 40, 40]):
        for sort in (False, True):
            picks = dpp(features, relevance, [5, 6], torch.tensor(ends, dtype=torch.int32), sort=sort, blocks=2)
            assert ((picks >= 0) & (picks <= 40)).all(), ends


def test_launches_do_not_grow_with_the_picks(emulation: ModuleType) -> None:
    arrays = [numbers(x) for x in gaussian(50, 16)]
    for k in (1, 25, 50):
        for sort in (False, True):
            emulation.dpp_select(*arrays, [k], None, sort, blocks=2)
            assert emulation.launches() == 2
