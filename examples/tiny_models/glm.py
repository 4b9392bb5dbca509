"""GLM-4.1V, GLM-4.5V (a mixture of experts), GLM-4.6V."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .qwen import EXPERTS, Qwen2VL


class Glm4v(Qwen2VL):
    name, needs, processor = "glm4v", "Glm4vConfig", "Glm4vProcessor"
    video_processor, image, video = "Glm4vVideoProcessor", "<|image|>", "<|video|>"
    named: ClassVar = {
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    around_image = ("<|begin_of_image|>", "<|end_of_image|>")
    around_video = ("<|begin_of_video|>", "<|end_of_video|>")
    rope: ClassVar = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    image_class = "Glm4vImageProcessorPil"
    shared = True

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        special = {"image_token_id": self.image_id(tokenizer), "video_token_id": self.video_id(tokenizer)}
        special |= {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in self.named}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | self.rope}
        tower = {"depth": 3, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
        tower |= {"image_size": 112}
        self.sizes(real, text, tower)
        return getattr(transformers, self.needs)(
            text_config=text, vision_config=tower, tie_word_embeddings=False, **special
        )

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        pass

    def image_processor(self, config: PreTrainedConfig) -> Any:
        images = super().image_processor(config)
        # Its limits count the pixels of both frames that a patch spans.
        images.size = {edge: images.temporal_patch_size * pixels for edge, pixels in dict(images.size).items()}
        return images

    def video_settings(self, images: Any) -> dict[str, Any]:
        return super().video_settings(images) | {"size": dict(images.size)}


class Glm46V(Glm4v):
    name, needs, processor = "glm46v", "Glm46VConfig", "Glm46VProcessor"
    video_processor, image_class = "Glm46VVideoProcessor", "Glm46VImageProcessorPil"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        text["model_type"], tower["model_type"] = "glm4v_text", "glm4v_vision"


class Glm4vMoe(Glm4v):
    name, needs = "glm4v_moe", "Glm4vMoeConfig"

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        text |= EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16}
