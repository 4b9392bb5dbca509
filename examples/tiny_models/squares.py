"""Models whose every image, or tile of one, is a square of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .family import TinyFamily
from .tokenizer import LLAVA_CHAT


class Squares(TinyFamily):
    """A tower of 6 x 6 patches."""

    template = LLAVA_CHAT
    turns = ("</s>", "<pad>")
    side = 84

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        towers = {"vision_config": self.vision(vision), "text_config": self.text(text)}
        named = {"image_token_id": self.image_id(tokenizer), "tie_word_embeddings": False}
        return getattr(transformers, self.needs)(**towers, **named, **self.settings(tokenizer))

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        return transformers.LlamaConfig(**text)

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        return transformers.SiglipVisionConfig(**vision, image_size=self.side, vision_use_head=False)

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """What else the configuration takes."""
        return {}

    @property
    def size(self) -> dict[str, int]:
        return {"height": self.side, "width": self.side}


class DeepseekVL(Squares):
    name, needs, processor = "deepseek_vl", "DeepseekVLConfig", "DeepseekVLProcessor"
    image = "<image_placeholder>"

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.DeepseekVLImageProcessorPil(size=self.size)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"num_image_tokens": 36}


class DeepseekVLHybrid(DeepseekVL):
    name, needs, processor = "deepseek_vl_hybrid", "DeepseekVLHybridConfig", "DeepseekVLHybridProcessor"

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        sam = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 96}
        sam |= {"output_channels": 8, "window_size": 4, "global_attn_indexes": [0]}
        return {"high_res_vision_config": transformers.SamVisionConfig(**sam)}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        kind = transformers.DeepseekVLHybridImageProcessorPil
        # Older versions of Transformers take the colour of the borders from means only where they are given.
        means = {name: getattr(kind, name) for name in ("image_mean", "high_res_image_mean")}
        return kind(size=self.size, high_res_size={"height": 96, "width": 96}, **means)


class Janus(DeepseekVL):
    name, needs, processor = "janus", "JanusConfig", "JanusProcessor"
    named: ClassVar = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        vision |= {"mlp_ratio": 2.0, "image_size": self.side, "projection_dim": 64, "num_image_tokens": 36}
        del vision["intermediate_size"]
        return transformers.JanusVisionConfig(**vision)

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        drawn = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "num_patches": 6}
        drawn |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 64, "image_token_embed_dim": 64}
        return {"vq_config": transformers.JanusVQVAEConfig(**drawn)}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.JanusImageProcessorPil(size=self.size)


class VipLlava(Squares):
    name, needs, processor = "vipllava", "VipLlavaConfig", "LlavaProcessor"

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        return transformers.CLIPVisionConfig(**vision, image_size=self.side, projection_dim=32)

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        # Named otherwise in older versions of Transformers.
        names = ("vision_feature_layer", "vision_feature_layers")
        layers = {name: [-2, 1] for name in names if hasattr(transformers.VipLlavaConfig(), name)}
        return layers | {"image_seq_length": 36}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.CLIPImageProcessorPil(size={"shortest_edge": self.side}, crop_size=self.size)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        options = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1}
        return options | {"vision_feature_select_strategy": "default"}


class Idefics3(Squares):
    """Tiles of 8 x 8 patches, 2 x 2 a token."""

    name, needs, processor = "idefics3", "Idefics3Config", "Idefics3Processor"
    tower = "Idefics3VisionConfig"
    turns = ("</s>", "<pad>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    side = 112

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        module = getattr(transformers.models, self.name)
        return getattr(module, self.tower)(**vision, image_size=self.side)

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * self.side}, max_image_size={"longest_edge": self.side}
        )

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_seq_len": 16}


class SmolVLM(Idefics3):
    # Its own processor needs num2words and torchvision; Idefics3's writes the same prompts.
    name, needs, tower = "smolvlm", "SmolVLMConfig", "SmolVLMVisionConfig"


class Ovis2(Squares):
    """Tiles of 8 x 8 patches, 2 x 2 a token."""

    name, needs, processor = "ovis2", "Ovis2Config", "Ovis2Processor"
    image, written = "<IMG_ATOM>", "<image>"
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    turns = ("</s>", "<pad>", "<image>", *marks)
    side = 112

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        return transformers.Qwen2Config(**text)

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        vision |= {"image_size": self.side, "hidden_stride": 2, "vocab_size": 48}
        return transformers.models.ovis2.Ovis2VisionConfig(**vision, num_visual_indicator_tokens=len(self.marks))

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        marks = tokenizer.convert_tokens_to_ids(list(self.marks))
        return {"visual_indicator_token_ids": marks, "hidden_size": 64, "vocab_size": len(tokenizer)}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.Ovis2ImageProcessorPil(size=self.size, crop_to_patches=True, max_patches=4)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_seq_length": 16}


class AyaVision(Squares):
    """Tiles of 8 x 8 patches, 2 x 2 a token, for an LLM whose every other layer attends in a window."""

    name, needs, processor = "aya_vision", "AyaVisionConfig", "AyaVisionProcessor"
    image, written = "<|IMG_PATCH|>", "<image>"
    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    turns = ("</s>", "<pad>", "<image>", *marks)
    side = 112

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        text["layer_norm_eps"] = text.pop("rms_norm_eps")
        layers = ["sliding_attention", "full_attention"] * (text["num_hidden_layers"] // 2)
        return transformers.Cohere2Config(**text, sliding_window=24, layer_types=layers)

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.GotOcr2ImageProcessorPil(size=self.size, max_patches=4)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"patch_size": 14, "img_size": self.side, "downsample_factor": config.downsample_factor}


class Cohere2Vision(AyaVision):
    name, needs, processor = "cohere2_vision", "Cohere2VisionConfig", "Cohere2VisionProcessor"
    written = None
    turns = ("</s>", "<pad>")
    named: ClassVar = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    named |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        return {"alignment_intermediate_size": 128}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        images = transformers.GotOcr2ImageProcessorPil(size=self.size, crop_to_patches=True, max_patches=4)
        images.patch_size = 4  # its own, which needs torchvision, says here how many tokens a tile is high
        return images

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {}


class PaliGemma(Squares):
    """A prompt whose tokens all see one another."""

    name, needs, processor = "paligemma", "PaliGemmaConfig", "PaliGemmaProcessor"
    named: ClassVar = {"bos_token": "<bos>"}

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        return transformers.GemmaConfig(**text, head_dim=16)

    def settings(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        return {"projection_dim": 64}

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.SiglipImageProcessorPil(size=self.size, image_seq_length=36)


class PaliGemma2(PaliGemma):
    """The same for an LLM whose every other layer attends in a window."""

    name, model_type = "paligemma2", "paligemma"

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 20, "head_dim": 16}
        plain = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
        return transformers.Gemma2Config(**text, **layers, **plain)


class GotOcr2(Squares):
    # Its own processor takes no text alone and one image a prompt; here others put as many pixels and placeholders.
    name, needs, processor = "got_ocr2", "GotOcr2Config", "DeepseekVLProcessor"
    image, side = "<imgpad>", 256

    def text(self, text: dict[str, Any]) -> PreTrainedConfig:
        return transformers.Qwen2Config(**text)

    def vision(self, vision: dict[str, Any]) -> PreTrainedConfig:
        sam = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        sam |= {"output_channels": 8, "window_size": 4, "global_attn_indexes": [1], "image_size": self.side}
        return transformers.models.got_ocr2.GotOcr2VisionConfig(**sam)

    def image_processor(self, config: PreTrainedConfig) -> Any:
        return transformers.SiglipImageProcessorPil(size=self.size)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"num_image_tokens": 16}
