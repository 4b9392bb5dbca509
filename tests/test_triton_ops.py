"""The registered Triton operators: opcheck, whole graphs, and what the interpreter gives through the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import flashprune as fp
from flashprune import dispatch, triton_ops
from inputs import BY_NAME, exact, gaussian
from test_dispatch import Recorder

NAMES = ("topk", "mmr", "mis", "mis-banded", "maxmin", "dpp")
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


def importance_cases(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operators that give importance, by a name that begins with theirs."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(24, heads, 16, generator=generator).to(device) for heads in (4, 2))
    lse = torch.rand(4, 24, generator=generator).to(device) + 3
    prior, scores = torch.rand(6, generator=generator).to(device), torch.randn(2, 24, generator=generator).to(device)
    bounds = torch.tensor([0, 8, 8, 24], dtype=torch.int32, device=device)
    index = torch.tensor([3, 0, 9, 4, 23, 5], device=device)
    return {
        "query_attention": (query[:2], key, 0.25, None, None, [1, 7, 1], prior, 1e-7),
        "query_attention-index": (query[:2], key, 0.25, lse[:, :2], index, [], None, 1e-7),
        "query_attention-batch": (query[None], key[None], 0.25, None, None, [], None, 1e-7),
        "received_attention": (query, key, None, None, 0.25, None, 1, None, 1e-7),
        "received_attention-packed": (query, key, bounds, 16, 0.25, lse, 4, prior, 1e-7),
        "minmax": (scores, None),
        "minmax-packed": (scores[0], bounds),
    }


each_importance = pytest.mark.parametrize("name", importance_cases(torch.device("cpu")))


@each_importance
def test_opcheck_of_importance(name: str, device: torch.device) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(name.split("-")[0]), importance_cases(device)[name], test_utils=checks)


@pytest.mark.parametrize("name", [*importance_cases(torch.device("cpu")), *(f"{name}_select" for name in NAMES)])
def test_tensors_on_several_devices_are_refused(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operator, where a meta tensor decides that nothing runs, and by what comes before a launch."""
    if name.endswith("_select"):
        variant = BY_NAME[name.removesuffix("_select")]
        arguments = list(variant.operands(*gaussian(12, 16), [3, 0, 2], torch.tensor([0, 7, 7, 12], dtype=torch.int32)))
        op = operator(f"{variant.method}_select")
    else:
        arguments, op = list(importance_cases(device)[name]), operator(name.split("-")[0])
    launched = []
    monkeypatch.setattr(triton_ops, "_launcher", lambda op: lambda *arguments: launched.append(op))
    for at, x in enumerate(arguments):
        if at and isinstance(x, torch.Tensor):
            mixed = [*arguments[:at], x.to("meta"), *arguments[at + 1 :]]
            for call in (op, triton_ops._implementation(op._qualified_op_name.split("::")[1])):
                with pytest.raises(ValueError, match=r"must be on the device of \w+, .*, got meta"):
                    call(*mixed)
    assert launched == []


@each_importance
def test_importance_in_one_graph(name: str, device: torch.device) -> None:
    op, arguments = operator(name.split("-")[0]), importance_cases(device)[name]
    torch._dynamo.reset()
    graph = torch.compile(lambda: op(*arguments) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(), op(*arguments) * 2)


@pytest.fixture
def interpreted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the public functions take Triton on this device: without a GPU, interpreted."""
    if device.type == "cpu":
        monkeypatch.setattr(dispatch, "unable", lambda backend, op: "")
        monkeypatch.setattr(dispatch, "_refusal", lambda *_: "")


@each_selector
def test_public_selectors_by_name(variant: Any, device: torch.device) -> None:
    """Eagerly and as one graph, with the picks of the definition, by the Triton operator alone."""
    features, importance = exact(variant, 12)
    moved = features.to(device), importance.to(device)
    params = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in variant.params(features, 5).items()
    }
    function = getattr(fp, f"{variant.method}_select")

    def select(*tensors: torch.Tensor) -> torch.Tensor:
        return function(*variant.tensors(*tensors), 5, **params, sort=False, backend="triton")

    with Recorder() as recorder:
        picks = select(*moved)
    assert {name for name in recorder.ran if "flashprune" in name} == {f"flashprune_triton::{variant.method}_select"}
    assert torch.equal(picks.cpu(), variant.define(features, importance, 5, sort=False))
    torch._dynamo.reset()
    graph = torch.compile(lambda *tensors: select(*tensors) + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*moved), picks)


def test_public_importance_by_name(device: torch.device) -> None:
    query, key, *_ = importance_cases(device)["query_attention"]
    tokens, keys, bounds, *_ = importance_cases(device)["received_attention-packed"]

    def score(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        asked = fp.query_attention(query, key, visual=slice(1, 7), backend="triton")
        received = fp.received_attention(tokens, keys, cu_seqlens=bounds, pool=4, backend="triton")
        return fp.debias(asked, received)

    with Recorder() as recorder:
        expected = score(query, key, tokens, keys)
    assert {f"flashprune_triton::{op}" for op in ("query_attention", "received_attention")} <= set(recorder.ran)
    torch._dynamo.reset()
    graph = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(query, key, tokens, keys), expected)


VIDEO = {"evs_select": (), "vidcom2_select": (0.5,)}
each_video = pytest.mark.parametrize("op", VIDEO)


@each_video
@pytest.mark.parametrize("sort", [True, False])
def test_opcheck_of_videos(op: str, sort: bool, device: torch.device) -> None:
    operands = (gaussian(12, 16)[0].to(device), 3, *VIDEO[op], 6, sort)
    torch.library.opcheck(operator(op), operands, test_utils=("test_schema", "test_faketensor"))


@each_video
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("interpreted")
def test_public_videos_by_name(op: str, backend: str, device: torch.device) -> None:
    features = gaussian(12, 16)[0].to(device)

    def select(features: torch.Tensor) -> torch.Tensor:
        return getattr(fp, op)(features * 2, (3, 4, 4), 2, q=0.5, sort=False, backend=backend)

    with Recorder() as recorder:
        picks = select(features)
    assert {name for name in recorder.ran if "flashprune" in name} == {f"flashprune_triton::{op}"}
    expected = getattr(fp.reference, op)(features.cpu(), (3, 2, 2), 1, 0.5, sort=False)
    assert torch.equal(picks.cpu(), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(select, fullgraph=True, backend="aot_eager")(features), picks)


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
        found = operator("minmax")(scores.half(), None)
        assert (found.shape, found.dtype) == ((2, 9), torch.float32)
