"""Calls of every Triton launcher that between them launch every configuration, and a process that records them.

`python -m tests.triton_launches` answers questions, one JSON list a line: [function, *arguments]. It is a process of
its own, without TRITON_INTERPRET, because the tests' own process may be interpreting.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("fp32", "fp16", "bf16")
# Classes of devices that have each target; Triton generates the same for 8.6 and 8.9 as for 8.0.
TARGETS = {
    "sm_80": ("datacenter", "consumer"),
    "sm_90": ("datacenter",),
    "sm_100": ("datacenter",),
    "sm_120": ("consumer",),
    "gfx942": ("amd",),
    "gfx950": ("amd",),
    "gfx1100": ("amd",),
}
# Head dimensions of common models; another one only changes masks.
HEAD_DIMS = {"bf16": (64, 72, 80, 96, 128, 256), "fp16": (64, 128), "fp32": (64, 80, 128, 256)}
UNALIGNED_HEAD_DIMS = (80, 256)
MATRIX_INSTRUCTIONS = {  # in PTX and in AMD's assembly
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma", "mma.sync"),
    "sm_100": ("tcgen05", "wgmma", "mma.sync"),
    "sm_120": ("mma.sync",),
    "gfx942": ("v_mfma",),
    "gfx950": ("v_mfma",),
    "gfx1100": ("v_wmma",),
}


class Launches:
    """The other process. `ask("kernels")` calls the function of that name below there."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.triton_launches"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def ask(self, function: str, *arguments: Any) -> Any:
        print(json.dumps([function, *arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process ended, with {self._process.wait()}"
        found = json.loads(answer)
        assert "error" not in found, found["error"]
        return found["answer"]

    def close(self) -> None:
        self._process.communicate()


def empty(*shape: int, dtype: str = "fp32") -> Any:
    import torch

    kinds = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "i32": torch.int32,
        "i64": torch.int64,
    }
    return torch.empty(shape, dtype=kinds[dtype], device="meta")


def call(op: str, *arguments: Any) -> None:
    from flashprune import triton_ops

    triton_ops._launcher(op)(*arguments)


def features(dtype: str, *shape: int) -> Iterator[Any]:
    """Features that are read 16 bytes at a time, and others."""
    yield empty(*shape, dtype=dtype)
    yield empty(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., 1:]


def call_selectors(dtype: str) -> None:
    if dtype == "fp16":
        return  # compiles to what bfloat16 does, but for the type of the products
    for tokens in (576, 8000):
        for x in features(dtype, tokens, 4096):
            call_engines(x, [tokens // 4], None)
            call_engines(x, [tokens // 4, 9], empty(3, dtype="i32"))
        for x in features(dtype, 2, tokens, 4096):
            call_engines(x, [tokens // 4], None)
    for x in features(dtype, 4096, 3584):
        call("evs_select", x, 16, 1024, True)
        call("vidcom2_select", x, 16, 0.25, 1024, False)


def call_engines(x: Any, k: list[int], cu_seqlens: Any) -> None:
    importance = empty(*x.shape[:-1])
    for per_round in (1, 16):
        call("mmr_select", x, importance, k, cu_seqlens, 0.5, per_round, True)
    call("maxmin_select", x, k, cu_seqlens, True)
    call("dpp_select", x, importance, k, cu_seqlens, True)
    positions = empty(*x.shape[:-1], 3, dtype="i32")
    for proximity, alpha in (("gaussian", 1.0), ("linear", 0.5)):
        settings = (alpha, 0.5, "cosine", proximity, 1, 1.0, 1, [0] * len(k), True, True)
        call("mis_select", x, importance, k, positions, cu_seqlens, *settings)


def call_cosines(dtype: str) -> None:
    import torch
    from flashprune.triton_kernels import similarity

    for tokens in (576, 8000):
        for x in features(dtype, tokens, 4096):
            for out in (torch.float32, torch.bfloat16):
                similarity.cosine_matrix(x, empty(tokens), out)


def call_scores(dtype: str) -> None:
    for scores, k, cu_seqlens in (
        (empty(8, 576, dtype=dtype), [64], None),
        (empty(576, dtype=dtype), [64, 9], empty(3, dtype="i32")),
        (empty(576, 3, dtype=dtype)[:, 0], [64], None),
    ):
        call("minmax", scores, cu_seqlens)
        for sort in (True, False):
            call("topk_select", scores, k, cu_seqlens, sort)


def call_attention(dtype: str) -> None:
    for head_dim in HEAD_DIMS[dtype]:
        call_query_attention(dtype, head_dim, 0)
        call_received_attention(dtype, head_dim, 0)
        if head_dim in UNALIGNED_HEAD_DIMS:
            call_query_attention(dtype, head_dim, 1)
            call_received_attention(dtype, head_dim, 1)


def call_query_attention(dtype: str, head_dim: int, offset: int) -> None:
    """`offset`, of the rows from an aligned address."""
    key = empty(2048, 8, head_dim + offset, dtype=dtype)[..., offset:]
    for positions in (1, 32):
        query = empty(positions, 32, head_dim + offset, dtype=dtype)[..., offset:]
        for lse in (None, empty(32, positions)):
            if head_dim == 128:
                call("query_attention", query, key, 0.1, lse, None, [], None, 1e-7)
            call("query_attention", query, key, 0.1, lse, empty(576, dtype="i64"), [], empty(576), 1e-7)


def call_received_attention(dtype: str, head_dim: int, offset: int) -> None:
    query = empty(2048, 32, head_dim + offset, dtype=dtype)[..., offset:]
    key = empty(2048, 8, head_dim + offset, dtype=dtype)[..., offset:]
    call("received_attention", query, key, empty(9, dtype="i32"), 576, 0.1, None, 4, empty(512), 1e-7)
    call("received_attention", query[None], key[None], None, None, 0.1, empty(1, 32, 2048), 1, None, 1e-7)


def call_host_ints(dtype: str) -> None:
    from flashprune.triton_kernels import host_ints

    host_ints.host_ints([1, 2, 3], empty(1).device)


CALLS = (call_selectors, call_cosines, call_scores, call_attention, call_host_ints)


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)


@functools.cache
def forms(target: str, dtype: str) -> dict[str, tuple[Any, str]]:
    """What all calls launch on a target with inputs of a type, each form once, with the first class that has it."""
    from benchmarks.launches import recorded

    found: dict[str, tuple[Any, str]] = {}
    for device_class in TARGETS[target]:
        with recorded(gpu(target), device_class) as launches:
            for calls in CALLS:
                calls(dtype)
        for launch in launches:
            found.setdefault(launch.form.key, (launch.form, device_class))
    return found


@contextmanager
def asked() -> Iterator[set[tuple[str, str, str, float]]]:
    """Kind, type, class of device and bucket of the configurations that are asked for inside."""
    from flashprune.triton_kernels import configs

    found: set[tuple[str, str, str, float]] = set()
    choose = configs.choose

    def note(kind: str, dtype: str, device: str, size: int = 0) -> dict[str, Any]:
        most = next(most for most, _ in configs.buckets(kind, dtype, device) if size <= most)
        found.add((kind, dtype, device, most))
        return choose(kind, dtype, device, size)

    configs.choose = note
    try:
        yield found
    finally:
        configs.choose = choose


def reached() -> dict[str, Any]:
    """The kernels that the calls launch, and the configurations that they ask for."""
    with asked() as configurations:
        forms.cache_clear()
        targets = ("sm_80", "gfx942")  # of every class of devices
        kernels = {form.name for target in targets for dtype in DTYPES for form, _ in forms(target, dtype).values()}
    return {"kernels": sorted(kernels), "configurations": sorted(configurations)}


def call_at_random(op: str, rng: random.Random) -> None:
    """One call as a server makes it: a model's widths, and any number of tokens, segments and picks."""
    lengths = [rng.randint(1, 3000) for _ in range(rng.randint(1, 9))]
    tokens, bounds = sum(lengths), empty(len(lengths) + 1, dtype="i32")
    if op == "query_attention":
        query, key = (empty(rows, heads, 128, dtype="bf16") for rows, heads in ((rng.randint(1, 40), 28), (tokens, 4)))
        lse = rng.choice((None, empty(28, len(query))))
        visual, span = rng.choice(((empty(rng.randint(1, 2000), dtype="i64"), []), (None, [0, tokens, 1])))
        count = len(range(*span)) if span else len(visual)
        return call(op, query, key, 0.1, lse, visual, span, rng.choice((None, empty(count))), 1e-7)
    if op == "received_attention":
        tokens -= tokens % 4 if tokens > 4 else 0
        query, key = empty(tokens, 16, 80, dtype="bf16"), empty(tokens, 16, 80, dtype="bf16")
        lse = rng.choice((None, empty(16, tokens)))
        return call(op, query, key, bounds, None, 0.1, lse, rng.choice((1, 4)) if tokens >= 4 else 1, None, 1e-7)
    if op == "minmax":
        return call(op, empty(tokens), bounds)
    if op in ("evs_select", "vidcom2_select"):
        frames = rng.randint(1, 40)
        keep = (rng.random(),) if op == "vidcom2_select" else ()
        x = empty(frames * lengths[0], 3584, dtype="bf16")
        return call(op, x, frames, *keep, rng.randint(1, len(x)), True)
    k = [rng.randint(1, length) for length in lengths]
    if rng.random() < 0.3:
        k = [min(k)] * len(k)
    x, bounds, k = rng.choice(
        (
            (empty(tokens, 3584, dtype="bf16"), bounds, k),
            (empty(len(lengths), lengths[0], 3584, dtype="bf16"), None, k[:1]),
            (empty(lengths[0], 3584, dtype="bf16"), None, k[:1]),
        )
    )
    importance = empty(*x.shape[:-1])
    if op == "topk_select":
        call(op, importance, k, bounds, rng.random() < 0.5)
    elif op == "mmr_select":
        call(op, x, importance, k, bounds, rng.random(), rng.randint(1, 20), True)
    elif op == "mis_select":
        positions = rng.choice((None, empty(*x.shape[:-1], 3, dtype="i32")))
        proximity = rng.choice(("chebyshev", "gaussian", "linear"))
        pivots = [rng.randint(0, count) for count in k]
        settings = ("cosine", proximity, rng.randint(1, 20), rng.random(), rng.randint(0, 2), pivots)
        call(op, x, importance, k, positions, bounds, 0.5, 0.5, *settings, rng.random() < 0.5, rng.random() < 0.5)
    else:
        call(op, x, *((importance,) if op == "dpp_select" else ()), k, bounds, True)


def served(op: str, calls: int) -> dict[str, Any]:
    """What so many random calls of an operator compile: the constants of every form, by kernel; and configurations."""
    from benchmarks.launches import recorded

    rng, found = random.Random(op), {}
    with asked() as configurations, recorded(gpu("sm_90"), "datacenter") as launches:
        for _ in range(calls):
            call_at_random(op, rng)
    for launch in launches:
        form = launch.form
        declared = {name: value for name, value in form.named.items() if name.isupper()}
        tile = {"num_warps": form.options.num_warps, "num_stages": form.options.num_stages}
        found.setdefault(form.name, {})[form.key] = declared | tile
    return {
        "forms": {name: list(forms.values()) for name, forms in found.items()},
        "configurations": len(configurations),
    }


def compiled(kernel: str, target: str, largest: list[str]) -> list[dict[str, Any]]:
    """Facts of all forms of a kernel on a target, or of that with the largest tiles for each of some types."""
    found = {}
    for dtype in largest or DTYPES:
        some = {key: one for key, one in forms(target, dtype).items() if one[0].name == kernel}
        if largest:
            key = max(some, key=lambda key: size(some[key][0]))
            some = {key: some[key]}
        found |= some
    return [facts(form, target) | {"class": device_class} for form, device_class in found.values()]


def size(form: Any) -> int:
    return math.prod(value for value in form.named.values() if type(value) is int and value)


def facts(form: Any, target: str) -> dict[str, Any]:
    named = {name: value for name, value in form.named.items() if name.isupper() and value is not None}
    types = [kind for kind in form.signature.values() if kind.startswith("*")]
    label = " ".join((types[0], *(f"{name}={value}" for name, value in named.items())))
    label += f" warps={form.options.num_warps} stages={form.options.num_stages}"
    try:
        kernel = form.compile(gpu(target))
    except Exception as error:  # each failure is one line of the report
        return {"form": label, "error": f"{type(error).__name__}: {error}"}
    products = "tt.dot" in kernel.asm["ttir"] and (types[0] in ("*fp16", "*bf16") or named.get("PRECISION") == "tf32x3")
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    return {
        "form": label,
        "shared": kernel.metadata.shared,
        "products": products,
        "matrix": next((name for name in MATRIX_INSTRUCTIONS[target] if name in text), ""),
        **(nvidia_resources(kernel.asm["cubin"]) if "cubin" in kernel.asm else amd_resources(text)),
    }


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes a thread has in local memory beyond its stack of arrays: what was spilled."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spills": stack + local}


def amd_resources(assembly: str) -> dict[str, int]:
    """Vector registers a thread, and bytes a thread has in scratch memory; scalar registers spill into vector ones."""
    names = (r"\.vgpr_count", r"\.private_segment_fixed_size")
    registers, scratch = (int(re.search(rf"{name}:\s+(\d+)", assembly)[1]) for name in names)
    return {"registers": registers, "spills": scratch}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        try:
            answer = {"answer": globals()[function](*arguments)}
        except Exception as error:  # the asker's to raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
