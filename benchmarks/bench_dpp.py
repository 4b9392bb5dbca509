"""Greedy DPP (CDPruner) beside CDPruner's official loop and our reference's step compiled."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case, on_each, square_bytes
from .peers import cdpruner, compiled
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, relevance, bounds = inputs["features"], inputs["importance"], inputs.get("cu_seqlens")
    k = case.budget

    def official() -> Tensor:
        if case.batch > 1:
            return cdpruner.map_loop_batched(x, relevance, case.k)
        return on_each(case, cdpruner.map_loop, x, relevance)

    return Race(
        ours=lambda: fp.dpp_select(x, relevance, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={
            "CDPruner loop": official,
            "compiled step": lambda: on_each(case, compiled.map_loop, x, relevance),
        },
        yardsticks=products(case, x),
        check=picks_check("dpp", x, relevance, k=k, cu_seqlens=bounds),
        needs={"CDPruner loop": square_bytes(case, together=True)},
    )


RACES = {"dpp": race}


def bench_dpp(case, contest):
    contest(case, race)
