"""VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..encoders import Calls
from ..tokens import Item
from .base import Family


class VideoLlama3(Family):
    """VideoLLaMA 3: each image and frame at its own size, its patches averaged, as a rule only those of videos."""

    model_types: ClassVar[tuple[str, ...]] = ("video_llama_3",)
    tower = "vision_model"

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        return [Item.of_planes(kind, [(h, w)] * t) for t, h, w, _ in self._grids(kind, arguments)]

    def delivered(self, kind: str, items: Sequence[Item], arguments: Mapping[str, Any]) -> Sequence[Item]:
        """Of a video, as the processor has it, only what differs from the frame before."""
        mask = arguments.get("video_compression_mask")
        if kind != "video" or mask is None:
            return items
        parts = mask.to("cpu", torch.bool).split([len(item) for item in items])
        return [item.part(one) for item, one in zip(items, parts, strict=True)]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        grids = self._grids(kind, arguments)
        patches = calls.received().split([t * h * w * of for t, h, w, of in grids])
        return [one.unflatten(0, (-1, of)).sum(1) for one, (*_, of) in zip(patches, grids, strict=True)]

    def _grids(self, kind: str, arguments: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
        """Of each image or video its frames, their rows and columns of tokens, and the patches of a token."""
        grids = torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist()
        sides = torch.as_tensor(arguments[f"{kind}_merge_sizes"]).tolist()
        return [(t, h // side, w // side, side * side) for (t, h, w), side in zip(grids, sides, strict=True)]
