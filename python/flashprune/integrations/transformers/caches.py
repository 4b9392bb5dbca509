"""A key-value cache that holds fewer tokens than the model has seen.

Transformers takes the position of the next token and the width of its masks from one number, the length of the cache.
After pruning these are two: positions and the caller's attention mask go on counting every token seen, while the
masks of the pruned layers must fit what their caches hold. So does a crop: it is asked for in tokens seen.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask

# The name of a call's cache; from Transformers 5.24 on the other is an older one, still taken.
NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

_classes: dict[type[Cache], type[Cache]] = {}


@dataclass(frozen=True)
class Pruned:
    """What the last pruned prefill left of all tokens seen so far; those that came after it are all held."""

    first_layer: int  # that saw fewer tokens; so did all later ones
    columns: Tensor  # int64 [B, held], which of the tokens seen the pruned layers hold, ascending; -1 for padding
    padded: bool  # whether any is -1
    inner: Tensor  # bool [B, seen], where a crop would end amid an image that lost tokens
    tail: int  # from here on every token seen is held

    @property
    def removed(self) -> int:
        """Tokens seen but not held."""
        return self.inner.shape[1] - self.columns.shape[1]

    def rows(self, index: Tensor) -> Pruned:
        """Of these rows of the batch."""
        columns, inner = (one[index.to(one.device)] for one in (self.columns, self.inner))
        return replace(self, columns=columns, inner=inner)

    def cropped(self, seen: int) -> Pruned:
        """Of the first `seen` tokens; ValueError if they end amid an image that lost tokens."""
        if seen >= self.inner.shape[1]:
            return self
        if seen >= self.tail:  # known without waiting for the device
            return replace(self, columns=self.columns[:, : seen - self.removed], inner=self.inner[:, :seen])
        torn = self.inner[:, seen].nonzero().flatten().tolist()
        if torn:
            inner = self.inner[torn[0]].tolist()
            first = max(column for column in range(seen) if not inner[column])
            end = next((column for column in range(seen, len(inner)) if not inner[column]), len(inner))
            raise ValueError(
                f"crop to {seen} tokens would end amid the image or video of prompt {torn[0]} at {first} to {end - 1}, "
                f"of which tokens were dropped: crop to {first} or fewer, or to {end} or more"
            )
        stays = (self.columns >= 0) & (self.columns < seen)
        ends = torch.arange(1, stays.shape[1] + 1, device=stays.device) * stays
        # A prompt with fewer tokens left than another goes on after padding.
        width = int(ends.max()) if ends.numel() else 0
        columns = self.columns.masked_fill(~stays, -1)[:, :width]
        padded = bool((columns < 0).any())
        return Pruned(self.first_layer, columns, padded, self.inner[:, :seen], min(self.tail, seen))


class PrunedCache(Cache):
    """Mixed into the class of a cache whose prompt was pruned."""

    pruned: Pruned  # set by `record`
    lent = False  # to a forward of a pruned model

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, pruned ones included: what positions count."""
        layer_idx = _counting(self, layer_idx)
        held = super().get_seq_length(layer_idx)
        if layer_idx < self.pruned.first_layer:
            return held
        if isinstance(held, Tensor):  # of a static cache, not to be waited for
            return torch.where(held > 0, held + self.pruned.removed, held)
        return held + self.pruned.removed if held else held

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Columns held: what masks count."""
        return super().get_seq_length(_counting(self, layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._check_lent()
        return super().get_mask_sizes(query_length, layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_lent()
        return super().update(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens seen; or, if positive, all but as many.

        The cache is then what it would be had they never come, with the same tokens kept of the images before them.
        ValueError, with the cache as it was, if that ends amid an image or video of which tokens were dropped.
        """
        before, seen = self.pruned, self.get_seq_length()
        held = length(self, before.first_layer)
        wanted = tokens_to_remove if tokens_to_remove > 0 else max(seen + tokens_to_remove, 0)
        after = before.cropped(wanted)
        counts = (seen - wanted, held - (wanted - after.removed)) if wanted < seen else (0, 0)
        layers: list[Any] = [copy.copy(layer) for layer in self.layers]  # a layer that refuses leaves the others whole
        for index, layer in enumerate(layers):
            layer.crop(-counts[index >= before.first_layer])
        self.layers = layers
        self.pruned = after
        if after.removed == 0 and not after.padded:
            self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.pruned = self.pruned.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.pruned = self.pruned.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(len(self.pruned.columns), device=self.pruned.columns.device)
        self.pruned = self.pruned.rows(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def __reduce__(self) -> Any:
        """Its class is made where it is needed: a pickle names the one that it was made from."""
        state = {name: value for name, value in vars(self).items() if name != "lent"}
        return _empty, (_plain_class(self),), state

    def _forget(self) -> None:
        """Nothing is missing: a cache like any other."""
        self.__class__ = _plain_class(self)
        vars(self).pop("lent", None)
        del self.pruned

    def _check_lent(self) -> None:
        if not self.lent:
            raise ValueError(
                f"the cache was pruned from layer {self.pruned.first_layer} on: only a model pruned from there can "
                "continue it; call prune() with the same method and layer, or start a new cache"
            )


def given(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, by whatever name; None without."""
    found = arguments.get(NAME)
    return arguments.get("past_key_values") if found is None else found


def record(cache: Any, pruning: Pruned) -> None:
    """Note on a cache what a prefill that is running leaves of the tokens seen."""
    if pruned(cache) is None:
        cache.__class__ = _pruned_class(type(cache))
    cache.pruned = pruning
    cache.lent = True


def lend(cache: Any, first_layer: int) -> None:
    """Let a model that prunes from `first_layer` on continue a cache; ValueError if it was pruned from another on."""
    before = pruned(cache)
    if before is None:
        return
    if before.first_layer != first_layer:
        raise ValueError(f"the cache was pruned from layer {before.first_layer} on, not from {first_layer}")
    cache.lent = True


def take_back(cache: Any) -> None:
    """End what `lend` or `record` began."""
    if pruned(cache) is not None:
        cache.lent = False


def pruned(cache: Any) -> Pruned | None:
    """What was pruned from a cache; None if nothing."""
    return cache.pruned if isinstance(cache, PrunedCache) else None


def length(cache: Any, layer: int) -> int:
    """Columns that a layer's cache holds; of a layer without columns, those of the next that has some."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[_counting(cache, layer)].get_seq_length())


def columns(cache: Any, layer: int, mask: Tensor | None, rows: int, device: torch.device, new: int = 0) -> Tensor:
    """int64 `[B, held + new]`: which of the tokens seen, or new, a layer's cache will hold; -1 for padding.

    `mask`: the caller's `[B, tokens seen + new]`, or None if it has no padding. Of a static cache, whose masks are as
    wide as it is from the start, with new tokens: `[B, all columns]`, without waiting to know how many it holds.
    """
    before = pruned(cache)
    start, removed = (0, 0) if before is None else (before.columns.shape[1], before.removed)
    static = new > 0 and cache.is_compileable
    width = cache.layers[_counting(cache, layer)].get_max_length() if static else length(cache, layer) + new
    found = torch.arange(removed, removed + width, device=device).repeat(rows, 1)
    if before is not None:
        found[:, :start] = before.columns.to(device)
    if mask is not None:
        since = mask[:, start + removed : width + removed].to(device, torch.bool)
        if not static and since.shape[1] < width - start:
            wanted = [rows, width + removed]
            raise ValueError(f"attention_mask must be {wanted}, of all tokens seen and new, got {list(mask.shape)}")
        found[:, start : start + since.shape[1]].masked_fill_(~since, -1)
    return found


def padded(cache: Any, mask: Tensor | None) -> bool:
    """Whether some columns of a cache, and of new tokens, may be padding."""
    before = pruned(cache)
    return mask is not None or (before is not None and before.padded)


def _counting(cache: Any, layer: int) -> int:
    """The first layer from this on that counts columns, which linear attention does not."""
    later = range(layer, len(cache.layers))
    return next((index for index in later if hasattr(cache.layers[index], "get_seq_length")), layer)


def _pruned_class(kind: type[Cache]) -> type[Cache]:
    if kind not in _classes:
        _classes[kind] = type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})
    return _classes[kind]


def _plain_class(cache: PrunedCache) -> Any:
    return type(cache).__bases__[1]


def _empty(kind: type[Cache]) -> Cache:
    made = _pruned_class(kind)
    return made.__new__(made)
