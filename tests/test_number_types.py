"""Counts and settings may be any integer or real number, NumPy's too; a bool is neither."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import flashprune as fp
from flashprune.metrics import hopkins

N, D = 12, 8


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.1


X, S = rand(N, D), rand(N)
HEADS = rand(1, 2, D)
# Of each function a call, by whole numbers `i` and others `f`, which take a Python number to what is tried.
Number = Callable[[Any], Any]
CALLS: dict[str, Callable[[Number, Number], Any]] = {
    "budget": lambda i, f: fp.budget(i(576), f(0.25), rule="evs", tokens_per_frame=i(16)),
    "budget count": lambda i, f: fp.budget(i(576), i(64)),
    "topk_select": lambda i, f: fp.topk_select(S, i(3)),
    "topk_select ks": lambda i, f: fp.topk_select(S, [i(3), i(1)], cu_seqlens=torch.tensor([0, 5, 12]).int()),
    "mmr_select": lambda i, f: fp.mmr_select(X, S, i(4), lam=f(0.5), per_round=i(2)),
    "mis_select": lambda i, f: fp.mis_select(
        X, S, i(4), grid=(i(3), i(4)), alpha=f(0.5), threshold=f(0.75), radius=i(1), sigma=f(1.5), temporal_radius=i(0)
    ),
    "mmr_select reference": lambda i, f: fp.mmr_select(X, S, i(4), lam=f(0.5), per_round=i(2), backend="reference"),
    "mis_select reference": lambda i, f: fp.mis_select(
        X, S, i(4), grid=(i(3), i(4)), alpha=f(0.5), threshold=f(0.75), sigma=f(1.5), backend="reference"
    ),
    "query_attention reference": lambda i, f: fp.query_attention(
        HEADS, rand(N, 2, D), scale=f(0.5), prior=S, eps=f(0.125), backend="reference"
    ),
    "hopkins": lambda i, f: hopkins(X, torch.arange(5), seed=i(3)),
    "mis_select pivots": lambda i, f: fp.mis_select(X, S, i(4), pivots=i(2)),
    "maxmin_select": lambda i, f: fp.maxmin_select(X, i(4)),
    "dpp_select": lambda i, f: fp.dpp_select(X, S, i(4)),
    "d2pruner": lambda i, f: fp.d2pruner(
        X,
        S,
        i(4),
        grid=(i(3), i(4)),
        prior=S,
        eps=f(0.125),
        pivot_ratio=f(0.5),
        alpha=f(0.5),
        radius=i(1),
        sigma=f(1.5),
    ),
    "idpruner": lambda i, f: fp.idpruner(X, S, i(4), lam=f(0.5), per_round=i(1)),
    "naive_hybrid": lambda i, f: fp.naive_hybrid(X, S, i(4), pool_ratio=f(1.5)),
    "divprune": lambda i, f: fp.divprune(X, i(4)),
    "cdpruner": lambda i, f: fp.cdpruner(X, S, i(4)),
    "fastv": lambda i, f: fp.fastv(S, i(4)),
    "debias": lambda i, f: fp.debias(S, S, eps=f(0.125)),
    "soft_topk": lambda i, f: fp.soft_topk(S, f(0.25)),
    "resize_prior": lambda i, f: fp.resize_prior(S, (i(3), i(4)), (i(6), i(6))),
    "indices_to_mask": lambda i, f: fp.indices_to_mask(torch.tensor([1, 4]), i(N)),
    "query_attention": lambda i, f: fp.query_attention(HEADS, rand(N, 2, D), scale=f(0.5), prior=S, eps=f(0.125)),
    "received_attention": lambda i, f: fp.received_attention(
        rand(N, 2, D), rand(N, 2, D), scale=f(0.5), pool=i(4), max_seqlen=i(N), cu_seqlens=torch.tensor([0, N]).int()
    ),
    "evs_select": lambda i, f: fp.evs_select(rand(N, D), (i(3), i(4), i(4)), i(2), f(0.5)),
    "vidcom2_select": lambda i, f: fp.vidcom2_select(rand(N, D), (i(3), i(4), i(4)), i(2), f(0.5)),
    "unpack_positions": lambda i, f: fp.unpack_positions(fp.pack_positions(X, torch.zeros(N, 3).int()), i(3)),
    "VisionSelector": lambda i, f: fp.VisionSelector(i(8), i(4)).in_features,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else type(one) is type(other) and one == other


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("whole", "real"), [(np.int64, np.float64), (np.int32, np.float32), (np.uint8, np.float16), (int, Fraction)]
)
def test_a_number_is_taken_whatever_its_type(name: str, whole: Number, real: Number) -> None:
    if whole is np.uint8 and name.startswith("budget"):
        pytest.skip("576 is more than a uint8 holds")
    assert same(CALLS[name](whole, real), CALLS[name](int, float))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [np.bool_, bool])
def test_a_bool_is_no_number(name: str, bad: type) -> None:
    with pytest.raises(TypeError, match=bad.__name__.rstrip("_")):
        CALLS[name](bad, bad)
