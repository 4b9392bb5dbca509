"""Top-k beside torch.topk, which leaves the order of equal scores open."""

from __future__ import annotations

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case, on_each
from .race import Race, picks_check


def race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    scores, k, bounds = inputs["importance"], case.budget, inputs.get("cu_seqlens")

    def torch_topk() -> Tensor:
        if case.sizes:
            return on_each(case, lambda x, k: torch.topk(x, k).indices, scores)
        return torch.topk(scores, case.k).indices

    return Race(
        ours=lambda: fp.topk_select(scores, k, cu_seqlens=bounds, sort=False, backend=backend),
        peers={"torch.topk": torch_topk},
        check=picks_check("topk", scores, k=k, cu_seqlens=bounds),
    )


RACES = {"topk": race}


def bench_topk(case, contest):
    contest(case, race)
