"""Greedy DPP (CDPruner) beside CDPruner's official loop."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case
from .peers import cdpruner
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, relevance, k = inputs["features"], inputs["importance"], case.k
    return Race(
        ours=lambda: fp.dpp_select(x, relevance, k, sort=False, backend=backend),
        peers={"CDPruner loop": lambda: cdpruner.map_loop(x, relevance, k)},
        yardsticks=products(x, k),
        check=picks_check("dpp", x, relevance, k=k),
    )


RACES = {"dpp": race}


def bench_dpp(case, contest):
    contest(case, race)
