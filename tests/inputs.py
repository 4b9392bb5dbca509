"""Inputs for the selectors' tests: exact, random and adversarial tokens, and one way to call every selector on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashprune as fp
from flashprune import arguments

SIZES = (1, 31, 33, 63, 64, 65, 576, 729, 1024, 2305)


class Variant(NamedTuple):
    """A selector with settings whose arithmetic is exact on `signs` (dpp: on `hadamard`) with dyadic importance."""

    name: str
    method: str
    settings: dict[str, Any]

    def tensors(self, features: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        return {"topk": (importance,), "maxmin": (features,)}.get(self.method, (features, importance))

    def params(self, features: Tensor, k: int | list[int]) -> dict[str, Any]:
        params = dict(self.settings)
        if "alpha" in params:
            params["positions"] = raster(features)
        if "pivots" in params:  # a share of k
            share = params["pivots"]
            params["pivots"] = [int(n * share) for n in k] if isinstance(k, list) else int(k * share)
        return params

    def select(self, features: Tensor, importance: Tensor, k: int | list[int], **more: Any) -> Tensor:
        function = getattr(fp, f"{self.method}_select")
        return function(*self.tensors(features, importance), k, **self.params(features, k), **more)

    def define(self, features: Tensor, importance: Tensor, k: int | list[int], **more: Any) -> Tensor:
        """The definition's picks in float64."""
        function = getattr(fp.reference, f"{self.method}_select")
        tensors = (x.double() for x in self.tensors(features, importance))
        return function(*tensors, k, **self.params(features, k), **more)

    def check(self, features: Tensor, importance: Tensor, k: int | list[int], picks: Tensor, **more: Any) -> None:
        tensors, params = self.tensors(features, importance), self.params(features, k)
        fp.testing.check_selection(self.method, *tensors, picks=picks, k=k, **params, **more).raise_if_bad()

    def operator(self, features: Tensor, importance: Tensor, k: int | list[int], *block: int, **more: Any) -> Tensor:
        """The native operator itself, in pick order."""
        return operator(self.method)(*self.operands(features, importance, k, **more), *block)

    def operands(
        self, features: Tensor, importance: Tensor, k: int | list[int], cu_seqlens: Tensor | None = None
    ) -> tuple[Any, ...]:
        """The operator's arguments up to ``sort``."""
        params, tensors = self.params(features, k), self.tensors(features, importance)
        if self.method == "mmr":
            lam, per_round = params.get("lam", 0.5), params.get("per_round", 1)
            ks = arguments.mmr(*tensors, k, lam, per_round, cu_seqlens, False)
            return (*tensors, ks, cu_seqlens, lam, per_round, False)
        if self.method == "mis":
            graph = (
                params.get("alpha", 1.0), params["threshold"], params.get("similarity", "cosine"),
                params.get("proximity", "chebyshev"), params.get("radius", 1), params.get("sigma", 1.0),
                params.get("temporal_radius", 0),
            )  # fmt: skip
            suppress = params.get("pivots_suppress", False)
            ks, pivots, positions = arguments.mis(
                *tensors, k, None, params.get("positions"), *graph, params.get("pivots", 0), suppress, cu_seqlens, False
            )
            return (*tensors, ks, positions, cu_seqlens, *graph, pivots, suppress, False)
        return (*tensors, getattr(arguments, self.method)(*tensors, k, cu_seqlens, False), cu_seqlens, False)


def operator(method: str) -> Callable[..., Tensor]:
    return getattr(torch.ops.flashprune, f"{method}_select")


