"""Importance from the attention inside the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...importance import query_attention, received_attention


class Calls:
    """The attention calls of one encoder layer while it encoded: one, or one for each image, frame or window."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.seen: list[tuple[Tensor, Tensor, float, dict[str, Any]]] = []

    def observe(self, query: Tensor, key: Tensor, scale: float, kwargs: dict[str, Any]) -> None:
        """Note a call; see `capture.Observer`."""
        self.seen.append((query.detach(), key.detach(), scale, kwargs))

    def tiles(self, patches: int, drop_cls: bool) -> Tensor:
        """`[tiles, n]` of a tower that encodes tiles of `patches` patches each.

        What CLS pays each token, where the tower has one (FasterVLM, VisPruner: arXiv 2412.01818); else what each
        receives from all.
        """
        scores = [self._tiles(query, key, scale, patches, drop_cls) for query, key, scale, _ in self.seen]
        return torch.cat(scores)

    def _tiles(self, query: Tensor, key: Tensor, scale: float, patches: int, drop_cls: bool) -> Tensor:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if query.shape[1] == patches:
            return received_attention(query, key, scale=scale, backend=self.backend)
        visual = slice(1, None) if drop_cls else None
        return query_attention(query[:, :1], key, scale=scale, visual=visual, backend=self.backend)

    def received(self, spans: list[int] | None = None, pool: int = 1) -> Tensor:
        """`[T / pool]` of a tower that encodes all images as one packed sequence, in `spans` that attend to themselves.

        Without `spans` they are those of the calls: one each, or as FlashAttention was told.
        """
        query = torch.cat([query[0].transpose(0, 1) for query, *_ in self.seen])
        key = torch.cat([key[0].transpose(0, 1) for _, key, *_ in self.seen])
        told = self.seen[0][3].get("cu_seq_lens_q")
        if spans is None and told is not None:
            cu_seqlens = told.to(torch.int32)
        else:
            lengths = spans or [query.shape[2] for query, *_ in self.seen]
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
        return received_attention(
            query, key, cu_seqlens=cu_seqlens, scale=self.seen[0][2], pool=pool, backend=self.backend
        )

    def filled_up(self, valid: Tensor) -> Tensor:
        """`[T]` of a tower that encodes images filled up to one length; `valid`: bool `[images, n]`, T of them True."""
        query, key, scale, _ = self.seen[0]
        valid = valid.to(query.device)
        cu_seqlens = functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        query, key = (one.transpose(1, 2)[valid] for one in (query, key))
        return received_attention(query, key, cu_seqlens=cu_seqlens, scale=scale, backend=self.backend)


def blocks(scores: Tensor, side: int) -> Tensor:
    """`[…, h, w]` summed over squares of `side`; at the lower and right edges by as much of a square as there is."""
    height, width = scores.shape[-2:]
    padded = functional.pad(scores, (0, -width % side, 0, -height % side))
    return padded.unflatten(-1, (-1, side)).sum(-1).unflatten(-2, (-1, side)).sum(-2)


@dataclass
class Encoding:
    """One call of an encoder, and what is watched in it."""

    calls: Calls  # of the layer whose attention is the importance
    features: list[Tensor] = field(default_factory=list)  # what the tower hands to the projector
