"""On a GPU: every operator against the definition, without synchronising, in CUDA graphs, and the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from flashprune import triton_ops
from flashprune.cli import cases as validation
from flashprune.cli import validate
from inputs import DISTANCES, VARIANTS, Variant, exact, gaussian
from test_dispatch import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
    pytest.mark.skipif(fp.backends()["triton"] != "ready", reason=f"triton: {fp.backends()['triton']}"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = tuple(v for v in VARIANTS + DISTANCES if f"{v.method}_select" in triton_ops.KERNELS)
every_variant = pytest.mark.parametrize("variant", HERE, ids=lambda v: v.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
ATTENTION = sorted(triton_ops.KERNELS & {"query_attention", "received_attention"})


def quietly(function: Callable[..., Tensor], *arguments: Any, **settings: Any) -> Tensor:
    """The call, in which a synchronisation is an error; once before, to compile the kernels."""
    function(*arguments, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function(*arguments, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Call:
    """A variant's call on the GPU, its positions there from the beginning."""

    def __init__(self, variant: Variant, features: Tensor, k: int | list[int], **more: Any) -> None:
        self.function = getattr(fp, f"{variant.method}_select")
        self.tensors = variant.tensors
        params = variant.params(features.cpu(), k)
        self.params = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in params.items()} | more
        self.k = k

    def __call__(self, features: Tensor, importance: Tensor) -> Tensor:
        return self.function(*self.tensors(features, importance), self.k, **self.params, sort=False, backend="triton")


@every_variant
@every_dtype
@pytest.mark.parametrize(("n", "d"), [(1, 16), (33, 64), (65, 16), (576, 256), (2305, 64)])
def test_exact_numbers_to_the_last_index(variant: Variant, dtype: torch.dtype, n: int, d: int) -> None:
    if variant in DISTANCES:
        pytest.skip("its distances are irrational")
    features, importance = exact(variant, n, d)
    k = n // 3 + 1
    got = quietly(Call(variant, features, k), features.to("cuda", dtype), importance.to("cuda", dtype))
    assert torch.equal(got.cpu(), variant.define(features, importance, k, sort=False))


@every_variant
@every_dtype
@pytest.mark.parametrize(("n", "d"), [(63, 37), (729, 1024), (2880, 128)])
def test_random_numbers_within_rounding(variant: Variant, dtype: torch.dtype, n: int, d: int) -> None:
    features, importance = gaussian(n, d)
    features, importance = features.to(dtype), importance.to(dtype)
    k = n // 4
    got = quietly(Call(variant, features, k), features.cuda(), importance.cuda())
    variant.check(features, importance, k, got.cpu())


@every_variant
@every_dtype
def test_a_segment_does_not_see_its_neighbours_and_runs_repeat(variant: Variant, dtype: torch.dtype) -> None:
    sizes, ks = [200, 0, 33, 577], [50, 0, 33, 100]
    bounds = torch.tensor([0, 200, 200, 233, 810], dtype=torch.int32, device="cuda")
    features, importance = (x.to("cuda", dtype) for x in gaussian(810, 128))
    call = Call(variant, features, ks, cu_seqlens=bounds)
    packed = quietly(call, features, importance)
    assert all(torch.equal(packed, call(features, importance)) for _ in range(5))
    for start, n, k, picks in zip(bounds.tolist(), sizes, ks, packed.split(ks), strict=False):
        rows = slice(start, start + n)
        alone = Call(variant, features[rows], k)
        if "positions" in alone.params:
            alone.params["positions"] = call.params["positions"][rows]
        assert torch.equal(picks - start, alone(features[rows], importance[rows]))


@every_variant
def test_a_graph_replays_with_other_inputs(variant: Variant) -> None:
    features, importance = (x.cuda() for x in gaussian(500, 64))
    call = Call(variant, features, 120)
    call(features, importance)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = call(features, importance)
    for seed in (1, 2):
        others = [x.cuda() for x in gaussian(500, 64, seed=seed)]
        features.copy_(others[0])
        importance.copy_(others[1])
        graph.replay()
        assert torch.equal(picks, call(*others))


@every_variant
def test_one_compiled_graph(variant: Variant) -> None:
    features, importance = (x.cuda() for x in gaussian(300, 64))
    call = Call(variant, features, 70)
    torch._dynamo.reset()
    whole = torch.compile(lambda x, scores: x[call(x, scores)] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(features, importance), features[call(features, importance)] * 2)


@pytest.mark.parametrize("op", ATTENTION)
@every_dtype
def test_attention_against_float64(op: str, dtype: torch.dtype) -> None:
    for case in validation.cases(op, seed=0, quick=False):
        inputs = tuple(x.to("cuda", dtype) for x in case.inputs)
        params = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.params.items()}
        _, complaint = validate._check_attention(case, inputs, params, "triton")
        assert not complaint, f"{case.text}: {complaint}"


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_neither_waits_nor_varies(op: str) -> None:
    query, key = torch.randn(700, 8, 64, device="cuda"), torch.randn(700, 8, 64, device="cuda")
    function = getattr(fp, op)
    settings: dict[str, Any] = {"backend": "triton"}
    if op == "received_attention":
        settings["cu_seqlens"] = torch.tensor([0, 100, 100, 700], dtype=torch.int32, device="cuda")
    first = quietly(function, query, key, **settings)
    assert all(torch.equal(first, function(query, key, **settings)) for _ in range(5))


def test_auto_takes_triton() -> None:
    with Recorder() as recorder:
        fp.topk_select(torch.rand(100, device="cuda"), 9)
    assert "flashprune_triton::topk_select" in recorder.ran


def test_positions_keep_every_bit() -> None:
    places = torch.arange(-(2**15), 2**15, device="cuda")[:, None] << 16
    for dtype in DTYPES:
        packed = fp.pack_positions(torch.zeros(len(places), 3, device="cuda", dtype=dtype), places)
        assert torch.equal(fp.unpack_positions(packed, 1)[1], places)
