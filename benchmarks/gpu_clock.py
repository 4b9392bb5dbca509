"""Times on a CUDA device: quick variants as one graph that goes round several copies of the inputs, others by events.

A launch costs microseconds, as much as a quick kernel: a graph replays without it. Each call inside the graph reads
another copy of the inputs, more of them than the L2 cache holds, so that what is timed finds the cache cold; between
runs by events the cache is overwritten for the same reason. A variant that waits for the host cannot be captured and is
timed by events, its waiting included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .race import Race, Run, WallClock

QUICK = 200e-6  # seconds; below, a launch would be a good part of what is timed
COLD = 256 << 20  # bytes, more than any L2 cache
MOST_COPIES = 32


class GpuClock(WallClock):
    """`copies`: the race again on copies of its inputs, for a case whose inputs take ``input_bytes``."""

    def __init__(self, copy: Callable[[], Race], input_bytes: int) -> None:
        self._copy, self._input_bytes = copy, input_bytes
        self._copies: list[Race] = []
        self._before = 0
        self._scratch = torch.empty(COLD, dtype=torch.int8, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int | None:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept

    def peak_bytes(self) -> int | None:
        peak = torch.cuda.max_memory_allocated() - self._before
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return peak

    def sampler(self, race: Race, name: str, once: float) -> tuple[Callable[[], float], str]:
        run = race.variants[name]
        by_events = self._by_events(run)
        if min(once, by_events()) > QUICK:
            return by_events, "events, cold L2"
        try:
            return self._by_graph([run, *(copy.variants[name] for copy in self._races())])
        except RuntimeError:  # it waits for the host
            torch.cuda.synchronize()
            return by_events, "events, cold L2"

    def _races(self) -> list[Race]:
        wanted = min(MOST_COPIES, COLD // max(1, self._input_bytes))
        while len(self._copies) < wanted:
            self._copies.append(self._copy())
        return self._copies

    def _by_events(self, run: Run) -> Callable[[], float]:
        def sample() -> float:
            self._scratch.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            return 1e-3 * begin.elapsed_time(end)

        return sample

    def _by_graph(self, runs: list[Run]) -> tuple[Callable[[], float], str]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        replay = self._by_events(graph.replay)
        replay()
        cold = len(runs) * self._input_bytes >= COLD
        how = f"graph of {len(runs)} calls on as many inputs, L2 {'cold' if cold else 'cold for the first only'}"
        return lambda: replay() / len(runs), how
