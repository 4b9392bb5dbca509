"""The operators of the Triton backend: schemas, shapes for tracing, and launchers that are imported at the first call.

Importing Triton takes seconds, so nothing here does: an operator's implementation imports its kernel file when it first
runs, and a graph is traced without it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import attention, checks, operators

# Triton's own switch: kernels then run on CPU tensors, as NumPy, for who develops or tests them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_SCHEMAS = {
    "topk_select": "(Tensor scores, int[] k, Tensor? cu_seqlens, bool sort) -> Tensor",
    "mmr_select": "(Tensor features, Tensor importance, int[] k, Tensor? cu_seqlens, float lam, int per_round, "
    "bool sort) -> Tensor",
    "mis_select": "(Tensor features, Tensor importance, int[] k, Tensor? positions, Tensor? cu_seqlens, float alpha, "
    "float threshold, str similarity, str proximity, int radius, float sigma, int temporal_radius, int[] pivots, "
    "bool pivots_suppress, bool sort) -> Tensor",
    "maxmin_select": "(Tensor features, int[] k, Tensor? cu_seqlens, bool sort) -> Tensor",
    "dpp_select": "(Tensor features, Tensor relevance, int[] k, Tensor? cu_seqlens, bool sort) -> Tensor",
    "evs_select": "(Tensor features, int frames, int k, bool sort) -> Tensor",
    "vidcom2_select": "(Tensor features, int frames, float keep, int k, bool sort) -> Tensor",
    "query_attention": "(Tensor query, Tensor key, float scale, Tensor? lse, Tensor? visual, SymInt[] span, "
    "Tensor? prior, float eps) -> Tensor",
    "received_attention": "(Tensor query, Tensor key, Tensor? cu_seqlens, SymInt? max_seqlen, float scale, "
    "Tensor? lse, SymInt pool, Tensor? prior, float eps) -> Tensor",
    "minmax": "(Tensor scores, Tensor? cu_seqlens) -> Tensor",
}


def _module(op: str) -> str:
    """Where an operator's launcher is; it bears the operator's name."""
    return f"flashprune.triton_kernels.{op.removesuffix('_select')}"


def _has_kernel(op: str) -> bool:
    try:
        return find_spec(_module(op)) is not None
    except ModuleNotFoundError:  # a source tree on the path, without the kernels' directory
        return False


KERNELS = frozenset(filter(_has_kernel, _SCHEMAS))


def missing_kernel(op: str) -> str:
    """Why the backend does not run an operator; empty if it does."""
    return "" if op in KERNELS else f"no Triton kernel for {op} yet"


def _query_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor | None,
    visual: Tensor | None,
    span: list[int],
    *settings: Any,
) -> Tensor:
    count = attention.visual_count(key, visual, span)
    return query.new_empty((*query.shape[:-3], count), dtype=torch.float32)


def _received_attention(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    lse: Tensor | None,
    pool: int,
    *settings: Any,
) -> Tensor:
    return query.new_empty((*query.shape[:-3], query.shape[-3] // pool), dtype=torch.float32)


def _minmax(scores: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


_SHAPES: dict[str, Callable[..., Tensor]] = {
    **operators.SHAPES,
    "query_attention": _query_attention,
    "received_attention": _received_attention,
    "minmax": _minmax,
}


@functools.cache
def _launcher(op: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(_module(op)), op)


def _implementation(op: str) -> Callable[..., Tensor]:
    overload = getattr(torch.ops.flashprune_triton, op).default

    def launch(*arguments: Any) -> Tensor:
        checks.one_device(overload, arguments)
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device; no effect for a CPU tensor
            return _launcher(op)(*arguments)

    return launch


_library = torch.library.Library("flashprune_triton", "DEF")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    operators.register_shape(f"flashprune_triton::{_op}", _SHAPES[_op], _library)
for _op in KERNELS:
    _library.impl(_op, _implementation(_op), "CUDA")
    if INTERPRETED:
        _library.impl(_op, _implementation(_op), "CPU")
