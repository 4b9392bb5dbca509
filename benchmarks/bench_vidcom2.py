"""VidCom2 beside vLLM's function; both give the retention mask of one video."""

from __future__ import annotations

from torch import Tensor

from .cases import Case
from .peers import vidcom2
from .race import Race
from .videos import video_race


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    return video_race(case, inputs, backend, vidcom2.retention_mask, "vLLM")


RACES = {"vidcom2": race}


def bench_vidcom2(case, contest):
    contest(case, race)
