"""What is raced: from options to cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import flashprune as fp

from .cases import HEADLINE, Case
from .presets import PRESETS, cases_of

IMPORTANCE = ("query_attention", "received_attention")
VIDEO = ("evs", "vidcom2")  # only where they are asked for
OPS = ("mmr", "mis", "maxmin", "dpp", "topk", "importance", "d2pruner", "idpruner")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# The standard sweep; the cases with a stated goal come first.
TOKENS = (196, 576, 1296, 2880, 6400)
DIM = 1024
KEEP = 0.1


@dataclass(frozen=True)
class Wanted:
    """Empty: the standard run. ``keep``: floats are shares, ints counts. Preset and sizes exclude each other."""

    ops: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    dim: int | None = None
    keep: tuple[int | float, ...] = ()
    batch: tuple[int, ...] = ()
    dtype: str = "float32"
    preset: str | None = None


def cases(wanted: Wanted) -> list[Case]:
    """Every case, those that cannot be among them: they say so when their inputs are asked for.

    Raises:
        ValueError: an unknown op, dtype or preset, a dim or keep that fits no size, or a preset with sizes beside it.
    """
    dtype = _dtype(wanted.dtype)
    ops = _ops(wanted.ops)
    if wanted.dim is not None and wanted.dim < 1:
        raise ValueError(f"dim must be at least 1, got {wanted.dim}")
    for keep in wanted.keep:
        if not (isinstance(keep, int) or 0 < keep <= 1):
            raise ValueError(f"keep must be shares up to 1.0 (floats) or counts (ints), got {keep:g}")
    sizes = (wanted.tokens, wanted.dim, wanted.keep, wanted.batch)
    if wanted.preset is not None:
        if wanted.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {wanted.preset}")
        if any(size not in ((), None) for size in sizes):
            raise ValueError("preset sets tokens, dim, keep and batch: give either it or those")
        return cases_of(wanted.preset, ops, dtype)
    standard = all(size in ((), None) for size in sizes) and dtype is torch.float32
    first = [case for case in HEADLINE if case.op in ops] if standard else []
    return [*first, *sweep(ops, wanted, dtype)]


def sweep(ops: Sequence[str], wanted: Wanted, dtype: torch.dtype) -> list[Case]:
    tokens, keeps = wanted.tokens or TOKENS, wanted.keep or (KEEP,)
    dim = DIM if wanted.dim is None else wanted.dim
    return [
        _case(op, n, dim, _kept(n, keep), batch, dtype)
        for op in ops
        for batch in wanted.batch or (1,)
        # Neither attention nor its cost depends on how many tokens are kept.
        for keep in (keeps[:1] if op in IMPORTANCE else keeps)
        for n in tokens
    ]


def _case(op: str, n: int, dim: int, k: int, batch: int, dtype: torch.dtype) -> Case:
    if op == "topk":
        return Case(op, n, 1, k, "gaussian", dtype, batch=batch)
    if op == "query_attention":  # of a 7B model with grouped heads
        return Case(op, n, 128, k, "gaussian", dtype, heads=28, kv_heads=4, batch=batch)
    if op == "received_attention":  # of an encoder
        return Case(op, n, 64, k, "gaussian", dtype, heads=16, batch=batch)
    if op in VIDEO:  # whose cost depends on the data no more than top-k's
        return Case(op, n, dim, k, "gaussian", dtype, batch=batch)
    return Case(op, n, dim, k, dtype=dtype, batch=batch)


def _kept(n: int, keep: int | float) -> int:
    """A share as IDPruner rounds it, a count as it is; nothing, which is out of range, where there are no tokens."""
    if isinstance(keep, int):
        return keep
    return fp.budget(n, keep) if n > 0 else 0


def _ops(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in (*OPS, *IMPORTANCE, *VIDEO):
            raise ValueError(f"op must be one of {', '.join((*OPS, *VIDEO))}; got {name}")
    found = [op for name in names or OPS for op in (IMPORTANCE if name == "importance" else (name,))]
    return tuple(dict.fromkeys(found))


def _dtype(name: str) -> torch.dtype:
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {name}")
    return DTYPES[name]
