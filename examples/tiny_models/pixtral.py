"""Mistral 3 and LightOnOCR: Pixtral's tower, 2 x 2 patches a token."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily
from .tokenizer import LLAVA_CHAT


class LightOnOcr(TinyFamily):
    name, needs, processor, image = "lighton_ocr", "LightOnOcrConfig", "LightOnOcrProcessor", "<|image_pad|>"
    named: ClassVar = {"image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    template = LLAVA_CHAT
    turns = ("</s>", "<pad>")

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.LightOnOcrConfig(
            vision_config=transformers.PixtralVisionConfig(**vision, image_size=280),
            text_config=transformers.Qwen3Config(**text, head_dim=16),
            image_token_id=self.image_id(tokenizer),
            tie_word_embeddings=False,
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        side = config.vision_config.image_size
        return transformers.PixtralImageProcessorPil(
            size={"longest_edge": side}, patch_size=config.vision_config.patch_size
        )

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"patch_size": config.vision_config.patch_size, "spatial_merge_size": config.spatial_merge_size}


class Mistral3(LightOnOcr):
    # Pixtral's processor needs torchvision; LightOnOCR's differs in that it writes no token after a row.
    name, needs = "mistral3", "Mistral3Config"

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.Mistral3Config(
            vision_config=transformers.PixtralVisionConfig(**vision, image_size=280),
            text_config=transformers.MistralConfig(**text, sliding_window=None),
            image_token_index=self.image_id(tokenizer),
            tie_word_embeddings=False,
        )
