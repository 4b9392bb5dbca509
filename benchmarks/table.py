"""Rows in words: the cells of the tables that the terminal, results.md and the report show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from .race import OURS, PRODUCTS
from .results import Change

COLUMNS = ("op", "N / D / K", "data", "variant", "ms, median (min–max)", "× flashprune", "% of floor", "% of prefill")
GOALS = ("op", "N / D / K", "data", "beside", "ratio", "goal", "flashprune ÷ products")
SAVINGS = ("preset", "op", "N → K", "LLM", "prefill, TFLOP", "saved", "KV cache, MB", "saved")
MEMORY = ("op", "N / D / K", "variant", "peak extra memory, MB", "an N×N float32 matrix, MB")
CHANGES = ("op", "N / D / K", "variant", "then, ms", "now, ms", "now ÷ then")
NONE = "–"


def heading(found: dict[str, Any]) -> str:
    facts, measured, settings = found["machine"], found["measured"], found["settings"]
    card = f"{facts['gpu']}, CUDA {facts['cuda']}; " if "gpu" in facts else ""
    return (
        f"{card}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}; torch "
        f"{facts['torch']}, Python {facts['python']}, flashprune {facts['flashprune']}; backend "
        f"{', '.join(settings['backends'])}; commit {facts['commit']}; {facts['date']}. Measured in this run: copies "
        f"{measured['bandwidth'] / 1e9:.3g} GB/s, products {measured['matrix_rate'] / 1e12:.3g} TFLOP/s, an empty call "
        f"{1e6 * measured['launch']:.2g} µs."
    )


LEGEND = (
    "Medians of interleaved runs in one process; each variant checked on the inputs timed, none that failed is timed.",
    "× flashprune: how many times longer than flashprune takes. % of floor: floor over time; the floor is reading the "
    "inputs once or every token times every pick, whichever takes longer at the rates measured, plus an empty call. "
    "The blocked engine proves part of those products unnecessary, so it can exceed 100 %.",
    "% of prefill: the time over a 7B model's prefill of the unpruned tokens, arithmetic at the measured matrix rate.",
)


def rows_of(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A tuple of cells a variant."""
    for variant in row["variants"]:
        share = least = NONE
        if variant["status"] == "timed" and row["floor"]:
            middle, floor = median(variant["seconds"]), row["floor"]
            least = _percent(floor["seconds"] / middle, 1)
            share = _percent(middle / floor["prefill"], 0.01) if "prefill" in floor else NONE
        ratio = _ratio(row, variant["name"])
        times = NONE if ratio is None or variant["name"] == OURS else f"{figure(ratio)} ×"
        case = row["case"]
        yield case["op"], size(case), data(case), variant["name"], time(variant), times, least, share


def goals(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What was wanted of the ratio to a peer or yardstick, and whether it is so."""
    for row in rows:
        work = _ratio(row, PRODUCTS)
        for variant in row["variants"]:
            if "goal" in variant:
                ratio, goal = _ratio(row, variant["name"]), variant["goal"]
                verdict = f"≥ {goal:g} ×: {'met' if ratio is not None and ratio >= goal else 'missed'}"
                shown = NONE if ratio is None else f"{figure(ratio)} ×"
                head = (row["case"]["op"], size(row["case"]), data(row["case"]), variant["name"])
                yield (*head, shown, verdict, NONE if work is None else f"{1 / work:.2f}")


def savings(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        saved = row["saving"]
        if saved and row["case"]["op"] in ("d2pruner", "idpruner"):
            case, before, after = row["case"], saved["flops_before"], saved["flops_after"]
            cache, left = saved["cache_before"], saved["cache_after"]
            yield (
                case["preset"], case["op"], f"{case['n']} → {case['k']}",
                f"{saved['model']}, {saved['full_layers']} layers full",
                f"{before / 1e12:.3g} → {after / 1e12:.3g}", f"{100 * (1 - after / before):.1f} %",
                f"{cache / 1e6:.0f} → {left / 1e6:.0f}", f"{100 * (1 - left / cache):.1f} %",
            )  # fmt: skip


def memory(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        for variant in row["variants"]:
            if "peak_bytes" in variant:
                peak = figure(variant["peak_bytes"] / 1e6)
                case = row["case"]
                yield case["op"], size(case), variant["name"], peak, figure(4 * case["n"] ** 2 / 1e6)


def problems(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line a variant that was not timed."""
    for row in rows:
        for variant in row["variants"]:
            if variant["status"] != "timed":
                what = "FAILED, not timed" if variant["status"] == "failed" else "left out"
                yield f"{what}: {row['case']['op']} {size(row['case'])}: {variant['name']}: {variant['why']}"


def changed(found: Sequence[Change], ratio: float) -> Iterator[tuple[str, ...]]:
    for change in found:
        now = NONE if change.new is None else figure(1e3 * change.new)
        verdict = change.why if change.ratio is None else f"{change.ratio:.2f}"
        mark = "  SLOWER" if change.worse(ratio) else ""
        case = change.case
        yield case["op"], size(case), change.name, figure(1e3 * change.old), now, verdict + mark


def markdown(found: dict[str, Any]) -> str:
    """results.md: small enough to keep in a repository."""
    rows = found["rows"]
    text = [heading(found), "", *(f"{line}  " for line in LEGEND)]
    tables = {
        COLUMNS: [cells for row in rows for cells in rows_of(row)],
        GOALS: list(goals(rows)),
        SAVINGS: list(savings(rows)),
        MEMORY: list(memory(rows)),
    }
    for columns, cells in tables.items():
        text += ["", *_markdown(columns, cells)] if cells else []
    lines = [f"- {line}" for line in problems(rows)]
    return "\n".join([*text, "", *lines] if lines else text) + "\n"


def size(case: dict[str, Any]) -> str:
    images = f", {case['images']} images" if case["images"] > 1 else ""
    d = f"{case['heads']}·{case['d']}" if case["heads"] > 1 else case["d"]
    return f"{case['n']} / {d} / {case['k']}{images}"


def data(case: dict[str, Any]) -> str:
    return case["data"] if case["dtype"] == "float32" else f"{case['data']}, {case['dtype']}"


def time(variant: dict[str, Any]) -> str:
    if variant["status"] != "timed":
        return "FAILED" if variant["status"] == "failed" else variant["status"]
    ms = [1e3 * seconds for seconds in variant["seconds"]]
    return f"{figure(median(ms))} ({figure(min(ms))}–{figure(max(ms))})"


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float, least: float) -> str:
    return f"{figure(100 * share)} %" if 100 * share >= least else f"<{least:g} %"


def _ratio(row: dict[str, Any], name: str) -> float | None:
    medians = {v["name"]: median(v["seconds"]) for v in row["variants"] if v["status"] == "timed"}
    return medians[name] / medians[OURS] if name in medians and OURS in medians else None


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [tuple(columns), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    widths = [max(len(row[c]) for row in table) for c in range(len(columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = "-|-".join("-" * width for width in widths)
    return [f"| {lines[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in lines[1:])]
