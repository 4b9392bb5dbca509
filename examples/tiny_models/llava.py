"""LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily
from .tokenizer import LLAVA_CHAT


class Llava(TinyFamily):
    name, needs, processor = "llava", "LlavaConfig", "LlavaProcessor"
    template = LLAVA_CHAT
    turns = ("</s>", "<pad>")

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        vision |= {"image_size": 112, "projection_dim": 32}
        if real:
            text |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32064}
            text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336}
            vision |= {"num_attention_heads": 16, "projection_dim": 768}
        towers = {"vision_config": transformers.CLIPVisionConfig(**vision)}
        towers |= {"text_config": transformers.LlamaConfig(**text)}
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        return transformers.LlavaConfig(**towers, image_token_index=self.image_id(tokenizer), image_seq_length=tokens)

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.LlavaImageProcessorPil(**self._sizes(config))

    def _sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        options = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1}
        return options | {"vision_feature_select_strategy": "default"}


class LlavaNext(Llava):
    name, needs, processor = "llava_next", "LlavaNextConfig", "LlavaNextProcessor"

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        towers = {"vision_config": transformers.CLIPVisionConfig(**vision, image_size=70, projection_dim=32)}
        towers |= {"text_config": transformers.MistralConfig(**text, sliding_window=None)}
        pinpoints = [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]
        return transformers.LlavaNextConfig(
            **towers, image_token_index=self.image_id(tokenizer), image_grid_pinpoints=pinpoints
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.LlavaNextImageProcessorPil(
            **self._sizes(config), image_grid_pinpoints=config.image_grid_pinpoints
        )


class LlavaNextVideo(LlavaNext):
    # Its own processor cannot do without a video part, which needs torchvision: LLaVA-NeXT's treats images alike.
    name, needs = "llava_next_video", "LlavaNextVideoConfig"
    video = "<video>"

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.LlavaNextVideoConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=70, projection_dim=32),
            text_config=transformers.LlamaConfig(**text),
            image_token_index=self.image_id(tokenizer),
            video_token_index=self.video_id(tokenizer),
            image_grid_pinpoints=[[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]],
            tie_word_embeddings=False,
        )

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        tiles = [images([frame], return_tensors="pt")["pixel_values"][0, 0] for frame in frames]
        return {"pixel_values_videos": torch.stack(tiles)[None]}

    def video_text(self, processor: Any, video: dict[str, Any]) -> str:
        frames, _, height, width = video["pixel_values_videos"][0].shape
        side = processor.patch_size * 2
        return self.video * (frames * (height // side) * (width // side))


class LlavaOnevision(TinyFamily):
    name, needs, processor = "llava_onevision", "LlavaOnevisionConfig", "LlavaOnevisionProcessor"
    video_processor, video = "LlavaOnevisionVideoProcessor", "<video>"

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**vision, image_size=70, vision_use_head=False),
            text_config=transformers.Qwen2Config(**text),
            image_token_index=self.image_id(tokenizer),
            video_token_index=self.video_id(tokenizer),
            # At most 2 tiles' worth of tokens: the larger grids are scaled down to that.
            image_grid_pinpoints=[[70 * rows, 70 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
            vision_aspect_ratio="anyres_max_2",
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        side = config.vision_config.image_size
        return transformers.LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
        )

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        vision = config.vision_config
        options = {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2}
        return options | {
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        # Every frame is one tile: the first of an image's, which shows all of it.
        tiles = [images([frame], return_tensors="pt")["pixel_values"][0, 0] for frame in frames]
        return {"pixel_values_videos": torch.stack(tiles)[None]}
