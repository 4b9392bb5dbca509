"""Whole methods after attention or scorer: IDPruner beside AngelSlim's loop, D2Pruner beside the reproductions'."""

from __future__ import annotations

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case
from .peers import angelslim_idpruner, dense_mis
from .race import Race, picks_check, products

PIVOT_RATIO = 0.7


def idpruner_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, scores, k = inputs["features"], inputs["importance"], case.k
    return Race(
        ours=lambda: fp.idpruner(x, scores, k, sort=False, backend=backend),
        peers={"AngelSlim loop": lambda: angelslim_idpruner.idpruner(x, scores, k)},
        yardsticks=products(x, k),
        check=picks_check("mmr", x, fp.minmax(scores), k=k),
    )


def d2pruner_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    x, attention, k = inputs["features"], inputs["importance"], case.k
    prior = torch.linspace(0.5, 1.5, case.n) / case.n  # attention grows towards the end of the image
    pivots = int(k * PIVOT_RATIO)
    return Race(
        ours=lambda: fp.d2pruner(x, attention, k, prior=prior, pivot_ratio=PIVOT_RATIO, sort=False, backend=backend),
        peers={"dense + Python MIS": lambda: dense_mis.d2pruner(x, attention, k, prior=prior, pivot_ratio=PIVOT_RATIO)},
        yardsticks=products(x, k),
        check=picks_check("mis", x, fp.debias(attention, prior), k=k, pivots=pivots),
    )


RACES = {"idpruner": idpruner_race, "d2pruner": d2pruner_race}


def bench_methods(case, contest):
    contest(case, RACES[case.op])
