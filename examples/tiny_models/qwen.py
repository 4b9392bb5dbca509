"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, the latter two also as mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from .family import TinyFamily

FPS = 2.0  # of every video here
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Qwen2VL(TinyFamily):
    name, needs, processor = "qwen2_vl", "Qwen2VLConfig", "Qwen2VLProcessor"
    video_processor, image, video = "Qwen2VLVideoProcessor", "<|image_pad|>", "<|video_pad|>"
    named: ClassVar = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    around_image = around_video = ("<|vision_start|>", "<|vision_end|>")
    image_class = "Qwen2VLImageProcessorPil"
    shared = False  # whether a video has as many pixels as an image

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        special = {"image_token_id": self.image_id(tokenizer), "video_token_id": self.video_id(tokenizer)}
        special |= {"tie_word_embeddings": False}
        special |= {name: getattr(tokenizer, name) for name in ("vision_start_token_id", "vision_end_token_id")}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        tower: dict[str, Any] = {"depth": 4, "num_heads": 2}
        self.sizes(real, text, tower)
        return getattr(transformers, self.needs)(text_config=text, vision_config=tower, **special)

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        """Change what the configurations of the LLM and of the tower hold."""
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        vision = config.vision_config
        side = 2 * vision.patch_size  # of the square that one token stands for
        shortest, longest = (16, 100) if config.text_config.hidden_size == 64 else (4, 16384)
        size = {"shortest_edge": shortest * side**2, "longest_edge": longest * side**2}
        return getattr(transformers, self.image_class)(size=size, patch_size=vision.patch_size)

    def video_settings(self, images: Any) -> dict[str, Any]:
        settings = super().video_settings(images)
        return settings | {key: getattr(images, key) for key in ("patch_size", "merge_size", "temporal_patch_size")}

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        times = VideoMetadata(total_num_frames=len(frames), fps=FPS, frames_indices=list(range(len(frames))))
        patches, grid = patches_over_time(images, frames, self.shared)
        return {"pixel_values_videos": patches, "video_grid_thw": grid, "video_metadata": [times]}

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batch["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(batch["input_ids"]))
        return batch


class Qwen25VL(Qwen2VL):
    name, needs, processor = "qwen2_5_vl", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        # Windows of 4 x 4 tokens, as published: every image of more tokens is split.
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 112}
        tower |= {"fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
        if real:
            text["rope_parameters"] |= {"mrope_section": [16, 24, 24]}
            text |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
            text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000}
            tower |= {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 32}
            tower |= {"num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batch["second_per_grid_ts"] = torch.tensor([processor.image_processor.temporal_patch_size / FPS])
        return super().video_batch(processor, batch)


class Qwen3VL(Qwen2VL):
    name, needs, processor = "qwen3_vl", "Qwen3VLConfig", "Qwen3VLProcessor"
    video_processor = "Qwen3VLVideoProcessor"
    around_video = ("", "")  # the processor puts the marks around every frame by itself
    shared = True

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        text["rope_parameters"] |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 5e6}
        text |= {"head_dim": 16}
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 256}
        tower |= {"deepstack_visual_indexes": [0, 1, 2]}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        images = super().image_processor(config)
        images.image_mean = images.image_std = [0.5] * 3
        return images

    def video_settings(self, images: Any) -> dict[str, Any]:
        # The size limits the pixels of all frames together.
        size = {edge: images.temporal_patch_size * pixels for edge, pixels in dict(images.size).items()}
        return super().video_settings(images) | {"size": size}


class Qwen3VLMoe(Qwen3VL):
    name, needs = "qwen3_vl_moe", "Qwen3VLMoeConfig"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        super().sizes(real, text, tower)
        text |= EXPERTS


class Qwen35(Qwen3VL):
    """Linear attention in every other layer of the LLM; published models have it in three of four."""

    name, needs = "qwen3_5", "Qwen3_5Config"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        super().sizes(real, text, tower)
        tower |= {"patch_size": 14}
        del tower["deepstack_visual_indexes"]
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
        text |= {"layer_types": ["linear_attention", "full_attention"] * 2}
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


class Qwen35Moe(Qwen35):
    name, needs = "qwen3_5_moe", "Qwen3_5MoeConfig"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        super().sizes(real, text, tower)
        text |= EXPERTS | {"shared_expert_intermediate_size": 32}


def patches_over_time(images: Any, frames: Sequence[Image.Image], shared: bool) -> tuple[Tensor, Tensor]:
    """Qwen's patches of a video ``[t * h * w, C * 2 * p * p]``, and ``[[t, h, w]]``.

    A patch spans two frames, and the image processor ``images`` fills both with the one image: here the second comes
    from the next frame. An odd last frame is repeated, as the video processor does. The limits on a frame's size are an
    image's, or ``shared``: the whole video has the pixels of one pair of such frames. (Qwen3-VL's own video processor
    lets an odd number of frames be a little larger.)
    """
    span, side = images.temporal_patch_size, images.patch_size
    frames = [*frames, *[frames[-1]] * (-len(frames) % span)]
    share = len(frames) // span if shared else 1
    size = {edge: images.size[edge] // share for edge in ("shortest_edge", "longest_edge")}
    batch = images(frames, size=size, return_tensors="pt")
    _, height, width = batch["image_grid_thw"][0].tolist()
    pixels = batch["pixel_values"].view(-1, span, height * width, 3, span, side, side)
    pixels = torch.stack([pixels[:, i, :, :, i] for i in range(span)], dim=3)
    return pixels.reshape(-1, 3 * span * side * side), torch.tensor([[len(frames) // span, height, width]])
