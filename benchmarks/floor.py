"""What no selection can be faster than, from what this machine was measured to do in the same run.

The floor leaves out that each pick depends on the one before: it is the larger of reading every input once at the speed
of a copy and of multiplying every token with every pick at the speed of a large matrix product, plus one launch. The
second is what an exact greedy selection does that compares every token with every pick. The blocked engine proves some
of that unnecessary, so on redundant images it can fall below this line; below `read` nothing can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from .cases import Case

RUNS = 5
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes, more than any cache
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is timed
LAUNCHES = 100


@dataclass(frozen=True)
class Machine:
    """Measured: bytes read and written a second, flops of a product a second, seconds of a call that does nothing."""

    bandwidth: float
    matrix_rate: float
    launch: float


@dataclass(frozen=True)
class Floor:
    """Seconds."""

    read: float
    products: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.read, self.products) + self.launch


def work(case: Case) -> tuple[int, int]:
    """The least bytes moved, and the flops of the products of a selection that compares every token with every pick."""
    each = case.each
    tokens, kept = sum(n for n, _ in each), sum(k for _, k in each)
    if case.op == "topk":
        return 4 * tokens + 8 * kept, 0
    if case.op in ("query_attention", "received_attention"):
        key = tokens * (case.kv_heads or case.heads) * case.d * case.dtype.itemsize
        if case.op == "query_attention":
            return key + 4 * tokens, 2 * tokens * case.heads * case.d
        query = tokens * case.heads * case.d * case.dtype.itemsize
        # The scores twice: for the sums of their rows, then by column.
        return key + query + 4 * tokens, 4 * sum(n * n for n, _ in each) * case.heads * case.d
    if case.op in ("evs", "vidcom2"):
        return tokens * case.d * case.dtype.itemsize + 8 * kept, 0
    flops = 2 * case.d * sum(n * k for n, k in each)
    if case.op == "maxmin":  # the first pick is the token farthest from its nearest other one: half of all pairs
        flops += case.d * sum(n * n for n, _ in each)
    importance = 0 if case.op == "maxmin" else 4 * tokens
    return tokens * case.d * case.dtype.itemsize + importance + 8 * kept, flops


def floor_of(case: Case, machine: Machine) -> Floor:
    moved, flops = work(case)
    return Floor(moved / machine.bandwidth, flops / machine.matrix_rate, machine.launch)


def measure(device: str, dtype: torch.dtype) -> Machine:
    """Medians on ``device``; on a CPU, where products in half precision may be slower, the better of both rates."""
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}
    rate = max(_matrix_rate(device, each) for each in dtypes)
    one = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return Machine(_bandwidth(device), rate, _seconds(launches, device) / LAUNCHES)


def _bandwidth(device: str) -> float:
    source = torch.ones(COPIED[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    side = SIDE[device]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def _seconds(call: Callable[[], object], device: str) -> float:
    def once() -> float:
        start = perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    once()
    return median(once() for _ in range(RUNS))
