"""Races one case after the other and keeps going: what cannot be timed becomes a row that says why.

A row is plain data, as results.json holds it: the case, its floor, and each variant with its raw samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashprune import dispatch

from . import floor, memory
from .cases import Case, inputs_of
from .ops import race_of
from .prefill import FULL_LAYERS, VICUNA_7B, saving
from .presets import PRESETS
from .race import OURS, Outcome, Race, WallClock, run

OPERATORS = {"d2pruner": "mis_select", "idpruner": "mmr_select"}  # the others are <op>_select, or are operators


@dataclass
class Sweep:
    """``backends``: flashprune's, the first is the one that ratios are of. A variant that would take longer than
    ``limit`` seconds, going by its time at fewer tokens and quadratic growth, is left out."""

    machine: floor.Machine
    device: str = "cpu"
    backends: Sequence[str] = ("cpu",)
    peers: bool = True
    seconds: float = 1.0
    limit: float = 10.0
    _known: dict[tuple[Any, ...], tuple[int, float]] = field(default_factory=dict)

    def rows(self, cases: Sequence[Case], began: Callable[[Case], None] = lambda case: None) -> Iterator[dict]:
        for case in cases:
            began(case)
            yield self.row(case)

    def row(self, case: Case) -> dict[str, Any]:
        try:
            race, clock = self._race(case)
            outcome = run(race, self.seconds, clock, self._too_long(case, race))
        except Exception as error:  # no such case, or no room for its inputs
            outcome = Outcome(failures={OURS: _reason(error)})
            race = None
        for name, samples in outcome.samples.items():
            self._known[self._key(case, name)] = (case.n, min(samples))
        return {
            "case": _case_facts(case),
            "backend": self._names(case)[0],
            "floor": None if race is None else _floor_facts(case, self.machine),
            "saving": _saving_facts(case),
            "variants": [_variant_facts(name, race, outcome, case) for name in _names(race, outcome)],
        }

    def _race(self, case: Case) -> tuple[Race, WallClock]:
        case.check()
        need, free = 3 * _input_bytes(case), WallClock().free_bytes()
        if free is not None and need > free:
            raise MemoryError(f"the inputs need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        inputs = {name: x.to(self.device) for name, x in inputs_of(case).items()}

        def race(inputs: dict[str, Tensor]) -> Race:
            first, *more = self._names(case)
            made = race_of(case, inputs, first)
            ours = {f"{OURS} {name}": race_of(case, inputs, name).ours for name in more}
            yardsticks = made.yardsticks if self.peers else {}
            return replace(made, peers={**ours, **(made.peers if self.peers else {})}, yardsticks=yardsticks)

        if self.device == "cpu":
            return race(inputs), WallClock()
        from .gpu_clock import GpuClock

        copy = {name: x.clone() for name, x in inputs.items()}
        return race(inputs), GpuClock(lambda: race({name: x.clone() for name, x in copy.items()}), _input_bytes(case))

    def _names(self, case: Case) -> list[str]:
        """The backends that run this op; the wide stages of the cuda backend are those of Triton."""
        operator = OPERATORS.get(case.op, case.op if case.heads > 1 else f"{case.op}_select")
        wide = operator in dispatch.WIDE
        return [name for name in self.backends if not (wide and name == "cuda" and len(self.backends) > 1)]

    def _key(self, case: Case, name: str) -> tuple[Any, ...]:
        return name, case.op, case.d, case.data, case.dtype, case.images, round(case.k / case.n, 2)

    def _too_long(self, case: Case, race: Race) -> dict[str, str]:
        skip = {}
        for name in race.variants:
            n, once = self._known.get(self._key(case, name), (case.n, 0.0))
            expected = once * (case.n / n) ** 2
            if case.n > n and expected > self.limit:
                skip[name] = f"about {expected:.0f} s expected, {once:.1f} s at N={n}; limit {self.limit:g} s"
        return skip


def peaks(row: dict[str, Any], case: Case, backend: str, names: Sequence[str]) -> None:
    """Adds the peak memory of variants on a CPU, each measured in a process of its own: for single images."""
    for variant in row["variants"]:
        if variant["name"] in names and variant["status"] == "timed":
            variant["peak_bytes"] = round(memory.peak_extra_mb(case, backend, variant["name"]) * memory.MB)


def _names(race: Race | None, outcome: Outcome) -> list[str]:
    return list(outcome.failures) if race is None else list(race.variants)


def _variant_facts(name: str, race: Race | None, outcome: Outcome, case: Case) -> dict[str, Any]:
    kind = "flashprune" if name.startswith(OURS) else "peer"
    if race is not None and name in race.yardsticks:
        kind = "yardstick"
    facts: dict[str, Any] = {"name": name, "kind": kind}
    if name in outcome.samples:
        facts |= {"status": "timed", "how": outcome.how[name], "seconds": outcome.samples[name]}
    elif name in outcome.failures:
        facts |= {"status": "failed", "why": outcome.failures[name]}
    else:
        facts |= {"status": "left out", "why": outcome.left_out[name]}
    if name in outcome.peaks:
        facts["peak_bytes"] = outcome.peaks[name]
    if name in case.goals:
        facts["goal"] = case.goals[name]
    return facts


def _case_facts(case: Case) -> dict[str, Any]:
    facts = {"op": case.op, "n": case.n, "d": case.d, "k": case.k, "images": case.images, "data": case.data}
    facts |= {"dtype": case.dtype_name, "heads": case.heads, "kv_heads": case.kv_heads or case.heads}
    facts |= {"preset": case.preset}
    return {**facts, "sizes": list(case.sizes)} if case.sizes else facts


def _floor_facts(case: Case, machine: floor.Machine) -> dict[str, float]:
    least = floor.floor_of(case, machine)
    prefill = VICUNA_7B if not case.preset else PRESETS[case.preset].model
    facts = {"read": least.read, "products": least.products, "launch": least.launch, "seconds": least.seconds}
    if prefill is not None:
        facts["prefill"] = case.batch * prefill.prefill_flops(case.n) / machine.matrix_rate
    return facts


def _saving_facts(case: Case) -> dict[str, Any] | None:
    """Of a preset's methods, in the LLM that follows."""
    model = PRESETS[case.preset].model if case.preset else None
    if model is None or case.heads > 1 or not 0 < case.k <= case.n:
        return None
    layers = FULL_LAYERS.get(case.op, 0)
    return {"model": model.name, "full_layers": layers, **vars(saving(model, case.n, case.k, layers))}


def _input_bytes(case: Case) -> int:
    tokens = case.n * (1 if case.sizes else case.batch)
    if case.heads > 1:
        return tokens * (case.heads + (case.kv_heads or case.heads)) * case.d * 4
    return tokens * (case.d + 1) * 4


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, ValueError):  # of the case itself, in a sentence
        return text
    full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
    return f"{'out of memory' if full else type(error).__name__}: {text}"
