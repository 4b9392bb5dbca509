"""One pass through the language model that drops visual tokens: what is chosen, and which columns go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    goes_on: Tensor  # bool [B, L], these columns but for what fills up shorter prompts
    dropped: Tensor  # bool [B, L], tokens that do not go on
    kept: Tensor  # int64, packed indices of visual tokens
    padded: bool  # whether any is not valid

    @property
    def places(self) -> Tensor:
        """int64 [B, L], the new column of each that goes on."""
        return (self.goes_on.cumsum(1) - self.goes_on.sum(1, keepdim=True) + self.index.shape[1] - 1).clamp(min=0)

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
    blocks: Mapping[str, Tensor] = field(default_factory=dict)  # int [B, L] by kind of layer: see `Family.blocks`
    cut: Cut | None = None  # set when tokens were chosen
    columns: Tensor | None = None  # int64 [B, held + L'], set when that was recorded: which of the tokens seen, or -1
    past: int = field(init=False)  # tokens seen before this pass

    def __post_init__(self) -> None:
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())

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
        with self.stopwatch.running(hidden.device), torch.no_grad():
            self.tokens.hidden = hidden.detach()
            self.tokens.features = self.tokens.hidden.flatten(0, 1)[flat_here]
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
        attended = self.attended.to(hidden.device)
        self.cut = Cut(
            index=index,
            valid=(goes_on & attended).gather(1, index),
            goes_on=goes_on,
            dropped=attended & ~goes_on,
            kept=kept,
            padded=bool((lengths != width).any()) or not bool(self.attended[stays].all()),
        )
        return self.cut

    def record(self, cut: Cut, first_layer: int) -> Tensor | None:
        """Note on the cache what was dropped; the mask `[B, held + L']` of the shorter sequence, None if all valid."""
        before = caches.pruned(self.cache)
        rows, device = len(cut.index), cut.index.device
        held = caches.columns(self.cache, first_layer, self.mask, rows, device)
        self.columns = columns = torch.cat([held, (cut.index + self.past).masked_fill(~cut.valid, -1)], dim=1)
        if self.cache is None:
            return columns >= 0
        padded = cut.padded or (held.shape[1] > 0 and caches.padded(self.cache, self.mask))
        inner = torch.zeros(rows, self.past + self.attended.shape[1], dtype=torch.bool, device=device)
        if before is not None:
            inner[:, : before.inner.shape[1]] = before.inner.to(device)
        torn = self._torn()
        for row, first, end in torn:
            inner[row, self.past + first + 1 : self.past + end] = True
        tail = self.past + max(end for _, _, end in torn)
        caches.record(self.cache, caches.Pruned(first_layer, columns, padded, inner, tail))
        return columns >= 0 if padded else None

    def check_tail(self, columns: int) -> None:
        """ValueError if the last columns have some of an image that lost tokens."""
        start = self.attended.shape[1] - columns
        for row, first, end in self._torn():
            if end > start:
                raise ValueError(
                    f"logits_to_keep={columns} reaches the image or video of prompt {row} at {first} to {end - 1}, of "
                    "which tokens were dropped: give fewer, or 0 for all that is left"
                )

    def _torn(self) -> list[tuple[int, int, int]]:
        """Of each image and video that loses tokens: its prompt, its first column and that after its last."""
        queue, torn = iter(self.placed), []
        for segment, budget in zip(self.tokens.segments, self.budgets, strict=True):
            items = [next(queue) for _ in segment.items]
            if budget < len(segment):
                torn += [(one.row, int(one.columns[0]), int(one.columns[-1]) + 1) for one in items]
        return torn

    def shorter_blocks(self, cut: Cut) -> dict[str, Tensor]:
        """`blocks` of the columns that go on."""
        length = self.attended.shape[1]
        return {kind: cut.take(one[:, -length:].to(cut.index.device)) for kind, one in self.blocks.items()}

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
