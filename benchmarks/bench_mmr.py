"""MMR beside AngelSlim's loop, UniAttn's batched loop or fused kernel, and our reference's step compiled."""

from __future__ import annotations

from torch import Tensor

import flashprune as fp

from .cases import Case, on_each, square_bytes
from .peers import angelslim_idpruner, compiled, uniattn
from .race import Race, picks_check, products


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, importance, bounds = inputs["features"], inputs["importance"], inputs.get("cu_seqlens")
    k = case.budget

    def batched() -> Tensor:
        if case.sizes:
            return uniattn.mmr_ragged(x, importance, case.sizes, case.keeps)
        return (uniattn.mmr_batched if case.batch > 1 else uniattn.mmr_loop)(x, importance, case.k)

    return Race(
        ours=lambda: fp.mmr_select(x, importance, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={
            "AngelSlim loop": lambda: on_each(case, angelslim_idpruner.mmr_loop, x, importance),
            "UniAttn": batched,
            "compiled step": lambda: on_each(case, compiled.mmr_loop, x, importance),
        },
        yardsticks=products(case, x),
        check=picks_check("mmr", x, importance, k=k, cu_seqlens=bounds),
        needs={"AngelSlim loop": square_bytes(case, 1), "UniAttn": square_bytes(case, 1, together=True)},
    )


RACES = {"mmr": race}


def bench_mmr(case, contest):
    contest(case, race)
