"""Top-k beside torch.topk, which leaves the order of equal scores open."""

from __future__ import annotations

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case
from .race import Race, picks_check


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    scores, k = inputs["importance"], case.k
    return Race(
        ours=lambda: fp.topk_select(scores, k, sort=False, backend=backend),
        peers={"torch.topk": lambda: torch.topk(scores, k).indices},
        check=picks_check("topk", scores, k=k),
    )


RACES = {"topk": race}


def bench_topk(case, contest):
    contest(case, race)
