"""The table: every case raced in one run, the machine named, as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import torch

from . import machine, memory
from .cases import CASES, HEADLINE, MEMORY, MEMORY_GOAL_MB, Case, inputs_of
from .ops import RACES, race_of
from .race import OURS, PRODUCTS, Outcome, Race, run

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("op", "N / D / K", "data", "flashprune, ms", "beside", "its time, ms", "ratio", "goal", "× products")
MEMORY_COLUMNS = ("op", "N / D / K", "data", "peak extra memory", "goal", "an N×N float32 matrix")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    cases = [case for case in (CASES if args.all else HEADLINE) if not args.op or case.op in args.op]
    text = [_heading(args.backend), ""]
    rows, failures = [], {}
    for case in cases:
        print(f"  {case} …", file=sys.stderr, flush=True)
        race = race_of(case, inputs_of(case), args.backend)
        outcome = run(race, args.seconds)
        rows += rows_of(case, race, outcome)
        failures.update({f"{case}: {name}": why for name, why in outcome.failures.items()})
    text += _markdown(COLUMNS, rows)
    wanted = [case for case in MEMORY if not args.op or case.op in args.op]
    if wanted and not args.no_memory and memory.supported():
        text += ["", *_markdown(MEMORY_COLUMNS, [memory_row(case, args.backend) for case in wanted])]
    if failures:
        text += ["", *(f"- FAILED, not timed: {name}: {why}" for name, why in failures.items())]
    print("\n".join(text))
    if args.write:
        file = RESULTS / f"{machine.slug()}-{machine.facts()['date']}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(text) + "\n")
        print(f"\nwritten to {file}", file=sys.stderr)
    return 1 if failures else 0


def rows_of(case: Case, race: Race, outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """A row a peer, and one for a yardstick that the case names a goal against."""
    products = outcome.ratio(OURS, PRODUCTS)
    for name in [*race.peers, *(name for name in race.yardsticks if name in case.goals)]:
        ratio, goal = outcome.ratio(name), case.goals.get(name)
        yield (
            case.op,
            _size(case),
            case.data if case.dtype is torch.float32 else f"{case.data}, {case.dtype_name}",
            _time(outcome, OURS),
            name,
            _time(outcome, name),
            "–" if ratio is None else f"{ratio:.1f} ×",
            "–" if goal is None else f"≥ {goal:g} ×: {'met' if ratio is not None and ratio >= goal else 'missed'}",
            "–" if products is None else f"{products:.2f}",
        )


def memory_row(case: Case, backend: str) -> tuple[str, ...]:
    print(f"  memory of {case} …", file=sys.stderr, flush=True)
    peak = memory.peak_extra_mb(case, backend)
    verdict = "met" if peak <= MEMORY_GOAL_MB else "missed"
    dense = f"{4 * case.n**2 / memory.MB:,.0f} MB"
    return case.op, _size(case), case.data, f"{_figure(peak)} MB", f"≤ {MEMORY_GOAL_MB} MB: {verdict}", dense


def _heading(backend: str) -> str:
    facts = machine.facts()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}; torch {facts['torch']}, "
        f"Python {facts['python']}; backend {backend}; commit {facts['commit']}; {facts['date']}.\n"
        "Medians (min–max) in ms of interleaved runs in one process, float32 unless said; each variant checked on the "
        f"inputs timed.\n“× products”: flashprune's time over one {PRODUCTS}."
    )


def _size(case: Case) -> str:
    return f"{case.n} / {case.d} / {case.k}"


def _time(outcome: Outcome, name: str) -> str:
    if name in outcome.failures:
        return "FAILED"
    ms = [1e3 * seconds for seconds in outcome.samples[name]]
    return f"{_figure(median(ms))} ({_figure(min(ms))}–{_figure(max(ms))})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    table = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = "-|-".join("-" * width for width in widths)
    return [f"| {lines[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in lines[1:])]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=sorted(RACES), help="only these ops")
    parser.add_argument("--all", action="store_true", help="all cases, not only those with a stated goal")
    parser.add_argument("--backend", default="cpu", help="flashprune backend to time (default: cpu)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on a variant of a case (default: 3)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/<machine>-<date>.md")
    return parser.parse_args(argv)
