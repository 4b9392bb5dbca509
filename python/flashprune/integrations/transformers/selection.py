"""The methods by name: where in the model each prunes, what it needs, and its call of a flashprune method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ... import budgets, checks, dispatch, methods, selectors
from ...scorer import VisionSelector
from .prior import Prior
from .tokens import VisualTokens

SCOPES = ("image", "request")
Importance = Callable[[VisualTokens], Tensor]


@dataclass(frozen=True)
class Method:
    """How a pruning method is called on visual tokens."""

    function: Callable[..., Tensor]
    needs: str  # "importance", "attention" inside the LLM, or "nothing"
    op: str  # the operator behind it, for which a backend is chosen
    features: bool = True  # whether the function takes them
    grid: Callable[[Mapping[str, Any]], bool] = lambda options: False  # whether these options need positions

    @property
    def inside(self) -> bool:
        """Whether it prunes inside the LLM."""
        return self.needs == "attention"

    @property
    def options(self) -> set[str]:
        """The settings that a user may change."""
        given = {"k", "cu_seqlens", "sort", "backend", "grid", "positions", "prior"}
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - given


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "cdpruner": Method(methods.cdpruner, "importance", "dpp_select"),
        "d2pruner": Method(
            methods.d2pruner, "attention", "mis_select", grid=lambda options: options.get("alpha", 1.0) < 1
        ),
        "divprune": Method(methods.divprune, "nothing", "maxmin_select"),
        "fastv": Method(methods.fastv, "attention", "topk_select", features=False),
        "idpruner": Method(methods.idpruner, "importance", "mmr_select"),
        "naive_hybrid": Method(methods.naive_hybrid, "importance", "maxmin_select"),
        "topk": Method(selectors.topk_select, "importance", "topk_select", features=False),
        "visionselector": Method(selectors.topk_select, "importance", "topk_select", features=False),
    }
)


@dataclass(frozen=True)
class Scorer:
    """The importance that a VisionSelector gives, on the tokens' device."""

    selector: VisionSelector

    def __call__(self, tokens: VisualTokens) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.selector.to(tokens.features.device)(tokens.features, cu_seqlens=tokens.cu_seqlens)
            return found


@dataclass(frozen=True)
class Plan:
    """What `prune` was asked for, checked."""

    method: str
    keep: int | float
    rule: str
    scope: str
    backend: str
    options: Mapping[str, Any]
    importance: Importance | None = None
    encoder_attention: bool = False
    prior: Prior | None = None

    @property
    def inside(self) -> bool:
        return METHODS[self.method].inside

    def budgets(self, lengths: list[int]) -> list[int]:
        """How many tokens to keep of each segment; one with fewer than a wanted count stays whole."""
        if isinstance(self.keep, int):
            return [min(self.keep, n) for n in lengths]
        return [budgets.budget(n, self.keep, rule=self.rule) for n in lengths]

    def backend_for(self, features: Tensor) -> str:
        """The name of the backend that selects among such features."""
        return dispatch.resolve(self.backend, METHODS[self.method].op, features.device, features.dtype)

    def select(self, tokens: VisualTokens, ks: list[int]) -> Tensor:
        """int64 `[sum of ks]`, ascending packed indices of the tokens to keep."""
        method = METHODS[self.method]
        arguments = [tokens.features] if method.features else []
        options = dict(self.options)
        if method.needs != "nothing":
            arguments.append(self._importance(tokens))
        if method.function is methods.d2pruner:
            if self.prior is not None:
                options["prior"] = self.prior.of(tokens.items).to(tokens.features.device)
            if method.grid(options):
                options["positions"] = tokens.positions
        select = functools.partial(method.function, *arguments, ks, cu_seqlens=tokens.cu_seqlens)
        return select(backend=self.backend, **options)

    def _importance(self, tokens: VisualTokens) -> Tensor:
        if METHODS[self.method].inside:
            found, source = tokens.attention, "the attention inside the LLM"
        elif self.encoder_attention:
            found, source = tokens.scores, "the encoder's attention"
        else:
            assert self.importance is not None
            found, source = self.importance(tokens), "importance"
        if not isinstance(found, Tensor):
            raise TypeError(f"{source} must give a tensor [T] of one score a visual token, got {type(found).__name__}")
        if found.shape != tokens.features.shape[:1]:
            wanted = list(tokens.features.shape[:1])
            raise ValueError(f"{source} must give one score a visual token, {wanted}, got {checks.shape(found)}")
        return found.detach().to(tokens.features.device)


def make_options(method: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a method, checked by name; TypeError names those that it takes."""
    known = METHODS[method].options
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes none"
            raise TypeError(f"{name} is no option of method={method!r}, which {takes}")
    if method == "naive_hybrid" and "pool_ratio" not in options:
        raise TypeError("method='naive_hybrid' needs pool_ratio: its pool holds that many times the tokens kept")
    return dict(options)


def try_out(plan: Plan, width: int) -> None:
    """Raises what the method raises for settings that do not fit, on a token of zeros, before any model is touched."""
    from .tokens import Item, Segment

    tokens = VisualTokens(
        torch.zeros(2, width), [Segment(0, (Item.of_planes("image", [(1, 2)]),))], attention=torch.zeros(2)
    )
    neutral = Plan(plan.method, 1, plan.rule, plan.scope, "reference", plan.options, lambda given: torch.zeros(2))
    neutral.select(tokens, [1])
