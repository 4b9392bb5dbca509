"""`flashprune bench`: races flashprune and the published loops, prints the table and writes the files of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

import flashprune as fp

from ..benchmarks import floor, memory, plan, results, sweep, table
from ..benchmarks.cases import Case
from ..benchmarks.race import OURS
from . import console
from .console import INTERRUPTED, InputError
from .files import check_folder_name, write_whole
from .variants import read_keep

MEMORY_OPS = ("mmr", "mis", "maxmin", "dpp")  # whose peers hold N×N matrices


@dataclass(frozen=True)
class Options:
    """What the user asked for, lists still as text."""

    op: str | None = None
    device: str = "cpu"
    backend: str | None = None
    tokens: str | None = None
    dim: int | None = None
    keep: str | None = None
    batch: str | None = None
    dtype: str = "float32"
    preset: str | None = None
    peers: bool = True
    memory: bool = True
    seconds: float = 1.0
    limit: float = 10.0
    out: Path | None = None
    compare: Path | None = None
    ratio: float = 1.2


def bench(options: Options) -> bool:
    """Race, print, write; whether flashprune was right everywhere and nowhere slower than ``compare`` allows.

    Raises InputError for options that make no sense; a size that fails is a row of the table instead. A run that the
    user interrupts prints and writes what it has, and exits with 130.
    """
    cases = _cases(options)
    backends = _backends(options)
    old = None if options.compare is None else _read(options.compare)
    if options.out is not None:
        _prepare(options.out)
    screen = console.stdout()
    rows, measured, interrupted = _run(options, cases, backends)
    if interrupted and not rows:
        raise typer.Exit(INTERRUPTED)
    settings = {"backends": backends, "seconds": options.seconds, "limit": options.limit, "preset": options.preset}
    found = results.document(rows, measured, options.device, settings)
    _print(screen, found)
    if options.out is not None:
        _write(screen, options.out, found)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    slower = old is not None and _compare(screen, old, found, options.ratio)
    wrong = [v for row in rows for v in row["variants"] if v["kind"] == "flashprune" and v["status"] == "failed"]
    return not wrong and not slower


def _cases(options: Options) -> list[Case]:
    for name in ("seconds", "limit", "ratio"):
        value = getattr(options, name)
        if not math.isfinite(value) or value < 0:
            raise InputError(f"--{name} must be a number of at least 0, got {value:g}")
    wanted = plan.Wanted(
        ops=tuple(_split("op", options.op, str)),
        tokens=tuple(_split("tokens", options.tokens, int)),
        dim=options.dim,
        keep=tuple(_split("keep", options.keep, read_keep)),
        batch=tuple(_split("batch", options.batch, int)),
        dtype=options.dtype,
        preset=options.preset,
    )
    try:
        cases: list[Case] = plan.cases(wanted)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    reasons = [reason for reason in map(_impossible, cases) if reason]
    if reasons and len(reasons) == len(cases):  # nothing is left to race
        raise InputError(reasons[0])
    return cases


def _impossible(case: Case) -> str:
    try:
        case.check()
    except ValueError as error:
        return f"--{error}"
    return ""


def _split(name: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    if text is None:
        return []
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} must be {expected} with commas between, got {text}") from None


def _backends(options: Options) -> list[str]:
    """The backends that run on the device, the one that ratios are of first."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU")
    serving = ("cpu", "reference") if options.device == "cpu" else ("cuda", "triton", "reference")
    status = fp.backends()
    if options.backend is None:
        ready = [name for name in serving[:-1] if status[name] == "ready"]
        if not ready:
            why = "; ".join(f"{name}: {status[name]}" for name in serving[:-1])
            raise InputError(f"no fast backend on {options.device} ({why}); --backend reference times the slow one")
        return ready
    asked: list[str] = _split("backend", options.backend, str)
    for name in asked:
        if name not in serving:
            raise InputError(f"--backend {name} does not serve --device {options.device}: {', '.join(serving)} do")
        if status[name] != "ready":
            raise InputError(f"--backend {name}: {status[name]}")
    return list(dict.fromkeys(asked))


