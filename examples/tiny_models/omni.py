"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: what hears, sees and writes; the talker, which speaks, is left out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .qwen import EXPERTS, FPS, Qwen2VL


class Qwen25Omni(Qwen2VL):
    name, needs = "qwen2_5_omni_thinker", "Qwen2_5OmniThinkerModel"
    processor = "Qwen2_5OmniProcessor"
    image, video = "<|IMAGE|>", "<|VIDEO|>"
    named: ClassVar = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
    }
    around_image = around_video = ("<|vision_bos|>", "<|vision_eos|>")
    audio: ClassVar[dict[str, Any]] = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    index_names = ("audio_token_index", "image_token_index", "video_token_index")

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        audio_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        ids = (audio_id, self.image_id(tokenizer), self.video_id(tokenizer))
        special: dict[str, Any] = dict(zip(self.index_names, ids, strict=True))
        special |= {"audio_start_token_id": tokenizer.audio_bos_token_id, "tie_word_embeddings": False}
        special |= {"vision_start_token_id": tokenizer.vision_bos_token_id}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        tower: dict[str, Any] = {"depth": 4, "num_heads": 2}
        self.sizes(real, text, tower)
        sound = {"d_model": 16, "output_dim": 64, "num_mel_bins": 16, "max_source_positions": 100} | self.audio
        config_class = getattr(transformers, self.needs).config_class
        return config_class(text_config=text, vision_config=tower, audio_config=sound, **special)

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 112}
        tower |= {"fullatt_block_indexes": [1, 3]}

    def processor_parts(self) -> dict[str, Any]:
        return {"feature_extractor": transformers.WhisperFeatureExtractor(feature_size=16)}

    def video_text(self, processor: Any, video: dict[str, Any]) -> str:
        return processor.replace_video_token(video, 0, load_audio_from_video=False, video_to_audio_indices=[None])

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"video_second_per_grid": torch.tensor([processor.image_processor.temporal_patch_size / FPS])}


class Qwen3Omni(Qwen25Omni):
    name, needs = "qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerModel"
    processor = "Qwen3OmniMoeProcessor"
    audio: ClassVar = Qwen25Omni.audio | {"downsample_hidden_size": 8, "n_window": 10}
    index_names = ("audio_token_id", "image_token_id", "video_token_id")

    def sizes(self, real: bool, text: dict[str, Any], tower: dict[str, Any]) -> None:
        text["rope_parameters"] |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        text |= EXPERTS | {"head_dim": 16}
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 256}
        tower |= {"deepstack_visual_indexes": [0, 1, 2], "patch_size": 14}
