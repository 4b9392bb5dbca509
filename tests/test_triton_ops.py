"""The registered Triton operators: opcheck, whole graphs, and what the interpreter gives through the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from flashprune import triton_ops
from inputs import BY_NAME, exact, gaussian

NAMES = ("topk", "mmr", "mis", "mis-banded", "maxmin")
SELECTORS = [BY_NAME[name] for name in NAMES if f"{BY_NAME[name].method}_select" in triton_ops.KERNELS]
each_selector = pytest.mark.parametrize("variant", SELECTORS, ids=lambda v: v.name)


def operator(op: str) -> Any:
    return getattr(torch.ops.flashprune_triton, op)


@each_selector
@pytest.mark.parametrize("sizes", [None, (7, 0, 5)])
def test_opcheck(variant: Any, sizes: tuple[int, ...] | None, device: torch.device) -> None:
    k, bounds = 4, None
    if sizes:
        k, bounds = [3, 0, 2], torch.tensor([0, 7, 7, 12], dtype=torch.int32)
    operands = variant.operands(*gaussian(12, 16), k, bounds)
    operands = [x.to(device) if isinstance(x, torch.Tensor) else x for x in operands]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(f"{variant.method}_select"), operands, test_utils=checks)


@each_selector
def test_one_graph_with_the_picks_of_the_definition(variant: Any, device: torch.device) -> None:
    features, importance = exact(variant, 12)
    operands = variant.operands(features, importance, 5)
    op = operator(f"{variant.method}_select")
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in operands]
    torch._dynamo.reset()
    graph = torch.compile(lambda: op(*moved) + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph().cpu(), variant.define(features, importance, 5, sort=False))


def test_every_operator_traces_without_its_kernel() -> None:
    """Shapes come from the registration alone, so a graph is traced on a machine that cannot run it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        features, scores = torch.empty(2, 9, 16), torch.empty(2, 9)
        assert operator("dpp_select")(features, scores, [4], None, True).shape == (2, 4)
        query, key = torch.empty(2, 9, 4, 16, dtype=torch.float16), torch.empty(2, 9, 2, 16, dtype=torch.float16)
        found = operator("query_attention")(query, key, 0.25, None, None, [1, 9, 2], None, 1e-7)
        assert (found.shape, found.dtype) == ((2, 4), torch.float32)
        found = operator("received_attention")(query, key, None, None, 0.25, None, 3, None, 1e-7)
        assert (found.shape, found.dtype) == ((2, 3), torch.float32)
