"""The inputs of `flashprune validate`: for each operator, data that is hard on it, in sizes around every boundary.

Everything follows from the seed, so a failing case can be run again from its line alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Generator, Tensor

SELECTORS = ("topk", "mmr", "mis", "maxmin", "dpp")
ATTENTION = ("query_attention", "received_attention")
VIDEO = ("evs", "vidcom2")
OPERATORS = SELECTORS + ATTENTION + VIDEO


@dataclass(frozen=True)
class Case:
    """One call of `op`. `inputs` are float32 and cast before the call; `exact`: no backend has anything to round."""

    op: str
    number: int
    text: str
    inputs: tuple[Tensor, ...]
    params: Mapping[str, Any]
    exact: bool


@dataclass(frozen=True)
class Layout:
    """Tokens `[N]`, `[B, N]`, or packed `[T]` with the `sizes` of the segments; `k` as the API takes it."""

    shape: tuple[int, ...]
    k: int | list[int]
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        tokens = "+".join(map(str, self.sizes)) if self.sizes else "x".join(map(str, self.shape))
        return f"N={tokens} k={'+'.join(map(str, self.k)) if isinstance(self.k, list) else self.k}"


_QUICK = (
    Layout((1,), 1),
    Layout((33,), 8),
    Layout((65,), 65),
    Layout((130,), 33),
    Layout((2, 31), 7),
    Layout((97,), [0, 1, 9, 0, 16], (0, 1, 31, 1, 64)),
)
_FULL = (
    *_QUICK,
    Layout((2,), 1),
    Layout((31,), 31),
    Layout((63,), 0),
    Layout((64,), 20),
    Layout((129,), 128),
    Layout((257,), 64),
    Layout((576,), 96),
    Layout((1024,), 128),
    Layout((3, 64), 64),
    Layout((223,), [1, 33, 0, 20, 48], (1, 33, 0, 60, 129)),
)

Make = Callable[[tuple[int, ...], Generator], tuple[Tensor, ...]]


def cases(op: str, seed: int, quick: bool) -> Iterator[Case]:
    """All cases of an operator."""
    if op in SELECTORS:
        return _selector_cases(op, seed, quick)
    if op in VIDEO:
        return _video_cases(op, seed, quick)
    return _attention_cases(op, seed, quick)


def _selector_cases(op: str, seed: int, quick: bool) -> Iterator[Case]:
    settings = cycle(_SETTINGS.get(op, ({},)))
    number = 0
    for layout in _QUICK if quick else _FULL:
        for kind, make in _KINDS[op].items():
            generator = _generator(seed, op, number)
            chosen = next(settings)
            inputs = make(layout.shape, generator)
            dim = "" if op == "topk" else f" D={inputs[0].shape[-1]}"
            exact = op == "topk" or (kind in _EXACT_KINDS and chosen.get("proximity", "chebyshev") == "chebyshev")
            text = f"{kind} {layout}{dim}{_written(chosen)}"
            yield Case(op, number, text, inputs, _params(op, layout, chosen), exact)
            number += 1


def _params(op: str, layout: Layout, settings: Mapping[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {"k": layout.k, **settings}
    if layout.sizes:
        params["cu_seqlens"] = _cu_seqlens(layout.sizes)
    if op == "mis":
        share = params.pop("pivot_share", 0.0)
        params["pivots"] = [int(k * share) for k in layout.k] if isinstance(layout.k, list) else int(layout.k * share)
        params["positions"] = _positions(layout)
    return params


_SETTINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "mmr": ({"lam": 0.5}, {"lam": 0.75}, {"lam": 0.5, "per_round": 4}, {"lam": 0.0}, {"lam": 1.0}),
    "mis": (
        {"alpha": 1.0, "threshold": 0.75},
        {"alpha": 0.5, "threshold": 0.75},
        {"alpha": 0.75, "threshold": 0.5, "similarity": "half_cosine", "proximity": "gaussian", "sigma": 1.5},
        {"alpha": 0.5, "threshold": 0.625, "proximity": "linear"},
        {"alpha": 0.5, "threshold": 0.5, "radius": 2, "temporal_radius": 1},
        {"alpha": 0.5, "threshold": 0.5, "pivot_share": 0.5, "pivots_suppress": True},
        {"alpha": 1.0, "threshold": 0.25, "pivot_share": 0.7},
    ),
}


# Scores, float32 [..., N].


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _eighths(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Few distinct values, exact in every dtype: the order hangs on the index."""
    return torch.randint(0, 9, shape, generator=generator) / 8


def _equal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.full(shape, 0.5)


