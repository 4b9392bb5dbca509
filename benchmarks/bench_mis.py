"""Independent set (α = 1) beside the dense matrix with a Python loop, an NMS sweep, and one N×N product alone."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case, on_each, square_bytes
from .peers import dense_mis, nms_mis
from .race import Race, picks_check, products

ALL_PAIRS = "one N×N product"


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, importance, bounds = inputs["features"], inputs["importance"], inputs.get("cu_seqlens")
    k = case.budget
    squares = {} if case.sizes else {ALL_PAIRS: lambda: x @ x.transpose(-1, -2)}
    return Race(
        ours=lambda: fp.mis_select(x, importance, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={
            "dense + Python MIS": lambda: on_each(case, dense_mis.mis_loop, x, importance),
            "NMS sweep": lambda: on_each(case, nms_mis.mis_sweep, x, importance),
        },
        yardsticks={**squares, **products(case, x)},
        check=picks_check("mis", x, importance, k=k, cu_seqlens=bounds),
        needs={
            "dense + Python MIS": square_bytes(case, 1.5),
            "NMS sweep": square_bytes(case, 2),
            ALL_PAIRS: square_bytes(case, 1, together=True),
        },
    )


RACES = {"mis": race}


def bench_mis(case, contest):
    contest(case, race)
