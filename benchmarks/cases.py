"""The one table of cases, and the inputs that belong to each.

Three kinds of data, since our time depends on it and the peers' does not:

photo      patches of a photograph through one fixed random layer (``flashprune.cli.photos``): redundant, as images are
smooth     a smooth random field plus noise: redundant, of full rank
gaussian   independent Gaussian features: nothing is redundant
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from flashprune.cli import photos

PHOTO = "coffee.png"


@dataclass(frozen=True)
class Case:
    """One problem: op, tokens N, features D, kept K; ``goals`` is the least ratio wanted to a peer or yardstick."""

    op: str
    n: int
    d: int
    k: int
    data: str = "photo"
    dtype: torch.dtype = torch.float32
    heads: int = 1
    goals: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.n}x{self.d}-{self.k}-{self.data}-{self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid: the squarest factors of N."""
        rows = next(r for r in range(isqrt(self.n), 0, -1) if self.n % r == 0)
        return rows, self.n // rows


def both(op: str, n: int, d: int, k: int, goals: dict[str, float]) -> tuple[Case, Case]:
    return Case(op, n, d, k, "photo", goals=goals), Case(op, n, d, k, "gaussian", goals=goals)


HEADLINE = (
    *both("mmr", 2880, 4096, 288, {"AngelSlim loop": 10}),
    *both("mmr", 4096, 3584, 1024, {"AngelSlim loop": 3.5}),
    *both("mmr", 16384, 1024, 1638, {"AngelSlim loop": 13}),
    *both("maxmin", 4096, 1024, 1024, {"DivPrune loop": 20}),
    *both("mis", 2880, 4096, 288, {"one N×N product": 1}),
    Case("dpp", 2880, 4096, 288, "smooth"),
    Case("dpp", 2880, 4096, 288, "gaussian"),
)

FURTHER = (
    Case("mmr", 576, 4096, 64),
    Case("mmr", 2880, 4096, 720, "smooth"),
    Case("mmr", 2880, 4096, 288, dtype=torch.bfloat16),
    Case("maxmin", 576, 4096, 64),
    Case("maxmin", 2880, 4096, 288),
    Case("mis", 576, 4096, 64),
    Case("mis", 2880, 4096, 720, "smooth"),
    Case("dpp", 576, 4096, 64),
    Case("topk", 576, 1, 64, "gaussian"),
    Case("topk", 2880, 1, 288, "gaussian"),
    Case("topk", 16384, 1, 1638, "gaussian"),
    Case("query_attention", 2880, 128, 288, "gaussian", heads=32),
    Case("received_attention", 2304, 64, 576, "gaussian", heads=16),
    Case("idpruner", 576, 4096, 64),
    Case("idpruner", 2880, 4096, 288),
    Case("d2pruner", 576, 4096, 64),
    Case("d2pruner", 2560, 4096, 256),
)

MEMORY = tuple(Case(op, 16384, 1024, 1638) for op in ("mmr", "mis", "maxmin"))
MEMORY_GOAL_MB = 128

CASES = HEADLINE + FURTHER


@lru_cache(maxsize=1)
def inputs_of(case: Case) -> dict[str, Tensor]:
    """The same tensors on every call: ``features [N, D]`` and ``importance [N]``, or ``query``, ``key [N, H, D]``."""
    generator = torch.Generator().manual_seed(case.n + case.d)
    if case.heads > 1:
        shape = (case.n, case.heads, case.d)
        return {name: torch.randn(shape, generator=generator).to(case.dtype) for name in ("query", "key")}
    features, importance = _KINDS[case.data](case, generator)
    return {"features": features.to(case.dtype), "importance": importance}


def _photo(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    image = photos.load_photo(PHOTO)
    importance = photos.stand_in_importance(image, case.grid)
    return photos.patch_features(image, case.grid, case.d), _unit_interval(importance)


def _smooth(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, cols = (max(2, side // 8) for side in case.grid)
    coarse = torch.randn(1, case.d + 1, rows, cols, generator=generator)
    field = F.interpolate(coarse, size=case.grid, mode="bicubic", align_corners=False)
    tokens = field.reshape(case.d + 1, case.n).T
    noise = torch.randn(case.n, case.d, generator=generator)
    return (tokens[:, :-1] + 0.3 * noise).contiguous(), _unit_interval(tokens[:, -1])


def _gaussian(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    features = torch.randn(case.n, case.d, generator=generator)
    distinct = torch.randperm(case.n, generator=generator) + 1  # torch.topk leaves the order of ties open
    return features, distinct / case.n


def _unit_interval(values: Tensor) -> Tensor:
    """CDPruner's scaling, (0, 1]: positive, so that it serves as a DPP relevance as well."""
    return (values - values.min() + 1e-6) / (values.max() - values.min())


_KINDS = {"photo": _photo, "smooth": _smooth, "gaussian": _gaussian}
