"""Checks a selection, whichever backend made it, by replaying it in float64 against the definition."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import arguments, checks, replay, replay_video
from .reference import selectors, video

__all__ = ["Report", "check_selection"]

VIDEO = ("evs", "vidcom2")
METHODS = ("dpp", "maxmin", "mis", "mmr", "topk", *VIDEO)
SETS = ("topk", "mis", *VIDEO)  # methods whose result can be checked without its order


@dataclass(frozen=True)
class Report:
    """What a replay found: the largest regret of a pick, where it is, and whether rounding explains every pick.

    Regret is how much better, in float64, the best token scored than the one taken (for mis: how far an edge lies on
    the wrong side of the threshold); infinite where no score compares. ``bound`` is what rounding may cost at that
    pick; ``segment`` and ``step`` (the position in pick order) are -1 where every pick is the best one.
    """

    method: str
    ok: bool
    largest_regret: float
    bound: float
    segment: int
    step: int
    message: str

    def raise_if_bad(self) -> None:
        """AssertionError with the message, unless the selection is right."""
        if not self.ok:
            raise AssertionError(self.message)


@torch.no_grad()
def check_selection(
    method: str,
    *inputs: Tensor,
    picks: Tensor,
    k: int | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    sort: bool = False,
    **params: Any,
) -> Report:
    """Replay a selection in float64 and say whether it is right.

    Each pick must be the best token given the picks before it. Where rounding in float32 may decide, another is right
    too, if its float64 regret is within the stated rounding bound (`flashprune.replay` derives the bounds); everywhere
    else the picks must be those of the total order, ties by index included.

    Args:
        method: ``topk``, ``mmr``, ``mis``, ``maxmin``, ``dpp``, ``evs`` or ``vidcom2``.
        inputs: the tensors that the selector got, such as features and importance; any device.
        picks: what it returned, in the order picked (``sort=False``).
        k: as given to the selector; None takes it from ``picks``. Not for evs and vidcom2, which have a rule for it.
        cu_seqlens: as given to the selector.
        sort: ``picks`` is ascending, not in pick order; topk, mis, evs and vidcom2 can be checked so, the others not.
            Of vidcom2 only the set is checked.
        params: the selector's other arguments, such as ``lam``, or ``thw`` and ``q``; others have its defaults.

    Returns:
        A `Report`; ``report.raise_if_bad()`` turns a wrong selection into an AssertionError.

    Raises:
        TypeError, ValueError: the arguments would be refused by the selector as well, or ``sort`` cannot be checked.

    Examples:
        >>> import torch, flashprune as fp
        >>> features, importance = torch.randn(64, 16), torch.rand(64)
        >>> picks = fp.reference.mmr_select(features, importance, 8, lam=0.3, sort=False)
        >>> fp.testing.check_selection("mmr", features, importance, picks=picks, lam=0.3).ok
        True
    """
    checks.choice("method", method, METHODS)
    if checks.flag("sort", sort) and method not in SETS:
        raise ValueError(f"{method} is replayed in pick order, so sort must be False, got True")
    if method in VIDEO:
        if k is not None or cu_seqlens is not None:
            raise ValueError(f"{method} takes thw, merge and q, not k or cu_seqlens")
        return _check_video(method, *inputs, picks=picks.cpu(), sort=sort, **params)
    inputs, cu_seqlens, picks = tuple(x.cpu() for x in inputs), _host(cu_seqlens), picks.cpu()
    params = {name: _host(value) for name, value in params.items()}
    given = inspect.signature(getattr(selectors, f"{method}_select")).bind(
        *inputs, _counts(picks, cu_seqlens) if k is None else k, cu_seqlens=cu_seqlens, sort=sort, **params
    )
    given.apply_defaults()
    settings = {name: value for name, value in given.arguments.items() if name != "backend"}
    checked = getattr(arguments, method)(**settings)
    ks, pivots, positions = checked if method == "mis" else (checked, None, None)
    for name in (*list(settings)[: len(inputs)], "k", "cu_seqlens", "grid", "positions", "pivots"):
        settings.pop(name, None)
    if method not in SETS:
        settings.pop("sort")

    bad = _malformed(picks, inputs[0], ks, cu_seqlens, sort, tokens_last=method == "topk")
    if bad:
        return Report(method, False, math.inf, 0.0, -1, -1, f"{method}: {bad}")
    dtype = checks.working_dtype(inputs[0])
    tensors: list[Tensor | None] = [x.to(dtype) for x in inputs]
    if method == "mis":
        tensors.append(positions)
    found = []
    for segment, (rows, part) in enumerate(_segments(picks, ks, cu_seqlens)):
        extra = {"pivots": pivots[segment if cu_seqlens is not None else 0]} if pivots is not None else {}
        one = [x if x is None else x[rows] for x in tensors]
        found += [(segment, finding) for finding in getattr(replay, method)(part, *one, **settings, **extra)]
    return _report(method, found)


def _check_video(method: str, features: Tensor, *, picks: Tensor, sort: bool, **params: Any) -> Report:
    given = inspect.signature(getattr(video, f"{method}_select")).bind(features.cpu(), sort=sort, **params)
    given.apply_defaults()
    settings = {name: value for name, value in given.arguments.items() if name != "backend"}
    frames, keep, k = arguments.video(method, **settings)
    features = settings["features"]
    bad = _malformed(picks, features, [k], None, sort, tokens_last=False)
    if bad:
        return Report(method, False, math.inf, 0.0, -1, -1, f"{method}: {bad}")
    features = features.to(checks.working_dtype(features))
    found = getattr(replay_video, method)(picks, features, frames=frames, keep=keep, sort=sort)
    return _report(method, [(0, finding) for finding in found])


def _report(method: str, found: list[tuple[int, replay.Finding]]) -> Report:
    if not found:
        return Report(method, True, 0.0, 0.0, -1, -1, f"{method}: every pick is the best")
    segment, worst = max(found, key=lambda item: (not item[1].legal, item[1].regret))
    verdict = "within" if worst.legal else "beyond"
    message = (
        f"{method}: segment {segment}, step {worst.step}: {worst.text}; "
        f"regret {worst.regret:.3g} {verdict} the rounding bound {worst.bound:.3g}"
    )
    return Report(method, worst.legal, worst.regret, worst.bound, segment, worst.step, message)


def _segments(picks: Tensor, ks: list[int], cu_seqlens: Tensor | None) -> Iterator[tuple[slice | int, Tensor]]:
    """Rows of each segment, and its picks within them."""
    if cu_seqlens is not None:
        for (start, end), part in zip(pairwise(cu_seqlens.tolist()), picks.split(ks), strict=True):
            yield slice(start, end), part - start
    elif picks.ndim == 2:
        yield from enumerate(picks)
    else:
        yield slice(None), picks


def _malformed(
    picks: Tensor, first: Tensor, ks: list[int], cu_seqlens: Tensor | None, sort: bool, *, tokens_last: bool
) -> str:
    """What keeps ``picks`` from being k distinct tokens of each segment; empty if nothing does."""
    tokens = first.shape if tokens_last else first.shape[:-1]
    shape = [sum(ks)] if cu_seqlens is not None else [*tokens[:-1], ks[0]]
    if picks.dtype != torch.int64:
        return f"picks must be int64, got {picks.dtype}"
    if list(picks.shape) != shape:
        return f"picks must be {shape}, got {list(picks.shape)}"
    sizes = (
        cu_seqlens.diff().tolist() if cu_seqlens is not None else [tokens[-1]] * (tokens[0] if len(tokens) > 1 else 1)
    )
    for segment, ((_, part), n) in enumerate(zip(_segments(picks, ks, cu_seqlens), sizes, strict=True)):
        outside = part[(part < 0) | (part >= n)].tolist()
        if outside:
            return f"segment {segment}: pick {outside[0]} is outside its {n} tokens"
        if len(part.unique()) != len(part):
            return f"segment {segment}: a token is picked twice"
        if sort and not torch.equal(part, part.sort().values):
            return f"segment {segment}: picks are not ascending"
    return ""


def _counts(picks: Tensor, cu_seqlens: Tensor | None) -> int | list[int]:
    """The budget that the picks themselves show."""
    if cu_seqlens is None:
        return picks.shape[-1]
    return [int(((picks >= start) & (picks < end)).sum()) for start, end in pairwise(cu_seqlens.tolist())]


def _host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
