"""Videos for the tests of evs_select and vidcom2_select: random, still, and adversarial ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashprune as fp

GOLDEN = Path(__file__).parent / "golden"
SHAPES = ((1, 6, 6), (2, 5, 7), (7, 4, 5), (12, 1, 1), (3, 1, 11))
SHARES = (0.0, 0.1, 0.5, 0.75, 1.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def golden(method: str) -> pytest.MarkDecorator:
    cases = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    chosen = [case for case in cases if case["method"] == method]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=[case["file"].removesuffix(".npz") for case in chosen])


def load(case: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features, the published mask, and the settings."""
    with np.load(GOLDEN / case["file"]) as arrays:
        features, mask = (torch.from_numpy(arrays[name]) for name in ("features", "mask"))
    return features, mask, {"thw": tuple(case["thw"]), "merge": case["merge"], "q": case["q"]}


def walk(thw: tuple[int, int, int], d: int = 32, seed: int = 0) -> Tensor:
    """``[T * H * W, D]``: frames that drift."""
    frames = torch.randn(thw[0], thw[1] * thw[2], d, generator=torch.Generator().manual_seed(seed))
    return frames.cumsum(0).flatten(0, 1)


def still(thw: tuple[int, int, int], d: int = 32, seed: int = 0, noise: float = 0.02) -> Tensor:
    """One picture with a little noise in every frame."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(1, thw[1] * thw[2], d, generator=generator)
    return (picture + noise * torch.randn(thw[0], thw[1] * thw[2], d, generator=generator)).flatten(0, 1)


def _odd_rows(x: Tensor) -> None:
    x[::6] = 0
    x[1::6, 2] = math.nan
    x[2::6, 0] = math.inf
    x[3::6] *= 1e30
    x[4::6] *= 1e-30


def _tiny_rows(x: Tensor) -> None:
    x *= 10.0 ** torch.linspace(-24, -17, len(x))[:, None]


ADVERSARIAL: dict[str, Callable[[Tensor], object]] = {
    "zero": lambda x: x.zero_(),
    "nan": lambda x: x.fill_(math.nan),
    "zero rows": lambda x: x[::2].zero_(),
    "odd rows": _odd_rows,
    "tiny rows": _tiny_rows,
    "one token": lambda x: x.copy_(x[:1].expand_as(x)),
    "one value": lambda x: x.fill_(0.1),
    "two tokens": lambda x: x.copy_(x[torch.arange(len(x)) % 2]),
    "opposite": lambda x: x[1::2].neg_(),
    "one far": lambda x: x[0].mul_(1e6),
    "huge": lambda x: x.mul_(1e25),
    "infinite rows": lambda x: x[1::3].fill_(math.inf),
}


def check(method: str, features: Tensor, picks: Tensor, *, sort: bool = True, **settings: Any) -> None:
    fp.testing.check_selection(method, features, picks=picks, sort=sort, **settings).raise_if_bad()


def check_form(method: str, features: Tensor, picks: Tensor, thw: tuple[int, int, int], q: float) -> None:
    """As many distinct tokens as the host counted on, ascending."""
    n = len(features)
    k = fp.budget(n, 1.0 - q, rule=method, tokens_per_frame=n // thw[0])
    assert picks.dtype == torch.int64 and picks.shape == (k,)
    assert (picks.diff() > 0).all() and (k == 0 or (int(picks[0]) >= 0 and int(picks[-1]) < n))
