import math

import pytest
import torch

import flashprune as fp

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ([0.1, 0.9, 0.5, 0.9], [1, 3, 2, 0]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([-0.0, 1.0, 0.0, -1.0], [1, 0, 2, 3]),
        ([math.nan, -math.inf, math.inf, -3.0, math.nan], [2, 3, 0, 1, 4]),
        ([-math.nan, math.nan, 5.0], [2, 0, 1]),
        ([1.0, 1 + EPS, 1 - EPS / 2, 1.0], [1, 0, 3, 2]),
        ([-1.0, -1 - EPS, -1 + EPS / 2], [2, 0, 1]),
        ([1e-45, 0.0, -1e-45], [0, 1, 2]),
        ([3.4e38, math.inf, -3.4e38, -math.inf], [1, 0, 2, 3]),
    ],
)
def test_total_order(scores: list[float], order: list[int], backend: str) -> None:
    for k in range(len(scores) + 1):
        assert fp.topk_select(torch.tensor(scores), k, sort=False, backend=backend).tolist() == order[:k]
        assert fp.topk_select(torch.tensor(scores), k, backend=backend).tolist() == sorted(order[:k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number(dtype: torch.dtype, backend: str) -> None:
    """All bit patterns, NaNs of both signs included, in both directions."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for scores in (bits.view(dtype), bits.flip(0).view(dtype)):
        order = fp.topk_select(scores, len(scores), sort=False, backend=backend)
        keys = [(-math.inf if math.isnan(s) else s) for s in scores.float().tolist()]
        assert order.tolist() == sorted(range(len(keys)), key=lambda i: (-keys[i], i))


def test_batch_and_segments(backend: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0]])
    assert fp.topk_select(scores, 2, sort=False, backend=backend).tolist() == [[1, 2], [0, 2]]
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    picks = fp.topk_select(scores.flatten(), [1, 0, 3], cu_seqlens=cu_seqlens, sort=False, backend=backend)
    assert picks.tolist() == [1, 3, 5, 4]


def test_float64_scores_keep_their_precision() -> None:
    scores = torch.tensor([1.0, 1 + 1e-12, 1 - 1e-12], dtype=torch.float64)
    assert fp.reference.topk_select(scores, 3, sort=False).tolist() == [1, 0, 2]
