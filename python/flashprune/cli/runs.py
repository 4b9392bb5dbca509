"""The methods that `flashprune demo` and `flashprune select` run, and one timed run of one of them."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashprune as fp

from ..dispatch import resolve
from .console import InputError

_RUNS = 5
_TIME_LIMIT = 0.5  # seconds, after which no further run is started


class Tokens(NamedTuple):
    """The tokens of one image: `features` `[N, D]`, `importance` `[N]` or None."""

    features: Tensor
    importance: Tensor | None


class Method(NamedTuple):
    """`select(tokens, k, backend=..., **settings)` gives the indices, by operator `op`.

    `label` and `note` stand in the picture.
    """

    label: str
    note: str
    needs_importance: bool
    settings: Mapping[str, float]
    op: str
    select: Callable[..., Tensor]


class Run(NamedTuple):
    """`indices` int64 `[k]` ascending, the backend that ran, and the median of `runs` latencies."""

    indices: Tensor
    backend: str
    latency_ms: float
    runs: int


def _topk(tokens: Tokens, k: int, **settings: Any) -> Tensor:
    return fp.topk_select(_importance(tokens), k, **settings)


def _divprune(tokens: Tokens, k: int, **settings: Any) -> Tensor:
    return fp.divprune(tokens.features, k, **settings)


def _cdpruner(tokens: Tokens, k: int, **settings: Any) -> Tensor:
    return fp.cdpruner(tokens.features, _importance(tokens), k, **settings)


def _idpruner(tokens: Tokens, k: int, **settings: Any) -> Tensor:
    return fp.idpruner(tokens.features, _importance(tokens), k, **settings)


def _d2pruner(tokens: Tokens, k: int, **settings: Any) -> Tensor:
    return fp.d2pruner(tokens.features, _importance(tokens), k, **settings)


_D2PRUNER = {"pivot_ratio": 0.7, "alpha": 1.0, "threshold": 0.8}

METHODS: Mapping[str, Method] = {
    "topk": Method("Top-k", "importance\nalone", True, {}, "topk_select", _topk),
    "divprune": Method("DivPrune", "max-min\ndistance", False, {}, "maxmin_select", _divprune),
    "cdpruner": Method("CDPruner", "determinantal\npoint process", True, {}, "dpp_select", _cdpruner),
    "idpruner": Method("IDPruner", "MMR,\nlambda 0.5", True, {"lam": 0.5}, "mmr_select", _idpruner),
    "d2pruner": Method("D2Pruner", "pivots + MIS,\nthreshold 0.8", True, _D2PRUNER, "mis_select", _d2pruner),
}


def run(method: str, tokens: Tokens, k: int, backend: str) -> Run:
    """Select a few times, each until the indices are there. The first, the warm-up, counts only if it is too slow.

    Raises InputError when the backend cannot run here.
    """
    try:
        ran = resolve(backend, METHODS[method].op, tokens.features.device, tokens.features.dtype)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None
    select = functools.partial(METHODS[method].select, tokens, k, backend=backend, **METHODS[method].settings)
    indices, warm_up = _timed(select, tokens)
    latencies = [warm_up] if warm_up > _TIME_LIMIT else []
    while len(latencies) < _RUNS and sum(latencies) < _TIME_LIMIT:
        latencies.append(_timed(select, tokens)[1])
    return Run(indices, ran, statistics.median(latencies) * 1e3, len(latencies))


def _timed(select: Callable[[], Tensor], tokens: Tokens) -> tuple[Tensor, float]:
    _synchronize(tokens.features)
    started = time.perf_counter()
    indices = select()
    _synchronize(tokens.features)
    return indices, time.perf_counter() - started


def serving_device() -> torch.device:
    """The GPU when a backend serves it, otherwise the CPU: the demo must not time a fallback."""
    ready = fp.backends()
    on_gpu = torch.cuda.is_available() and "ready" in (ready.get("cuda"), ready.get("triton"))
    return torch.device("cuda" if on_gpu else "cpu")


def _importance(tokens: Tokens) -> Tensor:
    if tokens.importance is None:
        raise ValueError("this method needs importance")
    return tokens.importance


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
