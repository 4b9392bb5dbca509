"""On a GPU: every operator of both backends against the definition, without synchronising, in CUDA graphs, on other
streams, and the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from flashprune import dispatch, operators
from flashprune.cli import cases as validation
from flashprune.cli import validate
from inputs import DISTANCES, VARIANTS, Variant, exact, gaussian
from test_dispatch import Recorder
from videos import ADVERSARIAL, check, check_form, still, walk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_variant = pytest.mark.parametrize("variant", VARIANTS + DISTANCES, ids=lambda v: v.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_attention = pytest.mark.parametrize("op", ["query_attention", "received_attention"])


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both that run here; an operator that one of them lacks is skipped by `needs`."""
    status = fp.backends()[request.param]
    if status != "ready":
        pytest.skip(f"{request.param}: {status}")
    return request.param


def needs(backend: str, op: str) -> None:
    reason = dispatch.unable(backend, op)
    if reason:
        pytest.skip(f"{backend}: {reason}")


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

    def __init__(self, variant: Variant, backend: str, features: Tensor, k: int | list[int], **more: Any) -> None:
        needs(backend, f"{variant.method}_select")
        self.function = getattr(fp, f"{variant.method}_select")
        self.backend = backend
        self.tensors = variant.tensors
        params = variant.params(features.cpu(), k)
        self.params = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in params.items()} | more
        self.k = k

    def __call__(self, features: Tensor, importance: Tensor) -> Tensor:
        tensors = self.tensors(features, importance)
        return self.function(*tensors, self.k, **self.params, sort=False, backend=self.backend)


@every_variant
@every_dtype
@pytest.mark.parametrize(("n", "d"), [(1, 16), (33, 64), (65, 16), (576, 256), (2305, 64)])
def test_exact_numbers_to_the_last_index(variant: Variant, backend: str, dtype: torch.dtype, n: int, d: int) -> None:
    if variant in DISTANCES:
        pytest.skip("its distances are irrational")
    features, importance = exact(variant, n, d)
    k = n // 3 + 1
    got = quietly(Call(variant, backend, features, k), features.to("cuda", dtype), importance.to("cuda", dtype))
    assert torch.equal(got.cpu(), variant.define(features, importance, k, sort=False))


@every_variant
@every_dtype
@pytest.mark.parametrize(("n", "d"), [(63, 37), (729, 1024), (2880, 128)])
def test_random_numbers_within_rounding(variant: Variant, backend: str, dtype: torch.dtype, n: int, d: int) -> None:
    features, importance = gaussian(n, d)
    features, importance = features.to(dtype), importance.to(dtype)
    k = n // 4
    got = quietly(Call(variant, backend, features, k), features.cuda(), importance.cuda())
    variant.check(features, importance, k, got.cpu())


@every_variant
@every_dtype
def test_a_segment_does_not_see_its_neighbours_and_runs_repeat(
    variant: Variant, backend: str, dtype: torch.dtype
) -> None:
    sizes, ks = [200, 0, 33, 577], [50, 0, 33, 100]
    bounds = torch.tensor([0, 200, 200, 233, 810], dtype=torch.int32, device="cuda")
    features, importance = (x.to("cuda", dtype) for x in gaussian(810, 128))
    call = Call(variant, backend, features, ks, cu_seqlens=bounds)
    packed = quietly(call, features, importance)
    assert all(torch.equal(packed, call(features, importance)) for _ in range(5))
    for start, n, k, picks in zip(bounds.tolist(), sizes, ks, packed.split(ks), strict=False):
        rows = slice(start, start + n)
        alone = Call(variant, backend, features[rows], k)
        if "positions" in alone.params:
            alone.params["positions"] = call.params["positions"][rows]
        assert torch.equal(picks - start, alone(features[rows], importance[rows]))


@every_variant
def test_a_graph_replays_with_other_inputs(variant: Variant, backend: str) -> None:
    features, importance = (x.cuda() for x in gaussian(500, 64))
    call = Call(variant, backend, features, 120)
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
def test_one_compiled_graph(variant: Variant, backend: str) -> None:
    features, importance = (x.cuda() for x in gaussian(300, 64))
    call = Call(variant, backend, features, 70)
    torch._dynamo.reset()
    whole = torch.compile(lambda x, scores: x[call(x, scores)] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(features, importance), features[call(features, importance)] * 2)


@every_attention
@every_dtype
def test_attention_against_float64(op: str, backend: str, dtype: torch.dtype) -> None:
    needs(backend, op)
    for case in validation.cases(op, seed=0, quick=False):
        inputs = tuple(x.to("cuda", dtype) for x in case.inputs)
        params = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.params.items()}
        _, complaint = validate._check_attention(case, inputs, params, backend)
        assert not complaint, f"{case.text}: {complaint}"


@every_attention
def test_attention_neither_waits_nor_varies(op: str, backend: str) -> None:
    needs(backend, op)
    query, key = torch.randn(700, 8, 64, device="cuda"), torch.randn(700, 8, 64, device="cuda")
    function = getattr(fp, op)
    settings: dict[str, Any] = {"backend": backend}
    if op == "received_attention":
        settings["cu_seqlens"] = torch.tensor([0, 100, 100, 700], dtype=torch.int32, device="cuda")
    first = quietly(function, query, key, **settings)
    assert all(torch.equal(first, function(query, key, **settings)) for _ in range(5))


