"""Max-min (DivPrune) beside DivPrune's official loop."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case
from .peers import divprune
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, k = inputs["features"], case.k
    return Race(
        ours=lambda: fp.maxmin_select(x, k, sort=False, backend=backend),
        peers={"DivPrune loop": lambda: divprune.maxmin_loop(x, k)},
        yardsticks=products(x, k),
        check=picks_check("maxmin", x, k=k),
    )


RACES = {"maxmin": race}


def bench_maxmin(case, contest):
    contest(case, race)
