"""Gemma 3 and Gemma 4."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily

# Published models have one layer with full attention after five with a window; here the window is shorter than an image
# and the text around it.
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 20, "head_dim": 16}


class Gemma3(TinyFamily):
    name, needs, processor = "gemma3", "Gemma3Config", "Gemma3Processor"
    image, written = "<image_soft_token>", "<start_of_image>"
    named: ClassVar = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        return transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text, **LAYERS, query_pre_attn_scalar=16),
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
