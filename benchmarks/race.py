"""Variants of one case side by side: checked on the inputs first, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from flashprune.testing import check_selection

from . import machine
from .cases import Case

Run = Callable[[], Tensor]
OURS = "flashprune"
PRODUCTS = "[N,D]×[D,K] product"
SLOW = 2.0  # seconds, after which a variant is not run a second time before it is timed


@dataclass(frozen=True)
class Race:
    """What is timed on a case's inputs: ours, the peers (checked as ours is), and yardsticks, which choose nothing.

    ``needs``: bytes that a variant is known to take, where that may be more than there are.
    """

    ours: Run
    peers: dict[str, Run]
    check: Callable[[Tensor], str]  # what is wrong with an output; "" when it is right
    yardsticks: dict[str, Run] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)

    @property
    def variants(self) -> dict[str, Run]:
        return {OURS: self.ours, **self.peers, **self.yardsticks}


@dataclass
class Outcome:
    """Seconds of each variant's runs, or why it was not timed: it failed, or was left out."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)  # the samples were taken
    peaks: dict[str, int] = field(default_factory=dict)  # bytes above the inputs, where the device counts them

    def ratio(self, name: str, base: str = OURS) -> float | None:
        """How many times longer ``name`` takes than ``base``, of medians; None where either was not timed."""
        if name not in self.samples or base not in self.samples:
            return None
        return median(self.samples[name]) / median(self.samples[base])


class WallClock:
    """Times whole calls on the CPU. A GPU has a clock of its own, with the same methods (`gpu_clock`)."""

    def synchronize(self) -> None:
        """Wait for whatever was launched."""

    def free_bytes(self) -> int | None:
        return machine.free_bytes()

    def peak_bytes(self) -> int | None:
        """The most that was taken, above what was, since this was last asked; None where nobody counts."""
        return None

    def sampler(self, race: Race, name: str, once: float) -> tuple[Callable[[], float], str]:
        """What times one run of a variant that took ``once`` seconds when warm, and how it does so."""
        return partial(timed, race.variants[name]), "wall clock"


def products(case: Case, features: Tensor) -> dict[str, Run]:
    """The matrix work of a greedy selection that compares every token with every pick: K rows against all N."""
    images = features.split(list(case.sizes)) if case.sizes else [features]
    pairs = [(x, x[..., :k, :].transpose(-1, -2)) for x, (_, k) in zip(images, case.each[: len(images)], strict=True)]
    return {PRODUCTS: lambda: [x @ rows for x, rows in pairs][-1]}


def picks_check(method: str, *inputs: Tensor, **params: object) -> Callable[[Tensor], str]:
    """Replays picks in float64 (``flashprune.testing.check_selection``); equal picks are replayed once."""
    passed: list[Tensor] = []

    def check(picks: Tensor) -> str:
        if any(torch.equal(picks, known) for known in passed):
            return ""
        report = check_selection(method, *inputs, picks=picks, **params)
        if report.ok:
            passed.append(picks)
        return "" if report.ok else report.message

    return check


def qualify(
    race: Race, clock: WallClock | None = None, skip: Mapping[str, str] | None = None
) -> tuple[Outcome, dict[str, float]]:
    """Runs and checks every variant. Returns the outcome so far and the seconds of a run of those that passed."""
    clock = clock or WallClock()
    outcome, warmup = Outcome(left_out=dict(skip or {})), {}
    for name, run in race.variants.items():
        if name in outcome.left_out:
            continue
        problem = _lacks(race.needs.get(name, 0), clock.free_bytes())
        try:
            if not problem:
                clock.peak_bytes()  # from here on
                output, seconds = _run(run, clock)
                peak = clock.peak_bytes()
                problem = "" if name in race.yardsticks else race.check(output)
                del output
            if not problem:
                if peak is not None:
                    outcome.peaks[name] = peak
                # The first run also compiles and fills caches: a variant that is quick has a second one to judge by.
                warmup[name] = seconds if seconds > SLOW else _run(run, clock)[1]
        except Exception as error:  # a peer out of memory must not end the sweep
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if problem:
            outcome.failures[name] = problem
            warmup.pop(name, None)
    return outcome, warmup


def schedule(warmup: dict[str, float], seconds: float, least: int = 3, most: int = 15) -> list[str]:
    """Names in running order: about ``seconds`` of runs a variant, slow ones spread over the fast ones' rounds."""
    runs = {name: max(least, min(most, int(seconds / max(once, 1e-9)))) for name, once in warmup.items()}
    rounds = max(runs.values(), default=0)
    return [name for r in range(rounds) for name, n in runs.items() if (r + 1) * n // rounds > r * n // rounds]


def timed(run: Run) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def run(race: Race, seconds: float, clock: WallClock | None = None, skip: Mapping[str, str] | None = None) -> Outcome:
    """Checks, then times in turns: about ``seconds`` a variant, at least three runs of each."""
    clock = clock or WallClock()
    outcome, warmup = qualify(race, clock, skip)
    samplers = {}
    for name, once in warmup.items():
        samplers[name], outcome.how[name] = clock.sampler(race, name, once)
    outcome.samples = {name: [] for name in warmup}
    for name in schedule(warmup, seconds):
        outcome.samples[name].append(samplers[name]())
    return outcome


def _run(run: Run, clock: WallClock) -> tuple[Tensor, float]:
    start = perf_counter()
    output = run()
    clock.synchronize()
    return output, perf_counter() - start


def _lacks(need: int, free: int | None) -> str:
    """Why so many bytes cannot be had; "" where they can. Asked first, for Linux kills whoever takes too much."""
    if free is None or need <= free:
        return ""
    return f"out of memory: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
