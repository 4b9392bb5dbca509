"""VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily


class VideoLlama3(TinyFamily):
    name, needs, processor = "video_llama_3", "VideoLlama3Config", "VideoLlama3Processor"
    video_processor, image, video = "VideoLlama3VideoProcessor", "<|image_pad|>", "<|video_pad|>"

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.VideoLlama3Config(
            vision_config=transformers.models.video_llama_3.VideoLlama3VisionConfig(**vision),
            text_config=transformers.Qwen2Config(**text),
            image_token_id=self.image_id(tokenizer),
            video_token_id=self.video_id(tokenizer),
        )

    def image_processor(self, config: PreTrainedConfig) -> Any:
        patch = config.vision_config.patch_size
        size = {"shortest_edge": 16 * patch**2, "longest_edge": 100 * patch**2}
        return transformers.VideoLlama3ImageProcessorPil(size=size, patch_size=patch)

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        batch = images(list(frames), merge_size=2, return_tensors="pt")
        grids = batch["image_grid_thw"]
        video = grids[:1].clone()
        video[0, 0] = len(grids)
        return {
            "pixel_values_videos": batch["pixel_values"],
            "video_grid_thw": video,
            "video_merge_sizes": batch["image_merge_sizes"][:1],
        }

    def video_text(self, processor: Any, video: dict[str, Any]) -> str:
        """As the processor writes it where no two frames are alike."""
        frames, height, width = video["video_grid_thw"][0].tolist()
        tokens = self.video * (height * width // 4)
        return ",".join(f"Time {frame / 2:.1f}s:{tokens}" for frame in range(frames))
