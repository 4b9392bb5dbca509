"""Models with Pixtral's tower whose patches are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..encoders import Calls, blocks
from ..tokens import Item
from .base import Family


class Mistral3(Family):
    """Mistral Small 3.1 and later: images at their own size, n x n patches a token, a token of text after each row."""

    model_types = ("mistral3",)

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        merge = base.config.spatial_merge_size
        return [Item.of_planes(kind, [(h // merge, w // merge)]) for h, w in self._patches(base, arguments)]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        grids, merge = self._patches(base, arguments), base.config.spatial_merge_size
        lengths = [h * w for h, w in grids]
        images = calls.received(lengths).split(lengths)
        whole = [(h - h % merge, w - w % merge) for h, w in grids]  # patches over are in no token
        return [
            blocks(image.reshape(grid)[:h, :w], merge).flatten()
            for image, grid, (h, w) in zip(images, grids, whole, strict=True)
        ]

    def _patches(self, base: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        patch = base.config.vision_config.patch_size
        return [(h // patch, w // patch) for h, w in torch.as_tensor(arguments["image_sizes"]).tolist()]


class LightOnOcr(Mistral3):
    """LightOnOCR: the same without the tokens after rows."""

    model_types = ("lighton_ocr",)
    tower = "vision_encoder"
