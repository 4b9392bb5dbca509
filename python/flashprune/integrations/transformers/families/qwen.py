"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..encoders import Calls
from ..prefill import Cut
from ..tokens import Item
from .base import Family


class Qwen2VL(Family):
    """Qwen2-VL: each image at its own size, 2 x 2 patches merged, three-dimensional positions."""

    model_types = ("qwen2_vl",)
    tower = "visual"

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        merge = base.config.vision_config.spatial_merge_size
        grids = torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist()
        return [Item.of_planes(kind, [(h // merge, w // merge)] * t) for t, h, w in grids]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        lengths = [len(item) for item in self.items(base, kind, arguments, output)]
        scores = calls.received(pool=base.config.vision_config.spatial_merge_size**2)
        return list(self._in_order(base, kind, arguments, scores).split(lengths))

    def _in_order(self, base: Any, kind: str, arguments: Mapping[str, Any], scores: Tensor) -> Tensor:
        return scores


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: most layers of the encoder attend in windows, for which the tokens are permuted."""

    model_types = ("qwen2_5_vl",)

    def default_layer(self, base: Any) -> int:
        return base.config.vision_config.fullatt_block_indexes[-1]

    def _in_order(self, base: Any, kind: str, arguments: Mapping[str, Any], scores: Tensor) -> Tensor:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        visual = base.visual
        window_index, _ = get_vision_window_index(
            arguments[f"{kind}_grid_thw"],
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
            kwargs={},
        )
        return scores[torch.argsort(window_index.to(scores.device))]


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of earlier encoder layers are added to the visual tokens after the first layers of the LLM."""

    model_types = ("qwen3_vl",)

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        if kwargs.get("deepstack_visual_embeds") is not None:
            masks = kwargs["visual_pos_masks"]
            kwargs["visual_pos_masks"] = cut.take(masks) & cut.valid.to(masks.device)
            kwargs["deepstack_visual_embeds"] = [
                embeds.index_select(0, cut.kept.to(embeds.device)) for embeds in kwargs["deepstack_visual_embeds"]
            ]