VARIANTS = (
    Variant("topk", "topk", {}),
    Variant("mmr", "mmr", {}),
    Variant("mmr-importance", "mmr", {"lam": 1.0}),
    Variant("mmr-diversity", "mmr", {"lam": 0.25}),
    Variant("mmr-rounds", "mmr", {"per_round": 5}),
    Variant("mis", "mis", {"threshold": 0.25}),
    Variant("mis-half", "mis", {"threshold": 0.5, "similarity": "half_cosine"}),
    Variant("mis-pivots", "mis", {"threshold": 0.125, "pivots": 0.7}),
    Variant("mis-suppress", "mis", {"threshold": 0.125, "pivots": 0.5, "pivots_suppress": True}),
    Variant("mis-banded", "mis", {"threshold": 0.75, "alpha": 0.5, "radius": 2}),
    Variant("mis-wide", "mis", {"threshold": 0.125, "alpha": 0.5, "temporal_radius": 1, "pivots": 0.25}),
    Variant("maxmin", "maxmin", {}),
    Variant("dpp", "dpp", {}),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
# Not exact on any features: the graph's distances are irrational.
DISTANCES = (
    Variant("mis-gaussian", "mis", {"threshold": 0.45, "alpha": 0.4, "proximity": "gaussian", "sigma": 1.7}),
    Variant("mis-linear", "mis", {"threshold": 0.55, "alpha": 0.3, "proximity": "linear", "pivots": 0.3}),
)


def raster(features: Tensor, width: int = 9, frame: int = 180) -> Tensor:
    """int32 positions of tokens in raster order, in frames of ``frame`` tokens."""
    i = torch.arange(features.shape[-2], dtype=torch.int32)
    places = torch.stack([i // frame, i % frame // width, i % frame % width], dim=-1)
    return places.expand(*features.shape[:-1], 3)


def signs(*shape: int, seed: int = 0) -> Tensor:
    """Rows of ±1; with D = 4**m every norm is a power of two and every cosine exact in float32, whatever the order."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def halves(*tensors: Tensor) -> list[Tensor]:
    """Rounded to multiples of 1/2: sums of a few hundred products of such numbers are exact in any order."""
    return [(x * 2).round() / 2 for x in tensors]


def hadamard(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows of a Hadamard matrix, repeated and negated: cosines -1, 0 and 1, so that a Cholesky factor is exact too."""
    h = torch.ones(1, 1)
    while len(h) < d:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    generator = torch.Generator().manual_seed(seed)
    return h[torch.randint(0, d, (n,), generator=generator)] * signs(n, 1, seed=seed + 1)


def dyadic(*shape: int, seed: int = 0, levels: int = 32) -> Tensor:
    """Importance in few levels, exact in bfloat16, with many ties."""
    return torch.randint(1, levels + 1, shape, generator=torch.Generator().manual_seed(seed + 7)) / levels


def exact(variant: Variant, n: int, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens on which every number that the variant computes is exact."""
    features = hadamard(n, d, seed) if variant.method == "dpp" else signs(n, d, seed=seed)
    return features, dyadic(n, seed=seed)


def gaussian(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape[:-1], generator=generator)


def _duplicates(features: Tensor, importance: Tensor) -> None:
    features[:] = features[torch.arange(len(features)) % 5]
    importance[:] = importance[torch.arange(len(features)) % 2]


def _one_ulp(features: Tensor, importance: Tensor) -> None:
    ranks = torch.randperm(len(importance), generator=torch.Generator().manual_seed(1))
    importance[:] = 1 + ranks * torch.finfo(torch.float32).eps


def _odd_scores(features: Tensor, importance: Tensor) -> None:
    importance[::7] = math.nan
    importance[1::7] = -math.inf
    importance[2::14] = math.inf
    importance[3::7] = -0.0
    importance[4::7] = 0.0
    importance[5::7] *= -1


def _odd_features(features: Tensor, importance: Tensor) -> None:
    features[::6] = 0
    features[1::6, 2] = math.nan
    features[2::6, 0] = math.inf
    features[3::6] *= 1e30  # the norm overflows float32
    features[4::6] *= 1e-30  # the norm underflows float32


def _tiny_features(features: Tensor, importance: Tensor) -> None:
    """Squared norms from far below the smallest normal float to well above."""
    features *= 10.0 ** torch.linspace(-24, -17, len(features)).roll(1)[:, None]


def _opposite(features: Tensor, importance: Tensor) -> None:
    features[1::2] = -features[0::2][: len(features[1::2])]


def _same_features(features: Tensor, importance: Tensor) -> None:
    features[:] = features[0].clone()


def chain(n: int) -> tuple[Tensor, Tensor]:
    """Each token has cosine 0.5 with the next and 0 with all others, in order of importance: the worst of orders."""
    return torch.eye(n, n + 1) + torch.eye(n + 1)[1:], torch.linspace(1, 0, n)


ADVERSARIAL: dict[str, Callable[[Tensor, Tensor], None]] = {
    "equal scores": lambda features, importance: importance.fill_(0.5),
    "duplicates": _duplicates,
    "same features": _same_features,
    "one ulp": _one_ulp,
    "odd scores": _odd_scores,
    "odd features": _odd_features,
    "tiny features": _tiny_features,
    "zero rows": lambda features, importance: features[::2].zero_(),
    "all zero": lambda features, importance: (features.zero_(), importance.zero_()),
    "opposite": _opposite,
}


def adversarial(name: str, n: int, d: int = 16, seed: int = 3) -> tuple[Tensor, Tensor]:
    features, importance = gaussian(n, d, seed=seed)
    ADVERSARIAL[name](features, importance)
    return features, importance


TOKENS = 60
# Offsets of packed segments that a device may hold, since nobody checks them there.
WRONG_OFFSETS = {
    "overlapping": [0, 50, 20, 60],
    "descending": [60, 40, 20, 0],
    "negative": [-9, 30, -3, 50],
    "too large": [0, 20, 99, 200],
    "extreme": [2**31 - 1, -(2**31), 2**31 - 1, 5],
    "twice": [-(2**31), 60, 0, 60],
}


def ascending(offsets: list[int], tokens: int = TOKENS) -> list[int]:
    """Those of the segments that kernels see: each offset raised to those before it, inside the tokens."""
    raised = [max(0, *offsets[: i + 1]) for i in range(len(offsets))]
    return [min(offset, tokens) for offset in raised]
