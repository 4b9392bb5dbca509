"""The one table of cases, and the inputs that belong to each.

Three kinds of data, since our time depends on it and the peers' does not:

photo      patches of a photograph through one fixed random layer (``flashprune.cli.photos``): redundant, as images are
smooth     a smooth random field plus noise: redundant, of full rank
gaussian   independent Gaussian features: nothing is redundant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from flashprune.cli import photos

PHOTOS = ("coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg")  # the images of a batch, in turns


@dataclass(frozen=True)
class Case:
    """One problem: op, tokens N, features D, kept K, of one image or of a batch.

    ``batch`` images of N tokens each; or, in a packed batch, ``sizes`` and ``keeps`` of every image, N and K in all.
    For the attention ops D is a head's dimension, of ``heads`` query heads on ``kv_heads`` key heads (0: as many).
    ``shape`` is the grid ``(h, w)`` or ``(t, h, w)`` where the squarest will not do. ``goals`` is the least ratio
    wanted to a peer or yardstick.
    """

    op: str
    n: int
    d: int
    k: int
    data: str = "photo"
    dtype: torch.dtype = torch.float32
    heads: int = 1
    kv_heads: int = 0
    batch: int = 1
    sizes: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    preset: str = ""
    goals: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        images = f"-{self.images}images" if self.images > 1 else ""
        return f"{self.op}-{self.n}x{self.d}-{self.k}{images}-{self.data}-{self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def images(self) -> int:
        return len(self.sizes) or self.batch

    @property
    def each(self) -> list[tuple[int, int]]:
        """Tokens and kept tokens of every image."""
        return list(zip(self.sizes, self.keeps, strict=True)) if self.sizes else [(self.n, self.k)] * self.batch

    @property
    def budget(self) -> int | list[int]:
        """K as the selectors take it."""
        return list(self.keeps) if self.sizes else self.k

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens; the frames of a video or tiles of an image one below the other."""
        if self.shape:
            return self.n // self.shape[-1], self.shape[-1]
        return squarest(self.n)

    def check(self) -> None:
        """ValueError where there is no such problem."""
        for name, value in (("tokens", self.n), ("dim", self.d), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= self.k <= self.n:
            raise ValueError(f"keep must give 1 to N={self.n} tokens, got {self.k}")


def squarest(n: int) -> tuple[int, int]:
    """The two factors of n that are closest to each other, the smaller first."""
    rows = next(r for r in range(isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


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
    Case("evs", 3136, 3584, 784, "gaussian", shape=(16, 14, 14)),
    Case("vidcom2", 3136, 3584, 784, "gaussian", shape=(16, 14, 14)),
)

CASES = HEADLINE + FURTHER


@lru_cache(maxsize=1)
def inputs_of(case: Case) -> dict[str, Tensor]:
    """The same tensors on every call, on the CPU.

    ``features`` ``[N, D]``, ``[B, N, D]`` or packed, with ``cu_seqlens``, and ``importance`` to match; or ``query``
    ``[(B,) N, H, D]`` and ``key`` ``[(B,) N, Hkv, D]``.
    """
    case.check()
    generator = torch.Generator().manual_seed(case.n + case.d)
    if case.heads > 1:
        images = (case.batch,) if case.batch > 1 else ()
        heads = {"query": case.heads, "key": case.kv_heads or case.heads}
        shapes = {name: (*images, case.n, count, case.d) for name, count in heads.items()}
        return {name: torch.randn(shape, generator=generator).to(case.dtype) for name, shape in shapes.items()}
    make = _KINDS[case.data]
    grids = [squarest(n) for n in case.sizes] or [case.grid] * case.batch
    made = [make(PHOTOS[i % len(PHOTOS)], grid, case.d, generator) for i, grid in enumerate(grids)]
    if case.sizes:
        bounds = torch.tensor([0, *case.sizes]).cumsum(0).to(torch.int32)
        features, importance = (torch.cat(parts) for parts in zip(*made, strict=True))
        return {"features": features.to(case.dtype), "importance": importance, "cu_seqlens": bounds}
    features, importance = (torch.stack(x) for x in zip(*made, strict=True)) if case.batch > 1 else made[0]
    return {"features": features.to(case.dtype), "importance": importance}


def on_each(case: Case, select: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``select(*tensors of an image, k)`` image after image, as published loops go, joined as flashprune returns it."""
    if case.sizes:
        bounds = [0, *accumulate(case.sizes)]
        spans = zip(pairwise(bounds), case.keeps, strict=True)
        return torch.cat([a + select(*(x[a:b] for x in tensors), k) for (a, b), k in spans])
    if case.batch == 1:
        return select(*tensors, case.k)
    return torch.stack([select(*(x[i] for x in tensors), case.k) for i in range(case.batch)])


def square_bytes(case: Case, matrices: float = 3, together: bool = False) -> int:
    """What ``matrices`` N×N float32 matrices take, of the largest image or of all images ``together``."""
    squares = [n * n for n, _ in case.each]
    return int(4 * matrices * (sum(squares) if together else max(squares)))


def _photo(file: str, grid: tuple[int, int], d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    image = photos.load_photo(file)
    return photos.patch_features(image, grid, d), _unit_interval(photos.stand_in_importance(image, grid))


def _smooth(file: str, grid: tuple[int, int], d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, cols = (max(2, side // 8) for side in grid)
    coarse = torch.randn(1, d + 1, rows, cols, generator=generator)
    field = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)
    tokens = field.reshape(d + 1, -1).T
    noise = torch.randn(len(tokens), d, generator=generator)
    return (tokens[:, :-1] + 0.3 * noise).contiguous(), _unit_interval(tokens[:, -1])


def _gaussian(file: str, grid: tuple[int, int], d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n = grid[0] * grid[1]
    features = torch.randn(n, d, generator=generator)
    distinct = torch.randperm(n, generator=generator) + 1  # torch.topk leaves the order of ties open
    return features, distinct / n


def _unit_interval(values: Tensor) -> Tensor:
    """CDPruner's scaling, (0, 1]: positive, so that it serves as a DPP relevance as well."""
    return (values - values.min() + 1e-6) / (values.max() - values.min())


_KINDS = {"photo": _photo, "smooth": _smooth, "gaussian": _gaussian}
