"""One pass through the language model that drops visual tokens: what is chosen, and which columns go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import caches
from .report import Selection, Stopwatch
from .selection import Plan
from .tokens import Placed, VisualTokens


@dataclass(frozen=True)
class Cut:
    """The columns of a prefill that go on."""

    index: Tensor  # int64 [B, L'], ascending where valid
    valid: Tensor  # bool [B, L'], which of them are tokens
    kept: Tensor  # int64, packed indices of visual tokens
    padded: bool  # whether any is not valid

    def take(self, tensor: Tensor) -> Tensor:
        """`[B, L, …]` cut to the columns that go on, `[B, L', …]`; B may be 1 for all."""
        index = self.index.to(tensor.device)
        tensor = tensor.expand(len(index), *tensor.shape[1:])
        index = index.reshape(*index.shape, *[1] * (tensor.dim() - 2)).expand(*index.shape, *tensor.shape[2:])
        return tensor.gather(1, index)


@dataclass
class Prefill:
    """One pass that drops visual tokens at some layer."""

    plan: Plan
    placed: list[Placed]
    tokens: VisualTokens
    attended: Tensor  # bool [B, L], CPU: no padding
    mask: Tensor | None  # the caller's [B, seen + L]
    cache: Any
    stopwatch: Stopwatch
    cut: Cut | None = None  # set when tokens were chosen

    @property
    def past(self) -> int:
        """Tokens seen before this pass."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def budgets(self) -> list[int]:
        """How many tokens each segment keeps."""
        return self.plan.budgets(self.tokens.lengths)

    def choose(self, hidden: Tensor) -> Cut:
        """Select among the visual tokens of `hidden`, `[B, L, D]`. The width is known on the host, without waiting."""
        columns = hidden.shape[1]
        budgets = self.budgets
        flat = torch.cat([one.row * columns + one.columns for one in self.placed])
        flat_here = flat.to(hidden.device)
        with self.stopwatch.running(), torch.no_grad():
            self.tokens.features = hidden.detach().flatten(0, 1)[flat_here]
            kept = self.plan.select(self.tokens, budgets)
        stays = self.attended.cumsum(1) > 0  # what is not padding on the left
        stays.flatten()[flat] = False
        lengths = stays.sum(1)
        for segment, budget in zip(self.tokens.segments, budgets, strict=True):
            lengths[segment.row] += budget
        width = int(lengths.max())
        goes_on = stays.to(hidden.device, copy=True)
        goes_on.flatten()[flat_here[kept]] = True
        # Dropped columns first; a shorter prompt is padded by some of them, masked.
        index = goes_on.to(torch.int8).argsort(dim=1, stable=True)[:, columns - width :]
        self.cut = Cut(
            index=index,
            valid=(goes_on & self.attended.to(hidden.device)).gather(1, index),
            kept=kept,
            padded=bool((lengths != width).any()) or not bool(self.attended[stays].all()),
        )
        return self.cut

    def record(self, cut: Cut, first_layer: int) -> Tensor | None:
        """Note on the cache what was dropped; the mask `[B, held + L']` of the shorter sequence, None if all valid."""
        rows = len(cut.index)
        past = caches.valid_past(self.cache, first_layer, self.mask, rows, cut.valid.device)
        padded = cut.padded or past is not None
        if past is None:
            past = cut.valid.new_ones(rows, caches.length(self.cache, first_layer))
        mask = torch.cat([past, cut.valid], dim=1)
        if self.cache is None:
            return mask
        removed = self.attended.shape[1] - cut.index.shape[1]
        caches.record(self.cache, first_layer, removed, mask.shape[1], mask if padded else None)
        return mask if padded else None

    def selection(self, hidden: Tensor) -> Selection:
        """What the pass tells of itself."""
        parts = self.tokens.segments
        queue = iter(self.placed)
        columns = self.attended.shape[1]
        return Selection(
            rows=[part.row for part in parts],
            counts=list(zip(self.tokens.lengths, self.budgets, strict=True)),
            items=[list(part.items) for part in parts],
            length=(columns, columns if self.cut is None else self.cut.index.shape[1]),
            backend="none" if self.cut is None else self.plan.backend_for(hidden),
            columns=[torch.cat([next(queue).columns for _ in part.items]) for part in parts],
            packed=None if self.cut is None else self.cut.kept,
            stopwatch=self.stopwatch,
        )
