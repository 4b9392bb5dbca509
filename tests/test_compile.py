"""The operators under tracing: opcheck, fake shapes, and whole graphs whose results are used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flashprune as fp
from inputs import BY_NAME, DISTANCES, VARIANTS, Variant, exact, gaussian, operator

pytestmark = pytest.mark.usefixtures("native")
every_variant = pytest.mark.parametrize("variant", VARIANTS + DISTANCES, ids=lambda v: v.name)
CU = torch.tensor([0, 30, 30, 90], dtype=torch.int32)
LAYOUTS = {
    "tokens": ((90, 16), 20, None),
    "batch": ((3, 30, 16), 7, None),
    "packed": ((90, 16), [9, 0, 40], CU),
    "nothing": ((0, 16), 0, None),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def compiled(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **more)


@every_variant
@each_layout
def test_opcheck(variant: Variant, layout: str) -> None:
    shape, k, cu_seqlens = LAYOUTS[layout]
    features, importance = gaussian(*shape)
    torch.library.opcheck(operator(variant.method), variant.operands(features, importance, k, cu_seqlens))


@every_variant
@each_layout
def test_fake_shapes_are_the_real_ones(variant: Variant, layout: str) -> None:
    shape, k, cu_seqlens = LAYOUTS[layout]
    operands = variant.operands(*gaussian(*shape), k, cu_seqlens)
    real = operator(variant.method)(*operands)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in operands]
        fake = operator(variant.method)(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@every_variant
@each_layout
def test_one_graph(variant: Variant, layout: str) -> None:
    """Selection and gather in one graph; the tokens gathered are the ones that count."""
    shape, k, cu_seqlens = LAYOUTS[layout]
    features, importance = gaussian(*shape)
    more = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}

    def prune(features: Tensor, importance: Tensor) -> Tensor:
        picks = variant.select(features * 2, importance, k, **more)
        return features.flatten(0, -2)[picks] + 1

    expected = features.flatten(0, -2)[variant.select(features, importance, k, backend="cpu", **more)] + 1
    assert torch.equal(compiled(prune)(features, importance), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_public_selectors_on_fake_and_meta_tensors(variant: Variant, layout: str) -> None:
    shape, k, cu_seqlens = LAYOUTS[layout]
    tensors = gaussian(*shape)
    more = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    real = variant.select(*tensors, k, **more)
    with FakeTensorMode() as mode:
        fake = variant.select(*map(mode.from_tensor, tensors), k, **{n: mode.from_tensor(x) for n, x in more.items()})
    found = [fake]
    for backend in ("auto", "reference"):
        on_meta = {name: x.to("meta") for name, x in more.items()}
        with torch.device("meta"):  # for the variant's positions
            found.append(variant.select(*(x.to("meta") for x in tensors), k, backend=backend, **on_meta))
        assert found[-1].device.type == "meta"
    for picks in found:
        assert (picks.shape, picks.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("select", [fp.evs_select, fp.vidcom2_select])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_videos_on_meta_tensors(select: Callable[..., Tensor], backend: str) -> None:
    picks = select(torch.empty(32, 8, device="meta"), (2, 4, 4), 1, 0.5, backend=backend)
    assert (picks.shape, picks.dtype, picks.device.type) == ((16,), torch.int64, "meta")


@pytest.mark.parametrize("name", ["topk", "mmr", "mis-banded"])
@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_public_selectors(name: str, layout: str, mode: str) -> None:
    variant = BY_NAME[name]
    shape, k, cu_seqlens = LAYOUTS[layout]
    tensors = (*gaussian(*shape), *([] if cu_seqlens is None else [cu_seqlens]))

    def prune(features: Tensor, importance: Tensor, *packed: Tensor) -> Tensor:
        more = {"cu_seqlens": packed[0]} if packed else {}
        return features.flatten(0, -2)[variant.select(features, importance, k, **more)]

    assert torch.equal(make_fx(prune, tracing_mode=mode)(*tensors)(*tensors), prune(*tensors))


@every_variant
@pytest.mark.parametrize("fake", [False, True])
def test_operators_refuse_tensors_on_several_devices(variant: Variant, fake: bool) -> None:
    operands = variant.operands(*gaussian(90, 16), [9, 0, 40], CU)
    names = [argument.name for argument in operator(variant.method).default._schema.arguments]
    tensors = [at for at, x in enumerate(operands) if isinstance(x, Tensor)]
    for moved in tensors:
        with FakeTensorMode() if fake else nullcontext() as mode:
            mixed = [mode.from_tensor(x) if fake and isinstance(x, Tensor) else x for x in operands]
            mixed[moved] = mixed[moved].to("meta")
            wrong = tensors[1] if moved == 0 else moved
            with pytest.raises(ValueError, match=f"^{names[wrong]} must be on the device of {names[0]}, "):
                operator(variant.method)(*mixed)


@pytest.mark.parametrize("name", ["mmr", "mis-banded"])
def test_inductor_compiles_it(name: str) -> None:
    variant = BY_NAME[name]
    features, importance = exact(variant, 64)
    torch._dynamo.reset()
    whole = torch.compile(lambda x, scores: x[variant.select(x * 2, scores, 20)] * 3, fullgraph=True)
    assert torch.equal(whole(features, importance), features[variant.define(features, importance, 20)] * 3)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_sizes_may_change(variant: Variant) -> None:
    """Symbolic N: one graph for many sizes."""

    def keep(features: Tensor, importance: Tensor) -> Tensor:
        return variant.select(features, importance, 10)

    graph = compiled(keep, dynamic=True)
    graph(*gaussian(40, 16))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (57, 91, 12):
            tokens = gaussian(n, 16)
            assert torch.equal(graph(*tokens), keep(*tokens))


def test_k_may_change() -> None:
    graph = compiled(fp.topk_select)
    scores = torch.rand(50)
    for k in (5, 9, 20, 50):
        assert torch.equal(graph(scores, k), fp.topk_select(scores, k))


@pytest.mark.parametrize("grid", [(3, 10), (2, 3, 5), [(3, 10), (5, 6)]])
def test_a_grid_in_the_graph(grid: Any) -> None:
    features, importance = gaussian(2, 30, 16)
    settings = {"grid": grid, "alpha": 0.5, "threshold": 0.4}
    expected = fp.mis_select(features, importance, 9, **settings)
    assert torch.equal(compiled(fp.mis_select)(features, importance, 9, **settings), expected)
    packed = features.flatten(0, 1), importance.flatten(), [9, 4]
    cu_seqlens = torch.tensor([0, 30, 60], dtype=torch.int32)
    expected = fp.mis_select(*packed, cu_seqlens=cu_seqlens, **settings)
    assert torch.equal(compiled(fp.mis_select)(*packed, cu_seqlens=cu_seqlens, **settings), expected)


def test_a_wrong_shape_is_refused_while_tracing() -> None:
    features, importance = gaussian(30, 16)
    with pytest.raises(Exception, match="k=31 exceeds N=30"):
        compiled(fp.mmr_select)(features, importance, 31)


@pytest.mark.parametrize(
    ("ks", "bounds", "message"),
    [([9, 4], [0, 8, 30], "k=9 exceeds N=8"), ([9, 4], [0, 20, 29], "cu_seqlens"), ([1, 1], [0, 31, 30], "cu_seqlens")],
)
def test_wrong_values_are_refused_when_the_graph_runs(ks: list[int], bounds: list[int], message: str) -> None:
    features, importance = gaussian(30, 16)
    graph = compiled(fp.mmr_select)
    right = torch.tensor([0, 20, 30], dtype=torch.int32)
    graph(features, importance, ks, cu_seqlens=right)
    with pytest.raises((ValueError, RuntimeError), match=message):
        graph(features, importance, ks, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_requires_grad_is_refused_while_tracing() -> None:
    features, importance = gaussian(30, 16)
    with pytest.raises(Exception, match="features requires grad"):
        compiled(fp.mmr_select)(features.requires_grad_(), importance, 3)
