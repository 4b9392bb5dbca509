"""Shapes of the operators, for tracing; importing this module registers the native ones where the library is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, native


def namespace(backend: str) -> Any:
    """Where the operators of a backend are registered."""
    return torch.ops.flashprune_triton if backend == "triton" else torch.ops.flashprune


def call(backend: str, op: str, *arguments: Any) -> Tensor:
    """An operator of a backend; raises what the handler of a signal raised while the CPU engine ran."""
    operator = getattr(namespace(backend), op)
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "flashprune: interrupted by a signal" not in str(error):
            raise
    _take_up_signals()
    raise InterruptedError(f"{op} was interrupted by a signal")


def _take_up_signals() -> None:
    """Python raises at calls and at the ends of loops what the engine has kept for it (csrc/cpu/interruption.h)."""
    for _ in range(2):
        pass


def indices(tokens: Tensor, k: list[int], cu_seqlens: Tensor | None) -> Tensor:
    """A result, not filled, for ``tokens [N]``, ``[B, N]`` or packed ``[T]``."""
    if cu_seqlens is not None:
        return tokens.new_empty(sum(k), dtype=torch.int64)
    return tokens.new_empty((*tokens.shape[:-1], k[0]), dtype=torch.int64)


def _topk(scores: Tensor, k: list[int], cu_seqlens: Tensor | None, sort: bool) -> Tensor:
    return indices(scores, k, cu_seqlens)


def _mmr(features: Tensor, importance: Tensor, k: list[int], cu_seqlens: Tensor | None, *settings: Any) -> Tensor:
    return indices(importance, k, cu_seqlens)


def _mis(
    features: Tensor,
    importance: Tensor,
    k: list[int],
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    *settings: Any,
) -> Tensor:
    return indices(importance, k, cu_seqlens)


def _maxmin(features: Tensor, k: list[int], cu_seqlens: Tensor | None, *settings: Any) -> Tensor:
    return indices(features[..., 0], k, cu_seqlens)


def _dpp(features: Tensor, relevance: Tensor, k: list[int], cu_seqlens: Tensor | None, *settings: Any) -> Tensor:
    return indices(relevance, k, cu_seqlens)


def _evs(features: Tensor, frames: int, k: int, sort: bool) -> Tensor:
    return features.new_empty(k, dtype=torch.int64)


def _vidcom2(features: Tensor, frames: int, keep: float, k: int, sort: bool) -> Tensor:
    return features.new_empty(k, dtype=torch.int64)


SHAPES: dict[str, Callable[..., Tensor]] = {
    "topk_select": _topk,
    "mmr_select": _mmr,
    "mis_select": _mis,
    "maxmin_select": _maxmin,
    "dpp_select": _dpp,
    "evs_select": _evs,
    "vidcom2_select": _vidcom2,
}


def register_shape(op: str, shape: Callable[..., Tensor], lib: torch.library.Library | None = None) -> None:
    """The implementation of ``namespace::operator`` on fake and meta tensors, which may hide a tensor elsewhere."""
    name, _, operator = op.partition("::")
    overload = getattr(getattr(torch.ops, name), operator).default

    @functools.wraps(shape)
    def fake(*arguments: Any) -> Tensor:
        checks.one_device(overload, arguments)
        return shape(*arguments)

    torch.library.register_fake(op, fake, lib=lib)


def _has_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"flashprune::{op}", "CUDA")


CUDA_KERNELS: frozenset[str] = frozenset()  # operators that the CUDA library implements
if native.load():
    CUDA_KERNELS = frozenset(filter(_has_kernel, SHAPES))
    for _op, _shape in SHAPES.items():
        register_shape(f"flashprune::{_op}", _shape)


def missing_kernel(op: str) -> str:
    """Why the CUDA library does not run an operator; empty if it does."""
    return "" if op in CUDA_KERNELS else f"no CUDA kernel for {op} yet"
