"""`flashprune validate`: every operator, backend and dtype against the definition in float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import flashprune as fp
from flashprune import dispatch

from . import console
from .cases import ATTENTION, OPERATORS, Case, cases, log_sums
from .console import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "cpu", "triton", "cuda")
_ATTENTION_TOLERANCE = 2e-5  # of the largest score: float32 sums over at most a few thousand keys
_SHOWN_FAILURES = 20


@dataclass
class Tally:
    """One row of the table: the cases of an operator on one backend in one dtype."""

    op: str
    backend: str
    dtype: torch.dtype
    cases: int = 0
    largest: float = 0.0
    failures: list[str] = field(default_factory=list)


def validate(device: str, backend: str | None, only: str | None, seed: int, quick: bool) -> bool:
    """Run all cases, print the table and every failure; whether all passed.

    Raises InputError for a device or backend that is not there, or an unknown operator or case.
    """
    place = _device(device)
    op, number = _parse_only(only)
    chosen = _selected(op, number, seed, quick)
    plan = [
        (tally, chosen[name])
        for name in chosen
        for ran_by in _backends(place, backend, name)
        for tally in (Tally(name, ran_by, dtype) for dtype in DTYPES)
    ]
    started = time.perf_counter()
    with console.progress() as progress:
        bar = progress.add_task("validating", total=sum(len(work) for _, work in plan))
        for tally, work in plan:
            progress.update(bar, description=f"{tally.op} {tally.backend} {_name(tally.dtype)}")
            for case in work:
                _run(tally, case, place, f"--seed {seed}{' --quick' if quick else ''} --device {device}")
                progress.advance(bar)
    tallies = [tally for tally, _ in plan]
    _print(tallies, time.perf_counter() - started)
    return not any(tally.failures for tally in tallies)


def _device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU")
    return torch.device(device)


def _parse_only(only: str | None) -> tuple[str | None, int | None]:
    if only is None:
        return None, None
    op, _, number = only.partition(":")
    if op not in OPERATORS or (number and not number.isdecimal()):
        raise InputError(f"--only must be OP or OP:CASE with OP one of {', '.join(OPERATORS)}; got {only}")
    return op, int(number) if number else None


def _selected(op: str | None, number: int | None, seed: int, quick: bool) -> dict[str, list[Case]]:
    chosen = {name: list(cases(name, seed, quick)) for name in OPERATORS if op in (None, name)}
    if op is not None and number is not None:
        if number >= len(chosen[op]):
            raise InputError(f"--only {op}:{number}: {op} has the cases 0 to {len(chosen[op]) - 1}")
        chosen[op] = [chosen[op][number]]
    return chosen


def _backends(device: torch.device, backend: str | None, op: str) -> list[str]:
    """The backends to check on a device: the one asked for, or all that are ready there."""
    on_device = ("reference", "cpu") if device.type == "cpu" else ("reference", "triton", "cuda")
    if backend in (None, "auto"):
        return [name for name in on_device if _status(name, op) == "ready"]
    assert backend is not None
    if backend not in on_device:
        raise InputError(f"--backend {backend} does not serve --device {device.type}")
    if _status(backend, op) != "ready":
        raise InputError(f"--backend {backend}: {_status(backend, op)}")
    return [backend]


def _status(backend: str, op: str) -> str:
    # the attention operators are plain PyTorch on a CPU and need no native library
    if backend == "cpu" and op in ATTENTION:
        return "ready"
    return dispatch.unable(backend, op if op in ATTENTION else f"{op}_select") or "ready"


def _run(tally: Tally, case: Case, device: torch.device, options: str) -> None:
    tally.cases += 1
    inputs = tuple(x.to(device, tally.dtype) for x in case.inputs)
    params = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.params.items()}
    check = _check_attention if case.op in ATTENTION else _check_selector
    try:
        size, complaint = check(case, inputs, params, tally.backend)
    except Exception as error:  # whatever an operator raises on valid input is a failure of this case, not of the rest
        size, complaint = 0.0, f"{type(error).__name__}: {error}"
    tally.largest = max(tally.largest, size)
    if complaint:
        again = f"flashprune validate --only {case.op}:{case.number} --backend {tally.backend} {options}"
        line = f"{case.op}:{case.number} {tally.backend} {_name(tally.dtype)}: {case.text}: {complaint}"
        tally.failures.append(f"{console.one_line(line)}\n    {again}")


def _check_selector(case: Case, inputs: tuple[Tensor, ...], params: dict[str, Any], backend: str) -> tuple[float, str]:
    """The largest regret, and what is wrong with the picks ("" when nothing is)."""
    name = f"{case.op}_select"
    picks = getattr(fp, name)(*inputs, **params, sort=False, backend=backend)
    if case.exact:
        expected = getattr(fp.reference, name)(*(x.double() for x in inputs), **params, sort=False)
        if not torch.equal(picks, expected):
            return 0.0, _first_difference(picks, expected)
    report = fp.testing.check_selection(case.op, *inputs, picks=picks, **params)
    return report.largest_regret, "" if report.ok else report.message


def _check_attention(case: Case, inputs: tuple[Tensor, ...], params: dict[str, Any], backend: str) -> tuple[float, str]:
    """The largest error relative to the largest score, and what is wrong ("" when nothing is)."""
    if "lse" in params:
        params["lse"] = log_sums(case, *inputs)
    got = getattr(fp, case.op)(*inputs, **params, backend=backend)
    exact = {name: x.double() if name in ("lse", "prior") else x for name, x in params.items()}
    expected = getattr(fp.reference, case.op)(*(x.double() for x in inputs), **exact)
    if got.shape != expected.shape:
        return 0.0, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    if expected.numel() == 0:
        return 0.0, ""
    errors = (got.double() - expected).abs() / expected.abs().max()
    worst = int(errors.argmax())
    error = float(errors.flatten()[worst])
    if error <= _ATTENTION_TOLERANCE:
        return error, ""
    values = f"{float(got.flatten()[worst]):.6g}, expected {float(expected.flatten()[worst]):.6g}"
    return error, f"score {worst} is {values}: off by {error:.1e} of the largest, {_ATTENTION_TOLERANCE:.0e} allowed"


def _first_difference(picks: Tensor, expected: Tensor) -> str:
    if picks.shape != expected.shape or picks.dtype != expected.dtype:
        return f"returned {picks.dtype} {list(picks.shape)}, expected {expected.dtype} {list(expected.shape)}"
    place = int((picks.flatten() != expected.flatten()).nonzero()[0])
    got, wanted = int(picks.flatten()[place]), int(expected.flatten()[place])
    return f"pick {place} is token {got}, expected {wanted} (exact numbers: no rounding can explain it)"


def _print(tallies: list[Tally], seconds: float) -> None:
    screen = console.stdout()
    screen.print(_table(tallies))
    failures = [line for tally in tallies for line in tally.failures]
    for line in failures[:_SHOWN_FAILURES]:
        screen.print(f"FAILED {line}", soft_wrap=True, style="red")
    if len(failures) > _SHOWN_FAILURES:
        screen.print(f"... and {len(failures) - _SHOWN_FAILURES} more failures")
    total = sum(tally.cases for tally in tallies)
    verdict = f"{len(failures)} of {total} cases failed" if failures else f"all {total} cases passed"
    screen.print(f"{verdict} in {seconds:.1f} s", style="bold red" if failures else "bold green")


def _table(tallies: list[Tally]) -> Table:
    table = console.table("Against the definition in float64")
    for heading in ("operator", "backend", "dtype"):
        table.add_column(heading)
    for heading in ("cases", "failures", "largest regret"):
        table.add_column(heading, justify="right")
    for i, tally in enumerate(tallies):
        last = i + 1 == len(tallies) or tallies[i + 1].op != tally.op
        failed = str(len(tally.failures))
        row = (tally.op, tally.backend, _name(tally.dtype), str(tally.cases), failed, f"{tally.largest:.1e}")
        table.add_row(*row, style="red" if tally.failures else None, end_section=last)
    table.caption = "Regret: what a pick lost against the best in float64; for attention, relative error."
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