def _powers(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return 2.0 ** torch.randint(-2, 2, shape, generator=generator)


def _wild(shape: tuple[int, ...], generator: Generator) -> Tensor:
    scores = torch.randn(shape, generator=generator)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    drawn = special[torch.randint(0, 5, shape, generator=generator)]
    return torch.where(_some(shape, generator, 0.3), drawn, scores)


# Features, float32 [..., N, D].


def _gaussian(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(*shape, 37, generator=generator)


def _smooth(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """A slow walk: neighbours are near-duplicates, as in an image."""
    steps = torch.randn(*shape, 40, generator=generator)
    return torch.randn(40, generator=generator) + 0.3 * steps.cumsum(-2)


def _duplicates(shape: tuple[int, ...], generator: Generator) -> Tensor:
    rows = torch.randn(5, 40, generator=generator)
    return rows[torch.randint(0, 5, shape, generator=generator)]


def _zero_rows(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return _smooth(shape, generator) * ~_some(shape, generator, 0.3)[..., None]


def _opposite(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Half of the cosines negative, many exactly -1."""
    signs = torch.randint(0, 2, (*shape, 1), generator=generator) * 2 - 1
    return torch.randn(9, 40, generator=generator)[torch.randint(0, 9, shape, generator=generator)] * signs


def _not_finite(shape: tuple[int, ...], generator: Generator) -> Tensor:
    features = _smooth(shape, generator)
    features[..., 3] = torch.where(_some(shape, generator, 0.15), math.nan, features[..., 3])
    features[..., 7] = torch.where(_some(shape, generator, 0.15), math.inf, features[..., 7])
    return features


def _signs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """+1 and -1 in 64 dimensions: every cosine is a multiple of 1/32, whatever the order of summation."""
    return torch.randint(0, 2, (*shape, 64), generator=generator) * 2.0 - 1


def _hadamard(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Rows of a Hadamard matrix, repeated and negated: cosines of 0, 1 and -1 only, so a Cholesky step is exact."""
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (*shape, 1), generator=generator) * 2.0 - 1
    return matrix[torch.randint(0, 64, shape, generator=generator)] * signs


def _some(shape: tuple[int, ...], generator: Generator, share: float) -> Tensor:
    return torch.rand(shape, generator=generator) < share


def _alone(make: Callable[[tuple[int, ...], Generator], Tensor]) -> Make:
    return lambda shape, generator: (make(shape, generator),)


def _with(
    features: Callable[[tuple[int, ...], Generator], Tensor], scores: Callable[[tuple[int, ...], Generator], Tensor]
) -> Make:
    return lambda shape, generator: (features(shape, generator), scores(shape, generator))


_WEIGHTED: Mapping[str, Make] = {
    "gaussian": _with(_gaussian, _uniform),
    "smooth": _with(_smooth, _uniform),
    "duplicates": _with(_duplicates, _eighths),
    "zero rows": _with(_zero_rows, _equal),
    "opposite": _with(_opposite, _uniform),
    "not finite": _with(_not_finite, _wild),
    "signs": _with(_signs, _eighths),
}
_KINDS: Mapping[str, Mapping[str, Make]] = {
    "topk": {
        "uniform": _alone(_uniform),
        "ties": _alone(_eighths),
        "equal": _alone(_equal),
        "not finite": _alone(_wild),
    },
    "mmr": _WEIGHTED,
    "mis": _WEIGHTED,
    "maxmin": {
        "gaussian": _alone(_gaussian),
        "smooth": _alone(_smooth),
        "duplicates": _alone(_duplicates),
        "zero rows": _alone(_zero_rows),
        "opposite": _alone(_opposite),
        "not finite": _alone(_not_finite),
        "signs": _alone(_signs),
    },
    "dpp": {
        "gaussian": _with(_gaussian, _uniform),
        "smooth": _with(_smooth, _uniform),
        "duplicates": _with(_duplicates, _eighths),
        "zero rows": _with(_zero_rows, _equal),
        "opposite": _with(_opposite, _uniform),
        "not finite": _with(_not_finite, _uniform),
        "hadamard": _with(_hadamard, _powers),
    },
}
_EXACT_KINDS = ("signs", "hadamard")


# Videos: (T, H, W) and q.

_VIDEOS: tuple[tuple[tuple[int, int, int], float], ...] = (
    ((1, 6, 6), 0.5),
    ((2, 5, 7), 0.75),
    ((33, 1, 1), 0.9),
    ((8, 9, 7), 0.0),
    ((16, 14, 14), 0.75),
    ((64, 6, 9), 0.25),
)
_QUICK_VIDEOS = 4


def _video_cases(op: str, seed: int, quick: bool) -> Iterator[Case]:
    number = 0
    for thw, q in _VIDEOS[:_QUICK_VIDEOS] if quick else _VIDEOS:
        for kind, make in _KINDS["maxmin"].items():
            inputs = make((math.prod(thw),), _generator(seed, op, number))
            text = f"{kind} thw={'x'.join(map(str, thw))} D={inputs[0].shape[-1]} q={q}"
            yield Case(op, number, text, inputs, {"thw": thw, "merge": 1, "q": q}, op == "evs" and kind in _EXACT_KINDS)
            number += 1


# Attention: (layout, query heads, key heads, head dimension, settings); the settings name what is built.

_QUERY: tuple[tuple[Any, ...], ...] = (
    ((1, 40), 4, 4, 16, {}),
    ((1, 600), 8, 2, 64, {"visual": slice(5, 581)}),
    ((3, 130), 4, 1, 24, {"visual": "index"}),
    ((2, 1, 77), 6, 2, 32, {"prior": True}),
    ((1, 200), 4, 2, 64, {"visual": slice(0, 144), "lse": True, "prior": True}),
)
_RECEIVED: tuple[tuple[Any, ...], ...] = (
    ((1,), (), 2, 2, 16, {}),
    ((65,), (), 4, 2, 24, {"lse": True}),
    ((2, 64), (), 4, 4, 32, {"pool": 4}),
    ((196,), (0, 4, 128, 0, 64), 4, 1, 40, {"pool": 4}),
    ((300,), (33, 267), 3, 3, 16, {"lse": True, "prior": True}),
    ((1024,), (), 2, 2, 64, {"pool": 4, "prior": True}),
)
_QUICK_ATTENTION = 4


def _attention_cases(op: str, seed: int, quick: bool) -> Iterator[Case]:
    build = _query_case if op == "query_attention" else _received_case
    settings = _QUERY if op == "query_attention" else _RECEIVED
    for number, row in enumerate(settings[:_QUICK_ATTENTION] if quick else settings):
        yield build(number, _generator(seed, op, number), *row)


def _query_case(
    number: int, generator: Generator, tokens: tuple[int, ...], heads: int, key_heads: int, dim: int, wanted: Any
) -> Case:
    *batch, rows, keys = tokens
    query = torch.randn(*batch, rows, heads, dim, generator=generator)
    key = torch.randn(*batch, keys, key_heads, dim, generator=generator)
    params = dict(wanted)
    if params.get("visual") == "index":
        params["visual"] = torch.randperm(keys, generator=generator)[: keys // 2]
    if "prior" in params:
        visual = len(range(keys)[params.get("visual", slice(None))])
        params["prior"] = torch.rand(visual, generator=generator) / visual
    shown = f"Lq={rows} L={keys} H={heads} Hkv={key_heads} d={dim}" + (f" B={batch[0]}" if batch else "")
    return Case("query_attention", number, shown + _written(wanted), (query, key), params, False)


def _received_case(
    number: int,
    generator: Generator,
    tokens: tuple[int, ...],
    sizes: tuple[int, ...],
    heads: int,
    key_heads: int,
    dim: int,
    wanted: Any,
) -> Case:
    query = torch.randn(*tokens, heads, dim, generator=generator)
    key = torch.randn(*tokens, key_heads, dim, generator=generator)
    params = dict(wanted)
    if "prior" in params:
        count = tokens[-1] // params.get("pool", 1)
        params["prior"] = torch.rand(count, generator=generator) / count
    if sizes:
        params["cu_seqlens"] = _cu_seqlens(sizes)
    shown = f"N={'+'.join(map(str, sizes)) or 'x'.join(map(str, tokens))} H={heads} Hkv={key_heads} d={dim}"
    return Case("received_attention", number, shown + _written(wanted), (query, key), params, False)


def log_sums(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """What an attention kernel returns beside its output: float32 `[..., H, rows]`, for a case that wants `lse`."""
    key = key.double().repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    scores = torch.einsum("...rhd,...lhd->...hrl", query.double(), key) * query.shape[-1] ** -0.5
    bounds = case.params.get("cu_seqlens")
    if bounds is not None:
        segment = torch.searchsorted(bounds[1:], torch.arange(scores.shape[-1], dtype=torch.int32), right=True)
        scores = scores.masked_fill((segment[:, None] != segment).to(scores.device), -math.inf)
    return scores.logsumexp(-1).float()


def _generator(seed: int, op: str, number: int) -> Generator:
    return Generator().manual_seed((seed * len(OPERATORS) + OPERATORS.index(op)) * 1000 + number)


def _cu_seqlens(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *sizes)).cumsum(0).to(torch.int32)


def _positions(layout: Layout) -> Tensor:
    """int32 `[..., N, 3]`: rows of 8, frames of 64, counted anew in each segment."""
    index = torch.cat([torch.arange(n) for n in layout.sizes or layout.shape[-1:]])
    positions = torch.stack([index // 64, index % 64 // 8, index % 8], dim=-1).to(torch.int32)
    return positions.expand(*layout.shape, 3)


def _written(settings: Mapping[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in settings.items())
