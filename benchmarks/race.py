"""Variants of one case side by side: checked on the inputs first, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from flashprune.testing import check_selection

Run = Callable[[], Tensor]
OURS = "flashprune"
PRODUCTS = "[N,D]×[D,K] product"


@dataclass(frozen=True)
class Race:
    """What is timed on a case's inputs: ours, the peers (checked as ours is), and yardsticks, which choose nothing."""

    ours: Run
    peers: dict[str, Run]
    check: Callable[[Tensor], str]  # what is wrong with an output; "" when it is right
    yardsticks: dict[str, Run] = field(default_factory=dict)

    @property
    def variants(self) -> dict[str, Run]:
        return {OURS: self.ours, **self.peers, **self.yardsticks}


@dataclass
class Outcome:
    """Seconds of each variant's runs, or why it was not timed."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, base: str = OURS) -> float | None:
        """How many times longer ``name`` takes than ``base``, of medians; None where either was not timed."""
        if name not in self.samples or base not in self.samples:
            return None
        return median(self.samples[name]) / median(self.samples[base])


def products(features: Tensor, k: int) -> dict[str, Run]:
    """The least matrix work of a greedy selection: K rows against all N."""
    rows = features[:k].T
    return {PRODUCTS: lambda: features @ rows}


def picks_check(method: str, *inputs: Tensor, k: int, **params: object) -> Callable[[Tensor], str]:
    """Replays picks in float64 (``flashprune.testing.check_selection``); equal picks are replayed once."""
    passed: list[Tensor] = []

    def check(picks: Tensor) -> str:
        if any(torch.equal(picks, known) for known in passed):
            return ""
        report = check_selection(method, *inputs, picks=picks, k=k, **params)
        if report.ok:
            passed.append(picks)
        return "" if report.ok else report.message

    return check


def qualify(race: Race) -> tuple[Outcome, dict[str, float]]:
    """Runs and checks every variant once. Returns the failures and the warm-up seconds of those that passed."""
    outcome, warmup = Outcome(), {}
    for name, run in race.variants.items():
        start = perf_counter()
        try:
            output = run()
            warmup[name] = perf_counter() - start
            problem = "" if name in race.yardsticks else race.check(output)
        except Exception as error:  # a peer out of memory must not end the sweep
            problem = f"{type(error).__name__}: {error}"
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


def run(race: Race, seconds: float) -> Outcome:
    """Checks, then times in turns: about ``seconds`` a variant, at least three runs of each."""
    outcome, warmup = qualify(race)
    outcome.samples = {name: [] for name in warmup}
    for name in schedule(warmup, seconds):
        outcome.samples[name].append(timed(race.variants[name]))
    return outcome
