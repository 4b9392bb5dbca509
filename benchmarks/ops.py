"""Every op's race, by name."""

from __future__ import annotations

from torch import Tensor

from . import (
    bench_dpp,
    bench_evs,
    bench_importance,
    bench_maxmin,
    bench_methods,
    bench_mis,
    bench_mmr,
    bench_topk,
    bench_vidcom2,
)
from .cases import Case
from .race import Race

_MODULES = (
    bench_topk,
    bench_mmr,
    bench_mis,
    bench_maxmin,
    bench_dpp,
    bench_importance,
    bench_methods,
    bench_evs,
    bench_vidcom2,
)
RACES = {op: race for module in _MODULES for op, race in module.RACES.items()}


def race_of(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    return RACES[case.op](case, inputs, backend)
