"""The Triton DPP against the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import dpp
from flashprune.triton_kernels.dpp import dpp_select
from torch import Tensor

import flashprune as fp
from inputs import ADVERSARIAL, adversarial, dyadic, gaussian, hadamard

GOLDEN = Path(__file__).parent / "golden"


def powers(*shape: int, seed: int = 0) -> Tensor:
    """Relevance of powers of two, so that gains and their roots are exact."""
    return 2.0 ** -torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))


def defined(features: Tensor, relevance: Tensor, k: int | list[int], **settings: object) -> Tensor:
    return fp.reference.dpp_select(features.double().cpu(), relevance.double().cpu(), k, sort=False, **settings)


def check(features: Tensor, relevance: Tensor, k: int) -> None:
    picks = dpp_select(features, relevance, [k], None, False)
    fp.testing.check_selection("dpp", features, relevance, picks=picks, k=k).raise_if_bad()


def test_the_tolerance_is_the_definitions() -> None:
    assert dpp.RANK_TOL.value == fp.reference.segments.DPP_RANK_TOL


@pytest.mark.parametrize("n, d, k", [(1, 16, 1), (17, 16, 17), (64, 64, 20), (50, 16, 50)])
def test_exact(n: int, d: int, k: int, device: torch.device) -> None:
    """Orthogonal and equal or opposite rows; beyond the rank, relevance fills."""
    features, relevance = hadamard(n, d, seed=n).to(device), powers(n, seed=n).to(device)
    picks = dpp_select(features, relevance, [k], None, False)
    assert picks.cpu().equal(defined(features, relevance, k))
    assert dpp_select(features, relevance, [k], None, True).equal(picks.sort().values)


def test_every_block_size_gives_the_same_picks(device: torch.device) -> None:
    """Classes of many tokens, so that bounds come from third nominees and picks are missed over several tiles."""
    features, relevance = hadamard(70, 64).to(device), powers(70).to(device)
    close, weights = (x.to(device) for x in gaussian(70, 64, seed=2))
    expected = defined(features, relevance, 24)
    for classes, candidates in ((8, 16), (32, 32), (512, 32)):
        block = {"CLASSES": classes, "CANDIDATES": candidates, "COLS": 16, "DEPTH": 16}
        config = block | {"num_warps": 4, "num_stages": 2}
        assert dpp_select(features, relevance, [24], None, False, config).cpu().equal(expected), config
        picks = dpp_select(close, weights, [20], None, False, config)
        fp.testing.check_selection("dpp", close, weights, picks=picks, k=20).raise_if_bad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_rounding(dtype: torch.dtype, device: torch.device) -> None:
    features, relevance = gaussian(50, 40)
    check(features.to(device, dtype), relevance.to(device, dtype), 18)
    check(features.to(device, dtype), relevance.to(device), 8)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name: str, device: torch.device) -> None:
    features, relevance = (x.to(device) for x in adversarial(name, 33))
    check(features, relevance, 18)


def test_rank_used_up(device: torch.device) -> None:
    features, relevance = (x.to(device) for x in gaussian(60, 8))
    picks = dpp_select(features, relevance, [50], None, False).cpu()
    rest = [i for i in range(60) if i not in picks[:8]]
    assert picks[8:].tolist() == sorted(rest, key=lambda i: (-float(relevance[i]), i))[:42]


def test_odd_relevance_and_rows_without_a_norm(device: torch.device) -> None:
    relevance = torch.tensor([math.nan, 0.0, -1.0, 0.5, math.inf, -math.inf, 0.25], device=device)
    eye = torch.eye(7, 16, device=device)
    assert dpp_select(eye, relevance, [7], None, False).tolist() == [2, 3, 6, 4, 1, 0, 5]
    eye[0] = 0
    eye[1, 3] = math.nan
    relevance = torch.tensor([9.0, 8.0, 0.5, 1.0, 0.25], device=device)
    assert dpp_select(eye[:5], relevance, [5], None, False).tolist() == [3, 2, 4, 0, 1]


@pytest.mark.parametrize(("factor", "expected"), [(1.5, [0, 1, 2]), (0.67, [0, 2, 1])])
def test_spent_means_a_gain_of_float32_noise(factor: float, expected: list[int], device: torch.device) -> None:
    left = dpp.RANK_TOL.value * factor
    features = torch.zeros(3, 16, device=device)
    features[0, 0] = features[2, 2] = 1
    features[1, 0], features[1, 1] = math.sqrt(1 - left), math.sqrt(left)
    relevance = torch.tensor([1.0, 1.0, 1e-3 if factor > 1 else 1e-4], device=device)
    assert dpp_select(features, relevance, [3], None, False).tolist() == expected


def test_golden(device: torch.device) -> None:
    cases = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    case = min((case for case in cases if case["method"] == "cdpruner"), key=lambda case: (case["N"], case["K"]))
    with np.load(GOLDEN / case["file"]) as arrays:
        data = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
    assert dpp_select(data["features"], data["relevance"], [case["K"]], None, False).equal(data["order"])


def test_packed_segments(device: torch.device) -> None:
    """Ragged and empty segments, k from 0 to all; each as it is alone."""
    sizes, ks = [0, 33, 1, 0, 9, 7], [0, 5, 1, 0, 9, 0]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    cu_seqlens = starts.to(device, torch.int32)
    features, relevance = hadamard(sum(sizes), 16).to(device), powers(sum(sizes)).to(device)
    picks = dpp_select(features, relevance, ks, cu_seqlens, False)
    assert picks.cpu().equal(defined(features, relevance, ks, cu_seqlens=cu_seqlens.cpu()))
    ascending = dpp_select(features, relevance, ks, cu_seqlens, True)
    assert ascending.equal(torch.cat([x.sort().values for x in picks.split(ks)]))
    features, relevance = (x.to(device) for x in gaussian(sum(sizes), 24))
    alone = [
        dpp_select(features[a:b], relevance[a:b], [k], None, False) + int(a)
        for a, b, k in zip(starts[:-1], starts[1:], ks, strict=True)
        if k
    ]
    assert dpp_select(features, relevance, ks, cu_seqlens, False).equal(torch.cat(alone))


def test_equal_budgets_of_packed_segments(device: torch.device) -> None:
    features, relevance = hadamard(60, 16).to(device), powers(60).to(device)
    cu_seqlens = torch.tensor([0, 20, 53, 60], dtype=torch.int32, device=device)
    picks = dpp_select(features, relevance, [7, 7, 7], cu_seqlens, False)
    assert picks.cpu().equal(defined(features, relevance, 7, cu_seqlens=cu_seqlens.cpu()))


def test_batch_and_strides(device: torch.device) -> None:
    wide, relevance = hadamard(60, 64).reshape(2, 30, 64).to(device), powers(2, 30).to(device)
    for view in (wide[..., :16], wide[..., 16:32], wide.transpose(0, 1)[..., :16].transpose(0, 1)):
        picks = dpp_select(view, relevance, [6], None, False)
        assert picks.shape == (2, 6)
        assert picks.cpu().equal(defined(view, relevance, 6))
    columns = hadamard(30, 16).T.contiguous().to(device).T
    picks = dpp_select(columns, relevance[0], [5], None, False)
    assert picks.cpu().equal(defined(columns, relevance[0], 5))
    every_other = powers(60).to(device)[::2]
    picks = dpp_select(wide[0], every_other, [5], None, False)
    assert picks.cpu().equal(defined(wide[0], every_other, 5))
    assert dpp_select(wide, relevance, [0], None, False).shape == (2, 0)


def test_hostile_cu_seqlens_stay_inside(device: torch.device) -> None:
    """The lengths of packed segments are unknown to the host: whatever they are, the call ends and writes inside."""
    features, relevance = (x.to(device) for x in gaussian(40, 16))
    for ends in ([0, 3, 40], [-9, 99, 7], [30, 10, 40], [0, 0, 0]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        picks = dpp_select(features, relevance, [5, 6], cu_seqlens, False)
        assert ((picks >= 0) & (picks <= 40)).all()


def test_repeats(device: torch.device) -> None:
    features, relevance = (x.to(device) for x in gaussian(40, 24, seed=5))
    first = dpp_select(features, relevance, [20], None, False)
    assert all(dpp_select(features, relevance, [20], None, False).equal(first) for _ in range(2))


def test_unwritten_factor_entries_are_never_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch full of NaN and of impossible indices changes nothing."""
    features, relevance = dyadic(30, 16).to(device), powers(30).to(device)
    expected = dpp_select(features, relevance, [12], None, False)

    def poisoned(*shape: object, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(
            shape[0] if isinstance(shape[0], tuple) else shape,
            math.nan if dtype.is_floating_point else -7,
            dtype=dtype,
            device=device,
        )

    monkeypatch.setattr(dpp.torch, "empty", poisoned)
    assert dpp_select(features, relevance, [12], None, False).equal(expected)
