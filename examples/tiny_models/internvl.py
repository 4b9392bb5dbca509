"""InternVL and Qianfan-OCR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily


class InternVL(TinyFamily):
    name, needs, processor = "internvl", "InternVLConfig", "InternVLProcessor"
    video_processor, image, video = "InternVLVideoProcessor", "<IMG_CONTEXT>", "<video>"
    image_name = "context_image_token"
    named: ClassVar = {"start_image_token": "<img>", "end_image_token": "</img>"}

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**vision, image_size=112),
            text_config=transformers.Qwen2Config(**text),
            **{"image_token_id": self.image_id(tokenizer), "image_seq_length": 16, "tie_word_embeddings": False},
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        height, width = config.vision_config.image_size
        return transformers.GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, crop_to_patches=True, max_patches=6
        )

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_seq_length": config.image_seq_length}

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        # Every frame is one tile, and for the model an image like any other.
        tiles = images(list(frames), crop_to_patches=False, return_tensors="pt")["pixel_values"]
        return {"pixel_values_videos": tiles[None]}

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batch["pixel_values"] = batch.pop("pixel_values_videos")[0]
        return batch


class QianfanOcr(InternVL):
    name, needs, processor = "qianfan_ocr", "QianfanOCRConfig", "QianfanOCRProcessor"
    video_processor = video = None
    written = "<image>"
    turns = (*InternVL.turns, "<image>")

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.QianfanOCRConfig(
            vision_config=transformers.QianfanOCRVisionConfig(**vision, image_size=112),
            text_config=transformers.Qwen3Config(**text, head_dim=16),
            **{"image_token_id": self.image_id(tokenizer), "image_seq_length": 16},
        )
