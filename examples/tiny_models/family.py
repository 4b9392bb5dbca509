"""What differs between the families: one class each, tiny sizes and, for two, the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from .tokenizer import CHATML_CHAT


class TinyFamily:
    """How the model and the processor of one family are made."""

    name: ClassVar[str]
    model_type: ClassVar[str | None] = None  # of the configuration, where it is not the name
    needs: ClassVar[str]  # a name in `transformers`, absent from versions that do not have the family
    processor: ClassVar[str]
    video_processor: ClassVar[str | None] = None
    image: ClassVar[str] = "<image>"  # the placeholders
    video: ClassVar[str | None] = None
    written: ClassVar[str | None] = None  # what a chat template puts for an image, where it is not the placeholder
    auto: ClassVar[str] = "AutoModelForImageTextToText"
    template: ClassVar[str] = CHATML_CHAT
    turns: ClassVar[Sequence[str]] = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    named: ClassVar[Mapping[str, str]] = {}  # special tokens besides the placeholders, by the tokenizer's attribute
    image_name: ClassVar[str] = "image_token"  # the attribute of the placeholder
    around_image: ClassVar[tuple[str, str]] = ("", "")  # what a chat template puts there
    around_video: ClassVar[tuple[str, str]] = ("", "")

    def config(
        self, real: bool, text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> PreTrainedConfig:
        """The configuration; `text` and `vision` are what most tiny models have in common."""
        raise NotImplementedError

    def image_processor(self, config: PreTrainedConfig) -> Any:
        """Over PIL: the one that needs no torchvision."""
        raise NotImplementedError

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Of the processor, besides its parts and the chat template."""
        return {}

    def processor_parts(self) -> dict[str, Any]:
        """Of the processor, by name, besides that of images and the tokenizer."""
        return {}

    def video_settings(self, images: Any) -> dict[str, Any]:
        """What processor_config.json says of the video processor: the settings of the image processor `images`."""
        settings = {"video_processor_type": self.video_processor, "size": dict(images.size)}
        return settings | {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}

    def video_pixels(self, images: Any, frames: Sequence[Image.Image]) -> dict[str, Any]:
        """What the video processor would make of two frames a second, by the image processor `images`."""
        raise NotImplementedError

    def video_text(self, processor: Any, video: dict[str, Any]) -> str:
        """The placeholders of a video."""
        return processor.replace_video_token(video, 0)

    def video_batch(self, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """What else the model takes with a video."""
        return batch

    def image_id(self, tokenizer: PreTrainedTokenizerFast) -> int:
        return tokenizer.convert_tokens_to_ids(self.image)

    def video_id(self, tokenizer: PreTrainedTokenizerFast) -> int | None:
        return None if self.video is None else tokenizer.convert_tokens_to_ids(self.video)