@every_variant
def test_streams_do_not_see_each_other(variant: Variant, backend: str) -> None:
    inputs = [tuple(x.cuda() for x in gaussian(500, 64, seed=seed)) for seed in range(2)]
    call = Call(variant, backend, inputs[0][0], 120)
    expected = [call(*each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        got = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(*each))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@every_variant
def test_strides_and_addresses_do_not_matter(variant: Variant, backend: str) -> None:
    wide, scores = (x.cuda() for x in gaussian(301, 100))
    features, importance = wide[1:, 3:67], scores[1:]  # rows apart, and no address is a multiple of 16 bytes
    call = Call(variant, backend, features, 80)
    expected = call(features.clone(memory_format=torch.contiguous_format), importance.clone())
    assert torch.equal(quietly(call, features, importance), expected)
    apart = features.t().contiguous().t()  # columns apart too
    assert torch.equal(call(apart, torch.stack([importance, importance], 1)[:, 0]), expected)


@every_variant
def test_wrong_bounds_stay_in_bounds(variant: Variant, backend: str) -> None:
    features, importance = (x.cuda() for x in gaussian(120, 64))
    for values in ([0, 90, 20], [-9, 100, 999], [10, 10, 10]):
        bounds = torch.tensor(values, dtype=torch.int32, device="cuda")
        picks = Call(variant, backend, features, [60, 20], cu_seqlens=bounds)(features, importance)
        assert picks.shape == (80,) and int(picks.min()) >= 0 and int(picks.max()) < 120


@pytest.mark.parametrize("op", sorted(operators.SHAPES.keys() - set(dispatch.WIDE)))
def test_auto_takes_cuda_then_triton(op: str) -> None:
    (chosen,) = [name for name in ("cuda", "triton") if not dispatch.unable(name, op)][:1] or ["reference"]
    assert dispatch.resolve("auto", op, torch.device("cuda"), torch.float32) == chosen


def test_the_operator_asked_for_runs(backend: str) -> None:
    needs(backend, "topk_select")
    with Recorder() as recorder:
        fp.topk_select(torch.rand(100, device="cuda"), 9, backend=backend)
    space = {"cuda": "flashprune", "triton": "flashprune_triton"}[backend]
    assert f"{space}::topk_select" in recorder.ran


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("n", [8192, 8193, 65536, 200_000])
def test_many_scores(n: int, sort: bool, backend: str) -> None:
    needs(backend, "topk_select")
    for scores in (torch.randn(n), torch.randint(0, 3, (n,)).float(), torch.full((n,), 0.5)):
        for k in (1, n // 5, n):
            got = quietly(fp.topk_select, scores.cuda(), k, sort=sort, backend=backend)
            assert torch.equal(got.cpu(), fp.reference.topk_select(scores, k, sort=sort))


@every_dtype
def test_minmax_has_the_bits_of_the_tensor_form(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 5000).to(dtype)
    scores[1, ::7] = torch.inf
    assert torch.equal(quietly(fp.minmax, scores.cuda()).cpu(), fp.minmax(scores))
    bounds = torch.tensor([0, 1000, 1000, 1001, 5000], dtype=torch.int32)
    got = quietly(fp.minmax, scores[0].cuda(), cu_seqlens=bounds.cuda())
    assert torch.equal(got.cpu(), fp.minmax(scores[0], cu_seqlens=bounds))


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@every_dtype
@pytest.mark.parametrize(("thw", "d"), [((1, 6, 6), 64), ((8, 14, 14), 1024), ((64, 12, 15), 300), ((300, 1, 1), 33)])
def test_videos(method: str, dtype: torch.dtype, thw: tuple[int, int, int], d: int) -> None:
    """Within rounding, without waiting, the same each time, wherever the rows lie."""
    needs("triton", f"{method}_select")
    select = getattr(fp, f"{method}_select")
    for make in (walk, still):
        features = make(thw, d).to("cuda", dtype)
        for q in (0.0, 0.75):
            picks = quietly(select, features, thw, 1, q=q)
            check(method, features.cpu(), picks.cpu(), thw=thw, merge=1, q=q)
            assert all(torch.equal(picks, select(features, thw, 1, q=q)) for _ in range(3))
            apart = features.t().contiguous().t()
            assert torch.equal(picks, select(apart, thw, 1, q=q))
            padded = torch.nn.functional.pad(features, (1, 2))[:, 1 : d + 1]  # sums may have another order there
            check(method, features.cpu(), quietly(select, padded, thw, 1, q=q).cpu(), thw=thw, merge=1, q=q)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_videos(method: str, name: str) -> None:
    needs("triton", f"{method}_select")
    for thw in ((4, 9, 9), (1, 1, 1), (50, 1, 1)):
        features = walk(thw)
        ADVERSARIAL[name](features)
        for q in (0.0, 0.5, 1.0):
            picks = quietly(getattr(fp, f"{method}_select"), features.cuda(), thw, 1, q=q)
            check_form(method, features, picks.cpu(), thw, q)


def test_positions_keep_every_bit() -> None:
    places = torch.arange(-(2**15), 2**15, device="cuda")[:, None] << 16
    for dtype in DTYPES:
        packed = fp.pack_positions(torch.zeros(len(places), 3, device="cuda", dtype=dtype), places)
        assert torch.equal(fp.unpack_positions(packed, 1)[1], places)
