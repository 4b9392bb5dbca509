"""Models whose every image, or tile of one, is a square of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import caches
from ..encoders import Calls, blocks
from ..tokens import Item
from .base import Family


class Squares(Family):
    """A square tower of equal patches, k x k of them a token; tiles of an image have text between them."""

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        return [square(kind, len(tokens)) for tokens in output.pooler_output]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        vision = base.config.vision_config
        ((side, _),) = self.items(base, kind, arguments, output)[0].planes
        patches = vision.image_size // vision.patch_size
        tiles = calls.tiles(patches=patches**2, drop_cls=True).unflatten(1, (patches, patches))
        return list(blocks(tiles, math.ceil(patches / side)).flatten(1))


class AyaVision(Squares):
    """Aya Vision and Command A Vision: 2 x 2 patches of SigLIP a token."""

    model_types = ("aya_vision", "cohere2_vision")


class DeepseekVL(Squares):
    """DeepSeek-VL, its hybrid, whose importance is that of its SigLIP tower, and Janus where it reads images."""

    model_types = ("deepseek_vl", "deepseek_vl_hybrid", "janus")
    tower = "vision_model"


class Ovis2(Squares):
    """Ovis2: a token is a mixture of rows of a visual vocabulary."""

    model_types = ("ovis2",)


class PaliGemma(Squares):
    """PaliGemma: the tokens of a prompt, of its image and its text, all see one another."""

    model_types = ("paligemma",)

    def blocks(self, base: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        types, cache = arguments.get("token_type_ids"), caches.given(arguments)
        first = cache is None or not cache.is_initialized or arguments.get("pixel_values") is not None
        if types is None or not first:
            return {}
        prefix = torch.where(types == 0, 0, -1)
        return {"full_attention": prefix, "sliding_attention": prefix}


class VipLlava(Squares):
    """ViP-LLaVA: the patches of several layers of CLIP, joined."""

    model_types = ("vipllava",)


class GotOcr2(Squares):
    """GOT-OCR 2.0: the attention of its tower, SAM's, is in windows and computed out of sight."""

    model_types = ("got_ocr2",)
    scores = Family.scores


class Idefics3(Squares):
    """Idefics3 and SmolVLM: frames of videos are images; the features of a prompt's tiles come in one piece."""

    model_types = ("idefics3", "smolvlm")
    text_model = "text_model"
    tower = "vision_model"

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        tiles = len(output.last_hidden_state)
        return [square(kind, sum(map(len, output.pooler_output)) // tiles)] * tiles

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        mask = arguments.get("pixel_attention_mask")
        if mask is not None:
            shown = mask.flatten(2).bool()
            if (shown.any(-1) & ~shown.all(-1)).any():  # all of it hides a tile that only fills up the batch
                raise ValueError("pixel_attention_mask must show whole tiles for importance='received_attention'")
        return super().scores(base, kind, arguments, output, calls)


def square(kind: str, count: int) -> Item:
    """An item of `count` tokens, a square number."""
    side = math.isqrt(count)
    return Item.of_planes(kind, [(side, side)])
