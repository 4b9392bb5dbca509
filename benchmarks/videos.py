"""What the races of video selections share: a case's frames, and the masks that engines ask for, checked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import flashprune as fp

from .cases import Case, squarest
from .race import Race, picks_check

FRAMES = 16  # at most, of a case without a shape
Mask = Callable[[Tensor, tuple[int, int, int], float], Tensor]  # of features, thw and q


def video_of(case: Case) -> tuple[tuple[int, int, int], float]:
    """``thw``, and the ``q`` whose budget is the case's K.

    Raises:
        ValueError: the case is no single video, or the method keeps more of it than K.
    """
    if case.images > 1:
        raise ValueError(f"{case.op} takes one video, got {case.images}")
    if len(case.shape) == 3:
        thw = case.shape[0], case.shape[1], case.shape[2]
    else:  # the most frames of which one, and one token of each, can be kept
        fitting = (t for t in range(min(FRAMES, case.k), 0, -1) if case.n % t == 0 and case.n // t <= case.k)
        frames = next(fitting, 1)
        thw = frames, *squarest(case.n // frames)
    q = max(0.0, 1 - (case.k + 0.5) / case.n)
    least = fp.budget(case.n, 1.0 - q, rule=case.op, tokens_per_frame=thw[1] * thw[2])
    if least != case.k:
        raise ValueError(f"{case.op} keeps at least {least} tokens of a video of {thw[0]} frames, got K={case.k}")
    return thw, q


def video_race(case: Case, inputs: dict[str, Tensor], backend: str, mask: Mask, name: str) -> Race:
    x, (thw, q) = inputs["features"], video_of(case)
    select = getattr(fp, f"{case.op}_select")
    right = picks_check(case.op, x, thw=thw, merge=1, q=q, sort=True)
    return Race(
        ours=lambda: fp.indices_to_mask(select(x, thw, 1, q, backend=backend), len(x)),
        peers={name: lambda: mask(x, thw, q)},
        check=lambda found: right(found.nonzero().flatten()),
    )
