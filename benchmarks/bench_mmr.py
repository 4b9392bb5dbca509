"""MMR beside AngelSlim's loop."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case
from .peers import angelslim_idpruner
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, importance, k = inputs["features"], inputs["importance"], case.k
    return Race(
        ours=lambda: fp.mmr_select(x, importance, k, sort=False, backend=backend),
        peers={"AngelSlim loop": lambda: angelslim_idpruner.mmr_loop(x, importance, k)},
        yardsticks=products(x, k),
        check=picks_check("mmr", x, importance, k=k),
    )


RACES = {"mmr": race}


def bench_mmr(case, contest):
    contest(case, race)
