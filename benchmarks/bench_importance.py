"""Query and received attention beside the dense softmax that ``output_attentions=True`` leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case
from .race import Race


def dense_attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax weights ``[H, Lq, N]`` of query ``[Lq, H, d]`` and key ``[N, H, d]``, in the inputs' dtype."""
    logits = torch.einsum("qhd,nhd->hqn", query, key) * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)


def query_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    last, key = inputs["query"][-1:], inputs["key"]
    return Race(
        ours=lambda: fp.query_attention(last, key, backend=backend),
        peers={"dense softmax": lambda: dense_attention(last, key).mean((0, 1))},
        check=scores_check(lambda: dense_attention(last.double(), key.double()).mean((0, 1))),
    )


def received_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    query, key = inputs["query"], inputs["key"]
    return Race(
        ours=lambda: fp.received_attention(query, key, backend=backend),
        peers={"dense softmax": lambda: dense_attention(query, key).mean((0, 1))},
        check=scores_check(lambda: received_float64(query, key)),
    )


def received_float64(query: Tensor, key: Tensor) -> Tensor:
    """Head by head: all heads' N×N in float64 would take gigabytes."""
    heads = zip(query.double().split(1, dim=1), key.double().split(1, dim=1), strict=True)
    return torch.stack([dense_attention(q, k).mean((0, 1)) for q, k in heads]).mean(0)


def scores_check(expected: Callable[[], Tensor], rtol: float = 1e-4) -> Callable[[Tensor], str]:
    def check(scores: Tensor) -> str:
        exact = expected()
        worst = ((scores.double() - exact).abs() / exact).max().item()
        return "" if worst <= rtol else f"a score is off by {worst:.1e} of its float64 value"

    return check


RACES = {"query_attention": query_race, "received_attention": received_race}


def bench_importance(case, contest):
    contest(case, RACES[case.op])