def _run(options: Options, cases: Sequence[Case], backends: list[str]) -> tuple[list[dict[str, Any]], Any, bool]:
    """What was raced, what the machine can do, and whether the user ended it."""
    rows: list[dict[str, Any]] = []
    interrupted = False
    with console.progress() as progress:
        bar = progress.add_task("measuring the machine", total=len(cases))
        measured = floor.measure(options.device, cases[0].dtype)
        racing = sweep.Sweep(measured, options.device, backends, options.peers, options.seconds, options.limit)
        try:
            for row in racing.rows(cases, lambda case: progress.update(bar, description=str(case))):
                rows.append(row)
                progress.advance(bar)
            if options.memory and options.device == "cpu" and memory.supported():
                _measure_memory(cases, rows, backends[0], lambda text: progress.update(bar, description=text))
        except KeyboardInterrupt:
            screen = Console(stderr=True)
            screen.print(f"interrupted: {len(rows)} of {len(cases)} cases were raced", markup=False)
            interrupted = True
    return rows, measured, interrupted


def _measure_memory(cases: Sequence[Case], rows: list[dict[str, Any]], backend: str, began: Any) -> None:
    """Of each selector at its largest single image, for a process apiece takes seconds."""
    for op in MEMORY_OPS:
        single = [
            (case, row)
            for case, row in zip(cases, rows, strict=False)
            if case.op == op and case.images == 1 and row["floor"]
        ]
        if single:
            case, row = max(single, key=lambda pair: pair[0].n)
            began(f"memory of {case}")
            names = [v["name"] for v in row["variants"] if v["kind"] != "yardstick" and v["name"] != "compiled step"]
            sweep.peaks(row, case, backend, [name for name in names if name == OURS or OURS not in name])


def _print(screen: Console, found: dict[str, Any]) -> None:
    screen.print(table.heading(found))
    drawn = console.table("")
    drawn.title = None
    drawn.add_column("op N/D/K")
    for column in ("ms, median (min–max)", "× ours", "% floor", "% prefill"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        cells = list(table.rows_of(row))
        op, size, data, *_ = cells[0]
        drawn.add_row(f"{op} {size.replace(' / ', '/')} {data}", style="bold")
        for i, cell in enumerate(cells):
            failed = cell[4] == "FAILED"
            style = "red" if failed else None if cell[3].startswith(OURS) else "dim"
            drawn.add_row(f" {cell[3]}", *cell[4:], style=style, end_section=i + 1 == len(cells))
    screen.print(drawn)
    _print_table(screen, "Ratios that were wanted", table.GOALS, table.goals(found["rows"]))
    _print_table(screen, "What pruning saves in the LLM (arithmetic)", table.SAVINGS, table.savings(found["rows"]))
    _print_table(screen, "Memory", table.MEMORY, table.memory(found["rows"]))
    for line in table.problems(found["rows"]):
        screen.print(console.one_line(line), soft_wrap=True, style="red" if line.startswith("FAILED") else "dim")
    for line in table.LEGEND:
        screen.print(line, style="dim")


def _print_table(screen: Console, title: str, columns: Sequence[str], rows: Any) -> None:
    drawn = console.table(title)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    if drawn.row_count:
        screen.print(drawn)


def _prepare(out: Path) -> None:
    """The folder, before any work is done."""
    check_folder_name(out, "--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from None


def _write(screen: Console, out: Path, found: dict[str, Any]) -> None:
    """The raw samples first: nothing that fails later can lose them."""
    from ..benchmarks import figure, report

    write_whole(out / "results.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    png, svg = figure.draw(found)
    files = {
        "results.md": table.markdown(found).encode(),
        "latency.png": png,
        "latency.svg": svg,
        "report.html": report.html(found, svg).encode(),
    }
    for name, data in files.items():
        write_whole(out / name, data)
    names = ", ".join(["results.json", *files])
    screen.print(f"wrote {names} into {out}", soft_wrap=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results.check(found)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"--compare {path}: {reason}") from None
    return found


def _compare(screen: Console, old: dict[str, Any], new: dict[str, Any], ratio: float) -> bool:
    """Whether anything of ours is slower than ``ratio`` times what it was."""
    changes = results.changes(old, new)
    if not changes:
        raise InputError("--compare: the older results have no case in common with this run")
    for name in ("cpu", "gpu", "cores", "threads"):
        before, now = old["machine"].get(name), new["machine"].get(name)
        if before != now:
            screen.print(f"another machine: {name} was {before}, is {now}", soft_wrap=True)
    title = f"Against commit {old['machine'].get('commit')}, {old['machine'].get('date')}: at most {ratio:g} × allowed"
    _print_table(screen, title, table.CHANGES, table.changed(changes, ratio))
    slower = sum(change.worse(ratio) for change in changes)
    verdict = f"{slower} slower than {ratio:g} × what they were" if slower else "none of ours is slower"
    screen.print(verdict, style="bold red" if slower else "bold green")
    return slower > 0
