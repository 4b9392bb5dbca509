"""Latency of every Triton stage on this GPU, beside the copy bandwidth and the matrix rate measured in the same run.

`python -m benchmarks.gpu` prints Markdown tables; `--small` runs each stage once on small shapes, for the sanitizer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from datetime import date
from typing import NamedTuple

import torch
import triton
from torch import Tensor

import flashprune as fp
from benchmarks import machine
from flashprune import triton_ops

RUNS, WARM_UP = 25, 3
SIZES = ((576, 64), (2880, 720), (16384, 1638))  # tokens N, kept K
DIM = 3584
COLD = 256 << 20  # bytes written between runs, more than any L2 cache


class Stage(NamedTuple):
    """A call, with the bytes that it must at least move and the flops of its products (0: none to speak of)."""

    op: str
    shape: str
    call: Callable[[], Tensor]
    bytes: int
    flops: int


def stages(small: bool, dtype: torch.dtype) -> Iterator[Stage]:
    sizes, dim = (((130, 33),), 64) if small else (SIZES, DIM)
    for n, k in sizes:
        features = torch.randn(n, dim, device="cuda", dtype=dtype)
        importance = torch.rand(n, device="cuda")
        read = features.nbytes + importance.nbytes + 8 * k
        text = f"N={n} K={k} D={dim}"
        products = 2 * n * k * dim  # every token against every pick, the most that exact greedy needs
        yield stage("topk_select", f"N={n} K={k}", (importance,), importance.nbytes + 8 * k, 0, k=k)
        yield stage("mmr_select", text, (features, importance), read, products, k=k)
        yield stage("mis_select", text, (features, importance), read, products, k=k)
        yield stage("maxmin_select", text, (features,), read, products + 2 * n * n * dim, k=k)
        yield stage("dpp_select", text, (features, importance), read, products, k=k)
        heads, kv_heads, d, length = (4, 2, 64, n) if small else (28, 4, 128, n + 512)
        query = torch.randn(1, heads, d, device="cuda", dtype=dtype)
        key = torch.randn(length, kv_heads, d, device="cuda", dtype=dtype)
        text = f"Lq=1 L={length} H={heads} Hkv={kv_heads} d={d}"
        yield stage("query_attention", text, (query, key), key.nbytes + 4 * length, 2 * length * heads * d)
        heads, d = (4, 64) if small else (16, 80)
        query, key = torch.randn(2, n, heads, d, device="cuda", dtype=dtype)
        flops = 2 * 2 * n * n * heads * d  # the scores twice: for their sums, then by column
        yield stage("received_attention", f"N={n} H={heads} d={d}", (query, key), 2 * key.nbytes + 4 * n, flops)


def stage(op: str, shape: str, tensors: tuple[Tensor, ...], read: int, flops: int, **settings: int) -> Stage:
    return Stage(op, shape, lambda: getattr(fp, op)(*tensors, **settings, backend="triton"), read, flops)


def latencies(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each run on the device, with a cold L2 cache."""
    scratch = torch.empty(COLD, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(RUNS):
        scratch.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found


def copy_bandwidth() -> float:
    """GB/s read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(latencies(lambda: target.copy_(source))) / 1e6


def matrix_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a large product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    return 2 * 8192**3 / statistics.median(latencies(lambda: a @ b)) / 1e9


def print_tables() -> None:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {date.today()}, commit {machine.commit()}.")
    print(f"Median of {RUNS} runs with a cold L2 cache, middle half in brackets.\n")
    print(f"Copy bandwidth {copy_bandwidth():.0f} GB/s.")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        print(f"\n{name}: matrix rate {matrix_rate(dtype):.1f} TFLOP/s.\n")
        print("| operator | shape | ms | GB/s | TFLOP/s |")
        print("|---|---|---|---|---|")
        for work in stages(False, dtype):
            if triton_ops.missing_kernel(work.op):
                print(f"| {work.op} | {work.shape} | {triton_ops.missing_kernel(work.op)} | | |")
                continue
            low, middle, high = statistics.quantiles(latencies(work.call), n=4)
            rate = f"{work.flops / middle / 1e9:.2f}" if work.flops else ""
            speed = f"{work.bytes / middle / 1e6:.1f}"
            print(f"| {work.op} | {work.shape} | {middle:.4f} ({low:.4f}–{high:.4f}) | {speed} | {rate} |", flush=True)
    print("\nGB/s and TFLOP/s count what an operator must at least move and multiply, not what it did.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="each stage once on small shapes, untimed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    if not options.small:
        print_tables()
        return
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for work in stages(True, dtype):
            if not triton_ops.missing_kernel(work.op):
                work.call()
                torch.cuda.synchronize()
                print(work.op, work.shape, dtype)


if __name__ == "__main__":
    main()
