"""What a call of a Triton launcher costs the host, without a GPU: the time until all of it is queued.

    python -m benchmarks.host [FOLDER]

Everything runs that runs on the host: the launcher, PyTorch's operations, and Triton's launch code up to the driver.
The tensors are on the CPU and small, so that the operations cost little more than their dispatch; processor time of the
thread is counted. FOLDER holds other triton_kernels, such as an earlier commit's, which take turns with these.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flashprune.triton_kernels
import torch
from triton.backends.compiler import GPUTarget

from . import machine
from .launches import recorded

ROUNDS, CALLS = 15, 40
TOKENS, WIDTH, KEPT = 64, 64, 16


def package(folder: Path, name: str) -> str:
    """Make kernels elsewhere importable under a name."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return name


def calls(name: str) -> dict[str, Callable[[], object]]:
    def launcher(op: str) -> Callable[..., object]:
        module: ModuleType = importlib.import_module(f"{name}.{op.removesuffix('_select')}")
        return getattr(module, op)

    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    scores = torch.rand(TOKENS)
    bounds = torch.tensor([0, 24, TOKENS], dtype=torch.int32)
    ragged = [4, KEPT - 4]
    query, key = torch.randn(1, 8, 64, dtype=torch.bfloat16), torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16)
    prior = torch.rand(TOKENS)
    mis = (None, None, 1.0, 0.5, "cosine", "chebyshev", 1, 1.0, 0, [0], True, True)
    packed = (None, bounds, 1.0, 0.5, "cosine", "chebyshev", 1, 1.0, 0, [0, 0], True, True)
    listed = {
        "topk": ("topk_select", scores, [KEPT], None, True),
        "topk, packed": ("topk_select", scores, ragged, bounds, True),
        "mmr": ("mmr_select", x, scores, [KEPT], None, 0.5, 1, True),
        "mmr, packed": ("mmr_select", x, scores, ragged, bounds, 0.5, 1, True),
        "maxmin": ("maxmin_select", x, [KEPT], None, True),
        "dpp": ("dpp_select", x, scores, [KEPT], None, True),
        "mis": ("mis_select", x, scores, [KEPT], *mis),
        "mis, packed": ("mis_select", x, scores, ragged, *packed),
        "evs": ("evs_select", x, 4, KEPT, True),
        "vidcom2": ("vidcom2_select", x, 4, 0.25, KEPT, True),
        "query attention": ("query_attention", query, key, 0.125, None, None, [], prior, 1e-7),
        "received attention": ("received_attention", key, key, None, None, 0.125, None, 1, None, 1e-7),
        "minmax": ("minmax", scores, None),
    }
    return {label: functools.partial(launcher(op), *rest) for label, (op, *rest) in listed.items()}


def measure(variants: list[Callable[[], object]]) -> list[str]:
    """Median microseconds a call, least and most of the rounds, of variants that take turns."""
    found: list[list[float]] = [[] for _ in variants]
    for variant in variants:
        variant()
    for _ in range(ROUNDS):
        for times, variant in zip(found, variants, strict=True):
            started = time.thread_time()
            for _ in range(CALLS):
                variant()
            times.append((time.thread_time() - started) / CALLS * 1e6)
    return [f"{statistics.median(times):.0f} ({min(times):.0f}–{max(times):.0f})" for times in found]


def main() -> None:
    torch.set_num_threads(1)
    names = [flashprune.triton_kernels.__name__]
    names = [package(Path(folder), f"triton_kernels_{i}") for i, folder in enumerate(sys.argv[1:])] + names
    print(", ".join(f"{name} {value}" for name, value in machine.facts().items()))
    print(f"\n| µs a call | launches | {' | '.join([*sys.argv[1:], 'here'])} |\n|---|---|{'---|' * len(names)}")
    with recorded(GPUTarget("cuda", 90, 32), "datacenter") as launches:
        several = [calls(name) for name in names]
        for label in several[0]:
            several[-1][label]()
            launches.clear()
            several[-1][label]()
            count = len(launches)
            print(f"| {label} | {count} | {' | '.join(measure([variant[label] for variant in several]))} |", flush=True)


if __name__ == "__main__":
    main()
