"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, and the thinkers of Qwen2.5-Omni and Qwen3-Omni."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..encoders import Calls
from ..prefill import Cut
from ..tokens import Item
from .base import Family


class Qwen2VL(Family):
    """Qwen2-VL: each image at its own size, 2 x 2 patches merged, three-dimensional positions."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
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
    """Qwen2.5-VL and Qwen2.5-Omni: most layers of the encoder attend in windows, for which the tokens are permuted."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_5_omni_thinker")

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
    """Qwen3-VL and Qwen3-Omni: features of earlier encoder layers are added after the first layers of the LLM."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker")

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        if kwargs.get("deepstack_visual_embeds") is not None:
            masks = kwargs["visual_pos_masks"]
            kwargs["visual_pos_masks"] = cut.take(masks) & cut.valid.to(masks.device)
            kwargs["deepstack_visual_embeds"] = [
                embeds.index_select(0, cut.kept.to(embeds.device)) for embeds in kwargs["deepstack_visual_embeds"]
            ]


class Qwen35(Qwen2VL):
    """Qwen3.5: most layers of the LLM hold a state instead of keys and values."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
