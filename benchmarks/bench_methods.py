"""Whole methods after attention or scorer: IDPruner beside AngelSlim's loop, D2Pruner beside the reproductions'."""

from __future__ import annotations

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case, on_each, square_bytes
from .peers import angelslim_idpruner, dense_mis
from .race import Race, picks_check, products

PIVOT_RATIO = 0.7


def idpruner_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, scores, bounds = inputs["features"], inputs["importance"], inputs.get("cu_seqlens")
    k = case.budget
    return Race(
        ours=lambda: fp.idpruner(x, scores, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={"AngelSlim loop": lambda: on_each(case, angelslim_idpruner.idpruner, x, scores)},
        yardsticks=products(case, x),
        check=picks_check("mmr", x, fp.minmax(scores, cu_seqlens=bounds), k=k, cu_seqlens=bounds),
        needs={"AngelSlim loop": square_bytes(case, 1)},
    )


def d2pruner_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, attention, bounds = inputs["features"], inputs["importance"], inputs.get("cu_seqlens")
    k = case.budget
    # Attention grows towards the end of the image.
    priors = torch.cat([torch.linspace(0.5, 1.5, n) / n for n, _ in case.each]).to(x.device).view_as(attention)
    pivots = [int(k * PIVOT_RATIO) for k in case.keeps] if case.sizes else int(case.k * PIVOT_RATIO)
    settings = {"prior": priors, "pivot_ratio": PIVOT_RATIO}

    def reproduction(x: Tensor, attention: Tensor, prior: Tensor, k: int) -> Tensor:
        return dense_mis.d2pruner(x, attention, k, prior=prior, pivot_ratio=PIVOT_RATIO)

    return Race(
        ours=lambda: fp.d2pruner(x, attention, k, cu_seqlens=bounds, sort=False, backend=backend, **settings),
        peers={"dense + Python MIS": lambda: on_each(case, reproduction, x, attention, priors)},
        yardsticks=products(case, x),
        check=picks_check("mis", x, fp.debias(attention, priors), k=k, pivots=pivots, cu_seqlens=bounds),
        needs={"dense + Python MIS": square_bytes(case, 1.5)},
    )


RACES = {"idpruner": idpruner_race, "d2pruner": d2pruner_race}


def bench_methods(case, contest):
    contest(case, RACES[case.op])
