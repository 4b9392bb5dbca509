"""A key-value cache that holds fewer tokens than the model has seen.

Transformers takes the position of the next token and the width of its masks from one number, the length of the cache.
After pruning these are two: positions and the caller's attention mask go on counting every token seen, while the
masks of the pruned layers must fit what their caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_classes: dict[type[Cache], type[Cache]] = {}


@dataclass
class Pruned:
    """What was pruned from a cache."""

    first_layer: int  # that saw fewer tokens; so did all later ones
    removed: int  # columns
    length: int  # columns that the pruned layers held after the last pruned prefill
    valid: Tensor | None  # bool [B, length], which of them are tokens; None if all


class PrunedCache(Cache):
    """Mixed into the class of a cache whose prompt was pruned."""

    pruned: Pruned  # set by `record`

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, pruned ones included: what positions count."""
        seen = super().get_seq_length(layer_idx)
        return seen + self.pruned.removed if seen and layer_idx >= self.pruned.first_layer else seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns held: what masks count."""
        return length(self, layer_idx)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.pruned.valid is not None:
            self.pruned.valid = self.pruned.valid.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        super().reset()
        self.pruned = Pruned(self.pruned.first_layer, removed=0, length=0, valid=None)

    def _take_rows(self, rows: Tensor) -> None:
        if self.pruned.valid is not None:
            self.pruned.valid = self.pruned.valid[rows.to(self.pruned.valid.device)]


def record(cache: Any, first_layer: int, removed: int, columns: int, valid: Tensor | None) -> None:
    """Note on a cache that a prefill removed columns, and that its layers from `first_layer` on will hold `columns`.

    ValueError if it was pruned from another layer on before.
    """
    before = pruned(cache)
    if before is not None and before.first_layer != first_layer:
        raise ValueError(f"the cache was pruned from layer {before.first_layer} on, not from {first_layer}")
    if before is None:
        cache.__class__ = _pruned_class(type(cache))
    else:
        removed += before.removed
    cache.pruned = Pruned(first_layer, removed, columns, valid)


def pruned(cache: Any) -> Pruned | None:
    """What was pruned from a cache; None if nothing."""
    return cache.pruned if isinstance(cache, PrunedCache) else None


def length(cache: Any, layer: int) -> int:
    """Columns that a layer's cache holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return cache.layers[layer].get_seq_length()


def valid_past(cache: Cache | None, layer: int, mask: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
    """bool `[B, columns]`: which columns that a pruned layer's cache holds are tokens; None if all are.

    `mask`: the caller's `[B, tokens seen + new]`, or None if it has no padding.
    """
    held, before = length(cache, layer), pruned(cache)
    if before is None:
        return None if mask is None or held == 0 else mask[:, :held].bool()
    if before.valid is None and mask is None:
        return None
    seen = held + before.removed
    ones = torch.ones(rows, held, dtype=torch.bool, device=device)
    if before.valid is not None:
        ones[:, : before.length] = before.valid[:, :held]
    if mask is not None:
        ones[:, before.length :] = mask[:, seen - (held - before.length) : seen].bool()
    return ones


def valid(cache: Any, layer: int, mask: Tensor | None, rows: int, new: int, device: torch.device) -> Tensor | None:
    """bool `[B, columns + new]`: as `valid_past`, followed by new tokens; None if there is no padding."""
    past = valid_past(cache, layer, mask, rows, device)
    if past is None and mask is None:
        return None
    ones = torch.ones(rows, length(cache, layer) + new, dtype=torch.bool, device=device)
    if past is not None:
        ones[:, : past.shape[1]] = past
    if mask is not None:
        ones[:, -new:] = mask[:, -new:].bool()
    return ones


def _pruned_class(kind: type[Cache]) -> type[Cache]:
    if kind not in _classes:
        _classes[kind] = type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})
    return _classes[kind]
