"""Max-min (DivPrune) beside DivPrune's official loop and AngelSlim's."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case, on_each, square_bytes
from .peers import angelslim_divprune, divprune
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, k, bounds = inputs["features"], case.budget, inputs.get("cu_seqlens")
    return Race(
        ours=lambda: fp.maxmin_select(x, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={
            "DivPrune loop": lambda: on_each(case, divprune.maxmin_loop, x),
            "AngelSlim loop": lambda: on_each(case, angelslim_divprune.maxmin_loop, x),
        },
        yardsticks=products(case, x),
        check=picks_check("maxmin", x, k=k, cu_seqlens=bounds),
        needs={"DivPrune loop": square_bytes(case), "AngelSlim loop": square_bytes(case, 2)},
    )


RACES = {"maxmin": race}


def bench_maxmin(case, contest):
    contest(case, race)
