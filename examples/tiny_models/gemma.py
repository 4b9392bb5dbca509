"""Gemma 3 and Gemma 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from .family import TinyFamily
from .qwen import FPS

# Published models have one layer with full attention after five with a window; here it is shorter than an image.
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 20, "head_dim": 16}


class Gemma3(TinyFamily):
    name, needs, processor = "gemma3", "Gemma3Config", "Gemma3Processor"
    image, written = "<image_soft_token>", "<start_of_image>"
    named: ClassVar = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(
                **text, **LAYERS | {"sliding_window": 12}, query_pre_attn_scalar=16
            ),
            vision_config=transformers.SiglipVisionConfig(**vision, image_size=112, vision_use_head=False),
            mm_tokens_per_image=16,
            image_token_index=self.image_id(tokenizer),
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            tie_word_embeddings=False,
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        side = config.vision_config.image_size
        return transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side})

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_seq_length": config.mm_tokens_per_image}


class Gemma4(TinyFamily):
    """Each image at its own size, up to 70 tokens of 2 x 2 patches; no audio."""

    name, needs, processor = "gemma4", "Gemma4Config", "Gemma4Processor"
    video_processor, image, video = "Gemma4VideoProcessor", "<|image|>", "<|video|>"
    named: ClassVar = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        text |= LAYERS | {"global_head_dim": 16, "hidden_size_per_layer_input": 8}
        text |= {"vocab_size_per_layer_input": len(tokenizer), "use_bidirectional_attention": "vision"}
        vision |= {"head_dim": 16, "num_key_value_heads": 2, "pooling_kernel_size": 2, "position_embedding_size": 160}
        return transformers.Gemma4Config(
            text_config=transformers.Gemma4TextConfig(**text),
            vision_config=transformers.Gemma4VisionConfig(**vision),
            audio_config=None,
            image_token_id=self.image_id(tokenizer),
            video_token_id=self.video_id(tokenizer),
            audio_token_id=tokenizer.audio_token_id,
            boi_token_id=tokenizer.boi_token_id,
            eoi_token_id=tokenizer.eoi_token_id,
            tie_word_embeddings=False,
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        vision = config.vision_config
        return transformers.Gemma4ImageProcessorPil(
            patch_size=vision.patch_size, pooling_kernel_size=vision.pooling_kernel_size, max_soft_tokens=70
        )

    def processor_parts(self) -> dict[str, Any]:
        return {"feature_extractor": transformers.Gemma4AudioFeatureExtractor()}

    def video_settings(self, images: Any) -> dict[str, Any]:
        settings = {"video_processor_type": self.video_processor, "max_soft_tokens": images.max_soft_tokens}
        return settings | {name: getattr(images, name) for name in ("patch_size", "pooling_kernel_size")}

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        # A frame is an image to the tower, and has its time before it.
        times = VideoMetadata(total_num_frames=len(frames), fps=FPS, frames_indices=list(range(len(frames))))
        batch = images(list(frames), return_tensors="pt")
        counts = torch.as_tensor(batch["num_soft_tokens_per_image"]).tolist()
        return {
            "pixel_values_videos": batch["pixel_values"],
            "video_position_ids": batch["image_position_ids"],
            "num_frames_per_video": torch.tensor([len(frames)]),
            "num_soft_tokens_per_video": counts[:1],
            "video_metadata": [times],
        }

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        del batch["num_soft_tokens_per_video"]
        return batch | {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(batch["input_ids"]))}
