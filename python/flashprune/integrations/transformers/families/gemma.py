"""Gemma 3 and Gemma 4: sliding windows in most layers of the LLM, and tokens of one image that see one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..encoders import Calls, blocks
from ..prefill import Cut
from ..tokens import Item
from .base import Family
from .llava import Llava


class Gemma3(Llava):
    """Gemma 3: images, and crops of them (pan and scan), of one size; the patches averaged to 16 x 16 tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    windows_cut_blocks = True

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        return [self._square(kind, len(tokens)) for tokens in output.pooler_output]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        projector = base.multi_modal_projector
        side, kernel = projector.patches_per_image, projector.kernel_size
        received = calls.tiles(patches=side * side, drop_cls=False).reshape(-1, side, side)
        return list(blocks(received, kernel).flatten(1))

    def default_layer(self, base: Any) -> int:
        return len(self.attention_modules(base)) - 1

    def blocks(self, base: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        types = arguments.get("token_type_ids")
        if types is None:
            return {}
        runs = _runs(types == 1)
        return {"full_attention": runs, "sliding_attention": runs}


class Gemma4(Family):
    """Gemma 4: each image at its own size, the patches of a token averaged; embeddings for each layer of the LLM."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    windows_cut_blocks = True

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        grids = self._grids(base, kind, arguments)
        if kind == "image":
            return [Item.of_planes(kind, [grid]) for grid in grids]
        queue = iter(grids)
        frames = torch.as_tensor(arguments["num_frames_per_video"]).tolist()
        return [Item.of_planes(kind, [next(queue) for _ in range(count)]) for count in frames]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        places, side = arguments[f"{kind}_position_ids"], base.config.vision_config.pooling_kernel_size
        valid = (places >= 0).all(-1)
        received, first, scores = calls.filled_up(valid), 0, []
        for here, taken, (h, w) in zip(places, valid, self._grids(base, kind, arguments), strict=True):
            x, y = (here[taken].to(received.device) // side).unbind(1)
            own = received[first : first + len(x)]
            scores.append(received.new_zeros(h * w).index_add_(0, y * w + x, own))
            first += len(x)
        lengths = [len(item) for item in self.items(base, kind, arguments, output)]
        return list(torch.cat(scores).split(lengths))

    def _grids(self, base: Any, kind: str, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Of each image or frame, tokens high and wide."""
        side = base.config.vision_config.pooling_kernel_size
        places = arguments[f"{kind}_position_ids"]  # [images or frames, patches, (x, y)], -1 to fill up
        return [(h // side, w // side) for w, h in (places.amax(1) + 1).tolist()]

    def blocks(self, base: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Only in layers with a window, and only in the larger models."""
        types = arguments.get("mm_token_type_ids")
        if types is None or base.config.get_text_config().use_bidirectional_attention != "vision":
            return {}
        return {"sliding_attention": _runs((types == 1) | (types == 2))}

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        if kwargs.get("per_layer_inputs") is not None:
            kwargs["per_layer_inputs"] = cut.take(kwargs["per_layer_inputs"])


def _runs(inside: Tensor) -> Tensor:
    """int64 `[B, L]`: 0, 1, … along each row's runs of True, -1 elsewhere."""
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return (starts.cumsum(1) - 1).masked_fill(~inside, -1)
