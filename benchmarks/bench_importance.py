"""Query and received attention beside the dense softmax that ``output_attentions=True`` leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

import flashprune as fp

from .cases import Case, square_bytes
from .race import Race


def dense_attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax weights ``[(B,) H, Lq, N]`` of query ``[(B,) Lq, H, d]`` and key ``[(B,) N, Hkv, d]``, in their dtype."""
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    logits = torch.einsum("...qhd,...nhd->...hqn", query, key) * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)


def query_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    last, key = inputs["query"][..., -1:, :, :], inputs["key"]
    return Race(
        ours=lambda: fp.query_attention(last, key, backend=backend),
        peers={"dense softmax": lambda: dense_attention(last, key).mean((-3, -2))},
        check=scores_check(lambda: dense_attention(last.double(), key.double()).mean((-3, -2)), case),
    )


def received_race(case: Case, inputs: dict[str, Tensor], backend: str) -> Race:
    query, key = inputs["query"], inputs["key"]
    return Race(
        ours=lambda: fp.received_attention(query, key, backend=backend),
        peers={"dense softmax": lambda: dense_attention(query, key).mean((-3, -2))},
        check=scores_check(lambda: received_float64(query, key), case),
        needs={"dense softmax": square_bytes(case, 2 * case.heads, together=True)},
    )


def received_float64(query: Tensor, key: Tensor) -> Tensor:
    """Head by head, and of each 1,024 rows at a time: all N×N in float64 would take gigabytes."""
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    heads = zip(query.double().split(1, dim=-2), key.double().split(1, dim=-2), strict=True)
    sums = [dense_attention(rows, k).sum((-3, -2)) for q, k in heads for rows in q.split(1024, dim=-3)]
    return torch.stack(sums).sum(0) / (query.shape[-2] * query.shape[-3])


def scores_check(expected: Callable[[], Tensor], case: Case) -> Callable[[Tensor], str]:
    """Relative error against float64; in half precision the dense softmax itself rounds to that precision."""
    exact_scores = lru_cache(maxsize=1)(expected)
    rtol = 1e-4 if case.dtype is torch.float32 else 4 * torch.finfo(case.dtype).eps

    def check(scores: Tensor) -> str:
        exact = exact_scores()
        worst = ((scores.double() - exact).abs() / exact).max().item()
        return "" if worst <= rtol else f"a score is off by {worst:.1e} of its float64 value"

    return check


RACES = {"query_attention": query_race, "received_attention": received_race}


def bench_importance(case, contest):
    contest(case, RACES[case.op])
