"""Offsets on a device cannot be checked without waiting for it: whatever they hold, Triton's kernels
stay inside their arrays and end. Segments are those of the offsets that ascend: each raised to those before it, inside
the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.bounded import bound_memory
from torch import Tensor

from flashprune.reference.segments import nearest_other, unit_rows
from inputs import TOKENS, WRONG_OFFSETS, ascending, gaussian, raster, signs

each_wrong = pytest.mark.parametrize("offsets", WRONG_OFFSETS.values(), ids=list(WRONG_OFFSETS))


def inputs(op: str) -> tuple[Tensor, Tensor]:
    features, importance = gaussian(TOKENS, 20)
    return (features, importance.abs() + 0.1) if op.startswith("dpp") else (features, importance)


def interpreted(op: str, sort: bool, device: torch.device) -> Callable[[list[int], Tensor], Tensor]:
    """select(ks, cu_seqlens) of the Triton kernels."""
    from flashprune.triton_kernels import dpp, maxmin, minmax, mis, mmr, topk

    features, importance = (x.to(device) for x in inputs(op))
    if op == "topk":
        return lambda ks, cu: topk.topk_select(importance, ks, cu, sort)
    if op == "minmax":
        return lambda ks, cu: minmax.minmax(importance, cu)
    if op.startswith("mmr"):
        per_round = 12 if op == "mmr rounds" else 3
        return lambda ks, cu: mmr.mmr_select(features, importance, ks, cu, 0.5, per_round, sort)
    if op == "maxmin":
        return lambda ks, cu: maxmin.maxmin_select(features, ks, cu, sort)
    if op == "dpp":
        return lambda ks, cu: dpp.dpp_select(features, importance, ks, cu, sort)
    linear = op == "mis linear"
    positions = raster(torch.empty(TOKENS, 1)).contiguous().to(device) if linear else None
    graph = (0.4 if linear else 1.0, 0.3, "cosine", "linear" if linear else "chebyshev", 1, 1.0, 0)
    words = {"panel_words": 2} if op == "mis panels" else {}
    return lambda ks, cu: mis.mis_select(
        features, importance, ks, positions, cu, *graph, [2, 0, 3], False, sort, **words
    )


@pytest.fixture
def bounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if device.type == "cpu":
        bound_memory(monkeypatch)


@pytest.mark.parametrize("wrong", ["overlapping", "descending", "extreme"])
@pytest.mark.parametrize("op", ["topk", "mmr", "mmr rounds", "maxmin", "dpp", "mis linear", "mis panels"])
def test_wrong_offsets(op: str, wrong: str, device: torch.device, bounded: None) -> None:
    offsets, ks = WRONG_OFFSETS[wrong], [20, 4, 12]
    select = interpreted(op, False, device)
    picks = select(ks, torch.tensor(offsets, dtype=torch.int32, device=device))
    assert ((picks >= 0) & (picks < TOKENS)).all()
    if op != "topk":
        expected = select(ks, torch.tensor(ascending(offsets), dtype=torch.int32, device=device))
        assert torch.equal(picks, expected)


@each_wrong
def test_minmax(offsets: list[int], device: torch.device, bounded: None) -> None:
    interpreted("minmax", False, device)([], torch.tensor(offsets, dtype=torch.int32, device=device))


@each_wrong
@pytest.mark.parametrize("given", [False, True])
def test_received_attention(given: bool, offsets: list[int], device: torch.device, bounded: None) -> None:
    from flashprune.triton_kernels.received_attention import received_attention

    query, key = (signs(TOKENS, 2, 16, seed=seed).to(device) for seed in (0, 1))
    lse = torch.zeros(2, TOKENS, device=device) if given else None
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    received_attention(query, key, cu_seqlens, None, 0.25, lse, 1, None, 0.0)


def test_memory_is_bounded(device: torch.device, bounded: None) -> None:
    """A kernel that reads past the end of a tensor of its launch is found out."""
    if device.type != "cpu":
        pytest.skip("compute-sanitizer looks at compiled kernels")
    from flashprune.triton_kernels import minmax
    from triton.runtime.errors import InterpreterError

    scores = torch.rand(12)
    inside = torch.tensor([0, 8], dtype=torch.int32)
    out = torch.empty(8)
    launch = minmax.minmax_kernel[(1,)]
    launch(scores[:8], inside, out, 8, 8, 0, 1, PACKED=True, BLOCK=16)
    with pytest.raises(InterpreterError, match="4 of 12 addresses"):
        launch(scores[:8], torch.tensor([0, 12], dtype=torch.int32), out, 12, 12, 0, 1, PACKED=True, BLOCK=16)


def test_offsets_that_ascend(device: torch.device) -> None:
    """Nearest other tokens of offsets that ascend after all are those of the plain ones."""
    pytest.importorskip("triton")
    from flashprune.triton_kernels import similarity

    features = signs(TOKENS, 16).to(device)
    starts = similarity.ascending(torch.tensor([-5, 40, 30, 200], dtype=torch.int32, device=device), TOKENS)
    assert starts is not None and starts.tolist() == [0, 40, 40, TOKENS]
    found = similarity.nearest_other(features, similarity.inverse_norms(features), starts).cpu()
    parts = [nearest_other(unit_rows(features[a:b].cpu())) for a, b in ((0, 40), (40, TOKENS))]
    torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=1e-6)
