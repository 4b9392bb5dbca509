"""InternVL and Qianfan-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..encoders import Calls
from ..tokens import Item
from .llava import Llava


class InternVL(Llava):
    """InternVL and Qianfan-OCR: tiles of one size, 2 x 2 patches in a token; the tiles of an image adjoin."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl", "qianfan_ocr")
    join_adjacent = True

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        return [self._square(kind, len(tokens)) for tokens in output.pooler_output]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        (height, width), (patch_height, patch_width) = (
            base.config.vision_config.image_size,
            base.config.vision_config.patch_size,
        )
        rows, columns = height // patch_height, width // patch_width
        tiles = calls.tiles(
            patches=rows * columns, drop_cls=base.config.vision_feature_select_strategy == "default"
        ).reshape(-1, rows, columns, 1)
        merged = base.pixel_shuffle(tiles, scale_factor=base.config.downsample_ratio).sum(-1)
        return list(merged.flatten(1))
