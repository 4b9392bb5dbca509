"""EVS beside vLLM's function; both give the retention mask of one video."""

from __future__ import annotations

from torch import Tensor

from .cases import Case
from .peers import evs
from .race import Race
from .videos import video_race


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    return video_race(case, inputs, backend, evs.retention_mask, "vLLM")


RACES = {"evs": race}


def bench_evs(case, contest):
    contest(case, race)
