"""Independent set (α = 1) beside the dense matrix with a Python loop, and beside one N×N product alone."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case
from .peers import dense_mis
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, importance, k = inputs["features"], inputs["importance"], case.k
    return Race(
        ours=lambda: fp.mis_select(x, importance, k, sort=False, backend=backend),
        peers={"dense + Python MIS": lambda: dense_mis.mis_loop(x, importance, k)},
        yardsticks={"one N×N product": lambda: x @ x.T, **products(x, k)},
        check=picks_check("mis", x, importance, k=k),
    )


RACES = {"mis": race}


def bench_mis(case, contest):
    contest(case, race)
