"""Offsets on a device cannot be checked without waiting for it: whatever they hold, the emulated CUDA kernels
stay inside their arrays and end. Segments are those of the offsets that ascend: each raised to those before it, inside
the tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emulated import SEEDS, numbers
from inputs import TOKENS, WRONG_OFFSETS, ascending, gaussian, raster

each_wrong = pytest.mark.parametrize("offsets", WRONG_OFFSETS.values(), ids=list(WRONG_OFFSETS))


def inputs(op: str) -> tuple[Tensor, Tensor]:
    features, importance = gaussian(TOKENS, 20)
    return (features, importance.abs() + 0.1) if op.startswith("dpp") else (features, importance)


def _mis(emulation: ModuleType, sort: bool, linear: bool, block: int, **more: Any) -> Callable[..., Any]:
    features, importance = map(numbers, inputs("mis"))
    positions = numbers(raster(torch.empty(TOKENS, 1))) if linear else None
    graph = (0.4 if linear else 1.0, 0.3, "cosine", "linear" if linear else "chebyshev", 1, 1.0, 0)
    return lambda ks, cu, seed: emulation.mis_select(
        features, importance, ks, positions, cu, *graph, [2, 0, 3], False, sort, block=block, seed=seed, **more
    )[0]


def _rounds(emulation: ModuleType, op: str, sort: bool, **more: Any) -> Callable[..., Any]:
    features, importance = map(numbers, inputs(op))
    if op == "maxmin":
        return lambda ks, cu, seed: emulation.maxmin_select(features, ks, cu, sort, seed=seed, blocks=4, **more)
    if op == "dpp":
        return lambda ks, cu, seed: emulation.dpp_select(
            features, importance, ks, cu, sort, seed=seed, blocks=4, **more
        )
    return lambda ks, cu, seed: emulation.mmr_select(
        features, importance, ks, cu, 0.5, 3, sort, seed=seed, blocks=4, **more
    )


def emulated(emulation: ModuleType, op: str, sort: bool) -> Callable[[list[int], np.ndarray, int], np.ndarray]:
    """select(ks, cu_seqlens, seed) of the emulation."""
    kind, _, form = op.partition(" ")
    if kind == "topk":
        scores = numbers(inputs("topk")[1])
        staged, sorted_ = (0, 0) if not form else (16, 64)
        return lambda ks, cu, seed: emulation.topk_select(scores, ks, cu, sort, 128, staged, sorted_, seed=seed)[0]
    if kind == "mis":
        return _mis(emulation, sort, form == "linear", 32 if form == "panels" else 0)
    return _rounds(emulation, kind, sort, **({"stored": True} if form else {}))


OPS = ("topk", "topk long", "mmr", "mmr stored", "maxmin", "maxmin stored", "dpp", "mis", "mis linear", "mis panels")


@each_wrong
@pytest.mark.parametrize("ks", [[12, 12, 12], [20, 4, 12]], ids=["equal", "ragged"])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_wrong_offsets(op: str, sort: bool, ks: list[int], offsets: list[int], emulation: ModuleType) -> None:
    select = emulated(emulation, op, sort)
    expected = select(ks, np.array(ascending(offsets), np.int32), 0)
    for seed in SEEDS[:2]:
        picks = select(ks, np.array(offsets, np.int32), seed)
        assert ((picks >= 0) & (picks < TOKENS)).all()
        if not op.startswith("topk"):  # whose segments share nothing, and may overlap
            np.testing.assert_array_equal(picks, expected)
