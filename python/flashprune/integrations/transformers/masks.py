"""Masks of a shorter sequence, for language models whose layers do not all attend to everything before.

A window counts positions, and kept tokens keep theirs: a layer sees, of what it would see without pruning, what is
left. Transformers counts columns, of which a pruned sequence has fewer, so the masks are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, or_masks

from . import caches

_SLIDING = "sliding_attention"
_KINDS = ("full_attention", _SLIDING, "linear_attention")


def differ(config: Any) -> bool:
    """Whether a decoder's layers need masks of more than one kind, or windows."""
    return _SLIDING in kinds(config)


def prepare(
    config: Any,
    embeds: Tensor,
    columns: Tensor,
    padded: bool,
    seen: int,
    cache: Any,
    blocks: Mapping[str, Tensor],
    windows_cut_blocks: bool = False,
) -> Any:
    """What a decoder is given for `attention_mask` with `[B, L, D]` embeddings, by kind of layer if it names kinds.

    `columns`: int64 `[B, held + L]`, which of the tokens seen each is that the cache holds or that is new, -1 for
    padding; `padded`: whether any may be; `seen`: how many were; `blocks`, `windows_cut_blocks`: see `Family`.
    """
    types = kinds(config)
    unknown = set(types) - set(_KINDS)
    if unknown:
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))} cannot be pruned: only of {', '.join(_KINDS)}")
    window = config.sliding_window if _SLIDING in types else 0
    if window and seen > window and (config._attn_implementation or "").startswith("flash"):
        raise ValueError(
            f"a pruned prompt of more than {window} tokens, the window of this model, needs attn_implementation='sdpa' "
            f"or 'eager': {config._attn_implementation} counts in its window only tokens that are left"
        )
    valid = columns >= 0 if padded else None
    masks: dict[str, Any] = {}
    for kind in set(types):
        if kind == "linear_attention":
            masks[kind] = None if valid is None or embeds.shape[1] == 1 else valid[:, -embeds.shape[1] :]
            continue
        block = blocks.get(kind)
        same = None if block is None else same_block(columns, block)
        within = _within(columns, window) if kind == _SLIDING and seen > window else None
        if within is not None and same is not None and not windows_cut_blocks:
            within = or_masks(within, same)
        masks[kind] = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=valid,
            **{caches.NAME: cache},
            or_mask_function=same,
            and_mask_function=within,
            layer_idx=types.index(kind),
        )
    return masks if getattr(config, "layer_types", None) else masks[types[0]]


def kinds(config: Any) -> list[str]:
    """The kind of each layer of a decoder, by the names of Transformers."""
    named = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) is not None
    return list(named) if named else [_SLIDING if sliding else "full_attention"] * config.num_hidden_layers


def same_block(columns: Tensor, blocks: Tensor) -> Callable[..., Tensor]:
    """Of new tokens; those that the cache holds are of none."""
    blocks = torch.nn.functional.pad(blocks, (columns.shape[1] - blocks.shape[1], 0), value=-1)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (blocks[batch, query] >= 0) & (blocks[batch, query] == blocks[batch, key])

    return same


def _within(columns: Tensor, window: int) -> Callable[..., Tensor]:
    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return columns[batch, query] - columns[batch, key] < window

    return within
