"""Latency of every operator on this GPU, CUDA beside Triton and the published loops, with what the card itself can do.

`python -m benchmarks.gpu` prints Markdown tables; `--small` runs each operator once on small shapes, for the sanitizer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flashprune as fp
from benchmarks import machine
from benchmarks.peers import angelslim_idpruner, cdpruner, dense_mis, divprune, evs, vidcom2
from flashprune import dispatch

RUNS, WARM_UP, LOOP_RUNS = 25, 3, 3
SIZES = ((576, 64, 4096), (2880, 720, 4096), (16384, 1638, 3584))  # tokens N, kept K, features D
COLD = 256 << 20  # bytes written between runs, more than any L2 cache
STEP_NS = 55  # an estimate, for one of the dependent picks: see the note under the tables


class Stage(NamedTuple):
    """A call, with what it must at least do: bytes moved, flops of products, and picks one after the other."""

    op: str  # the operator, or of a method the selector in it
    shape: str
    call: Callable[[str], Tensor]  # of a backend's name
    bytes: int
    flops: int = 0
    steps: int = 0
    loop: Callable[[], Tensor] | None = None
    method: str = ""


class Card(NamedTuple):
    """What this GPU was measured to do."""

    bandwidth: float  # bytes a second, read and written
    flops: float  # of a large product, a second
    launch: float  # milliseconds of a graph's replay with one empty kernel

    def floor(self, stage: Stage) -> float:
        """Milliseconds."""
        work = max(stage.bytes / self.bandwidth, stage.flops / self.flops)
        return 1e3 * work + 1e-6 * STEP_NS * stage.steps + self.launch


def smooth(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and importance of n tokens that vary smoothly along a line, plus noise: redundant, as images are."""
    coarse = torch.randn(1, d + 1, max(2, n // 16), device="cuda")
    tokens = F.interpolate(coarse, size=n, mode="linear", align_corners=False)[0].T
    importance = tokens[:, -1]
    features = tokens[:, :-1] + 0.3 * torch.randn(n, d, device="cuda")
    return features.to(dtype).contiguous(), (importance - importance.min() + 1e-3).contiguous()


def selectors(n: int, k: int, dim: int, dtype: torch.dtype) -> Iterator[Stage]:
    x, scores = smooth(n, dim, dtype)
    read = x.nbytes + scores.nbytes + 8 * k
    products = 2 * n * k * dim  # every token against every pick, the most that exact greedy needs
    text = f"N={n} K={k} D={dim}"

    def stage(op: str, inputs: tuple[Tensor, ...], flops: int, loop: Callable[..., Tensor]) -> Stage:
        def call(backend: str) -> Tensor:
            return getattr(fp, op)(*inputs, k, backend=backend)

        return Stage(op, text, call, read, flops, k, lambda: loop(*inputs, k))

    yield Stage("topk_select", f"N={n} K={k}", lambda b: fp.topk_select(scores, k, backend=b), scores.nbytes + 8 * k)
    yield stage("mmr_select", (x, scores), products, angelslim_idpruner.mmr_loop)
    yield stage("mis_select", (x, scores), products, dense_mis.mis_loop)
    yield stage("maxmin_select", (x,), products + n * n * dim, divprune.maxmin_loop)
    yield stage("dpp_select", (x, scores), products, cdpruner.map_loop)
    yield from methods(x, scores, k, stage("mmr_select", (x, scores), products, angelslim_idpruner.idpruner))


def methods(x: Tensor, scores: Tensor, k: int, like: Stage) -> Iterator[Stage]:
    """Whole methods after the projector, D2Pruner with the attention of a prompt's last token."""

    def idpruner(backend: str) -> Tensor:
        return fp.idpruner(x, scores, k, backend=backend)

    yield like._replace(call=idpruner, method="idpruner")

    n, heads, kv_heads, d = len(x), 32, 8, 128
    query = torch.randn(1, heads, d, device="cuda", dtype=x.dtype)
    key = torch.randn(n + 100, kv_heads, d, device="cuda", dtype=x.dtype)
    prior = torch.full((n,), 1 / n, device="cuda")

    def d2pruner(backend: str) -> Tensor:
        attention = fp.query_attention(query, key, visual=slice(5, 5 + n), prior=prior, backend=backend)
        return fp.d2pruner(x, attention, k, backend=backend)

    def loop() -> Tensor:
        weights = torch.softmax(
            query.transpose(0, 1) @ key.permute(1, 2, 0).repeat_interleave(heads // kv_heads, 0), -1
        )
        return dense_mis.d2pruner(x, weights.mean((0, 1))[5 : 5 + n], k, prior=prior)

    read = like.bytes + key.nbytes
    yield like._replace(op="mis_select", call=d2pruner, bytes=read, loop=loop, method="d2pruner with attention")


def packed(small: bool, dim: int, dtype: torch.dtype) -> Stage:
    """The images of a request, each a segment."""
    sizes = [33, 0, 64, 7] if small else [196, 324, 256, 240, 300, 210, 324, 196, 288, 272, 256, 225, 312]
    ks = [n // 2 for n in sizes]
    bounds = torch.tensor([0, *sizes], device="cuda").cumsum(0, dtype=torch.int32)
    x, scores = smooth(sum(sizes), dim, dtype)

    def call(backend: str) -> Tensor:
        return fp.mmr_select(x, scores, ks, cu_seqlens=bounds, backend=backend)

    flops = sum(2 * n * k * dim for n, k in zip(sizes, ks, strict=True))
    text = f"{len(sizes)} images N={min(sizes)}–{max(sizes)} K=N/2 D={dim}"
    return Stage("mmr_select", text, call, x.nbytes + scores.nbytes + 8 * sum(ks), flops, max(ks))


def attention(n: int, small: bool, dtype: torch.dtype) -> Iterator[Stage]:
    def stage(op: str, shape: str, query: Tensor, key: Tensor, read: int, flops: int) -> Stage:
        return Stage(op, shape, lambda backend: getattr(fp, op)(query, key, backend=backend), read, flops)

    heads, kv_heads, d, length = (4, 2, 64, n) if small else (28, 4, 128, n + 512)
    query = torch.randn(1, heads, d, device="cuda", dtype=dtype)
    key = torch.randn(length, kv_heads, d, device="cuda", dtype=dtype)
    text = f"Lq=1 L={length} H={heads} Hkv={kv_heads} d={d}"
    yield stage("query_attention", text, query, key, key.nbytes + 4 * length, 2 * length * heads * d)
    heads, d = (4, 64) if small else (16, 80)
    query, key = torch.randn(2, n, heads, d, device="cuda", dtype=dtype)
    flops = 2 * 2 * n * n * heads * d  # the scores twice: for their sums, then by column
    yield stage("received_attention", f"N={n} H={heads} d={d}", query, key, 2 * key.nbytes + 4 * n, flops)


def videos(small: bool, dtype: torch.dtype) -> Iterator[Stage]:
    """A quarter of a video's tokens, beside the functions of vLLM."""
    q, dim = 0.75, 64 if small else 3584
    for thw in ((4, 5, 6),) if small else ((16, 14, 14), (64, 16, 16)):
        n = thw[0] * thw[1] * thw[2]
        x, _ = smooth(n, dim, dtype)
        text = f"T×H×W={thw[0]}×{thw[1]}×{thw[2]} K=N/4 D={dim}"
        for select, loop in ((fp.evs_select, evs.retention_mask), (fp.vidcom2_select, vidcom2.retention_mask)):
            call, peer = partial(select, x, thw, 1, q), partial(loop, x, thw, q)
            read = x.nbytes + 8 * (n // 4)
            yield Stage(select.__name__, text, lambda backend, call=call: call(backend=backend), read, loop=peer)


def stages(small: bool, dtype: torch.dtype) -> Iterator[Stage]:
    for n, k, dim in ((130, 33, 64),) if small else SIZES:
        yield from selectors(n, k, dim, dtype)
        yield from attention(n, small, dtype)
    yield packed(small, 64 if small else 3072, dtype)
    yield from videos(small, dtype)


def backends_of(stage: Stage) -> tuple[str, ...]:
    """The wide stages of the cuda backend are those of Triton."""
    return ("triton",) if stage.op in dispatch.WIDE else ("cuda", "triton")


def replay(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    call()  # compiles, and asks the device what it is
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def latencies(calls: dict[str, Callable[[], Any]], runs: int = RUNS) -> dict[str, list[float]]:
    """Milliseconds of each run on the device, the calls in turns, with a cold L2 cache."""
    scratch = torch.empty(COLD, dtype=torch.int8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(WARM_UP + runs):
        for name, call in calls.items():
            scratch.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if run >= WARM_UP:
                found[name].append(begin.elapsed_time(end))
    return found


def median(call: Callable[[], Any], runs: int = RUNS) -> float:
    return statistics.median(latencies({"": call}, runs)[""])


def measure_card(dtype: torch.dtype) -> Card:
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median(lambda: target.copy_(source)) * 1e3
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    flops = 2 * 8192**3 / median(lambda: a @ b) * 1e3
    one = torch.zeros(1, device="cuda")
    return Card(bandwidth, flops, median(replay(lambda: one.add_(1))))


def print_stage(stage: Stage, card: Card) -> None:
    name = stage.method or stage.op
    reasons = {backend: dispatch.unable(backend, stage.op) for backend in backends_of(stage)}
    graphs = {backend: replay(partial(stage.call, backend)) for backend, reason in reasons.items() if not reason}
    times = latencies(graphs)
    loop = median(stage.loop, LOOP_RUNS) if stage.loop and times else None
    floor = card.floor(stage)
    for backend, reason in reasons.items():
        if reason:
            print(f"| {name} | {stage.shape} | {backend} | {reason} | | | |", flush=True)
            continue
        low, middle, high = statistics.quantiles(times[backend], n=4)
        ratio = f"{loop / middle:.0f}" if loop else ""
        spread = f"{1e3 * middle:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"
        cells = (name, stage.shape, backend, spread, f"{1e3 * floor:.1f}", f"{100 * floor / middle:.0f}", ratio)
        print("|", " | ".join(cells), "|", flush=True)


def print_tables() -> None:
    import triton

    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {date.today()}, commit {machine.commit()}.")
    print(f"µs of a CUDA graph's replay, median of {RUNS} in turns with a cold L2 cache, middle half in brackets.")
    for dtype in (torch.bfloat16, torch.float32):
        card = measure_card(dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"\n{name}: copies {card.bandwidth / 1e9:.0f} GB/s, products {card.flops / 1e12:.1f} TFLOP/s, ", end="")
        print(f"an empty graph {1e3 * card.launch:.1f} µs.\n")
        print("| operator | shape | backend | µs | floor, µs | % of floor | × of the loop |")
        print("|---|---|---|---|---|---|---|")
        for stage in stages(False, dtype):
            print_stage(stage, card)
    print(
        "\nFloor: the larger of the least bytes at the copies' rate and the least flops at the products' rate, plus\n"
        f"an empty graph, plus {STEP_NS} ns for each pick that depends on the one before, an estimate. The loop\n"
        f"is the published one, re-written (benchmarks/peers): median of {LOOP_RUNS} runs outside a graph, for it\n"
        "synchronises."
    )


def run_small() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for stage in stages(True, dtype):
            for backend in backends_of(stage):
                if not dispatch.unable(backend, stage.op):
                    stage.call(backend)
                    torch.cuda.synchronize()
                    print(stage.method or stage.op, stage.shape, backend, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="each operator once on small shapes, untimed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    if options.small:
        run_small()
    else:
        print_tables()


if __name__ == "__main__":
    main()
