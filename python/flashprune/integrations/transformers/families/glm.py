"""GLM-4.1V, GLM-4.5V, GLM-4.6V."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens import KINDS
from .qwen import Qwen2VL


class Glm4v(Qwen2VL):
    """Images and videos as Qwen2-VL's, but one placeholder for both: a video's stand between its two marks."""

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v")

    def kinds(self, base: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        kinds = super().kinds(base, input_ids, inputs_embeds)
        if input_ids is None:  # then the model itself tells them apart by two placeholders
            return kinds
        begun, ended = (
            (input_ids == getattr(base.config, f"video_{mark}_token_id")).cumsum(1) for mark in ("start", "end")
        )
        image, video = KINDS.index("image"), KINDS.index("video")
        return torch.where((kinds == image) & (begun > ended), video, kinds)
