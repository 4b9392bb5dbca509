"""How many tokens to keep, and selections as masks: host arithmetic that engines run before they see a feature."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from . import checks

RULES = ("round", "floor", "ceil", "evs", "vidcom2")


def floor_scaled(ratio: float, n: int) -> int:
    """`floor(ratio * n)` for the decimal written: 0.29 of 100 is 29, where floats give 28.999999999999996."""
    return math.floor(round(ratio * n, 9))


def ceil_scaled(ratio: float, n: int) -> int:
    """`ceil(ratio * n)` for the decimal written: 1.1 of 30 is 33, where floats give 33.00000000000001."""
    return math.ceil(round(ratio * n, 9))


def budget(n: int, keep: int | float, *, rule: str = "round", tokens_per_frame: int | None = None) -> int:
    """The number of tokens to keep of `n`, as a host integer.

    `keep` as an int is a count: it is checked against `n` and returned, whatever the rule. As a float it is the ratio
    kept, 0 to 1 (so 1 keeps one token and 1.0 keeps all), and `rule` says how it becomes a count:

    - `"round"`: `int(round(n * keep))` in floats, halves to even, as DivPrune's and AngelSlim's code computes it;
    - `"floor"`, `"ceil"`: of `n * keep` freed of float noise, so 0.29 of 100 is 29 by both;
    - `"evs"`: `int(n * keep)`, but at least one whole frame (EVS keeps the first frame);
    - `"vidcom2"`: `int(n * keep)`, but at least one token a frame.

    The first three keep at least one token when `keep > 0` and `n > 0`. The last two are what vLLM's
    `compute_retained_tokens_count(tokens_per_frame, num_frames, q)` returns for `n = tokens_per_frame * num_frames` and
    `keep = 1 - q`; they need `tokens_per_frame`, which must divide `n`.

    Raises TypeError for an argument of the wrong type; ValueError for `n < 0`, a count above `n`, a ratio outside
    [0, 1], an unknown rule, or a `tokens_per_frame` that is missing, superfluous or does not divide `n`.

    >>> budget(576, 0.25), budget(576, 64), budget(10, 0.04)
    (144, 64, 1)
    >>> budget(8 * 196, 0.05, rule="evs", tokens_per_frame=196)
    196
    """
    n = checks.integer("n", n, 0)
    checks.choice("rule", rule, RULES)
    frames = _frames(n, rule, tokens_per_frame)
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(f"keep must be an int (a count) or a float (a ratio), got {type(keep).__name__}")
    if isinstance(keep, numbers.Integral):
        if not 0 <= keep <= n:
            raise ValueError(f"keep={int(keep)} must lie between 0 and n={n}")
        return int(keep)
    keep = float(keep)
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep={keep} is a ratio and must lie between 0 and 1 (an int is a count)")
    if rule == "evs":
        return max(n // max(frames, 1), int(n * keep))
    if rule == "vidcom2":
        return max(frames, int(n * keep))
    count = {
        "round": lambda: round(n * keep),
        "floor": lambda: floor_scaled(keep, n),
        "ceil": lambda: ceil_scaled(keep, n),
    }
    return max(count[rule](), 1) if keep > 0 and n > 0 else 0


def indices_to_mask(indices: Tensor, n: int) -> Tensor:
    """The bool mask of length `n` that is True at `indices`.

    `indices`: int64 `[K]`, or `[B, K]` of a batch; returns bool `[n]` or `[B, n]`, on the same device. On a CPU an
    index outside 0..n-1 raises; on a GPU, where looking would stall the stream, the device asserts.

    Raises TypeError when `indices` is not an int64 tensor or `n` no int; ValueError for the wrong number of dimensions,
    `n < 0`, or, on a CPU, an index out of range.

    >>> indices_to_mask(torch.tensor([0, 3]), 4)
    tensor([ True, False, False,  True])
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {got}")
    if indices.dim() not in (1, 2):
        raise ValueError(f"indices must be [K] or [B, K], got {checks.shape(indices)}")
    n = checks.integer("n", n, 0)
    if checks.readable(indices) and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= n:
            raise ValueError(f"indices must lie between 0 and n-1={n - 1}, got {low if low < 0 else high}")
    mask = torch.zeros(*indices.shape[:-1], n, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices, True)


def _frames(n: int, rule: str, tokens_per_frame: int | None) -> int:
    """The number of frames, 0 for a rule that knows none."""
    if rule not in ("evs", "vidcom2"):
        if tokens_per_frame is not None:
            raise ValueError(f"tokens_per_frame belongs to the rules evs and vidcom2, got rule={rule!r}")
        return 0
    if tokens_per_frame is None:
        raise ValueError(f"rule={rule!r} needs tokens_per_frame")
    tokens_per_frame = checks.integer("tokens_per_frame", tokens_per_frame, 1)
    if n % tokens_per_frame:
        raise ValueError(f"tokens_per_frame={tokens_per_frame} must divide n={n}")
    return n // tokens_per_frame
