"""Vision-language models without the hub: every family's real classes, tiny or real widths, random weights.

    python examples/tiny_models.py qwen2_5_vl FOLDER
    AutoModelForImageTextToText.from_pretrained(FOLDER)

:func:`build` makes a model and its processor, :func:`save` a folder that Transformers' Auto classes load, as they do a
model of the hub; :func:`inputs` and :func:`video_inputs` make what ``model(...)`` and ``model.generate(...)`` take. The
weights are random, so the models say nothing about accuracy; the shapes, the order of tokens and the code that runs
are those of the published models.

Transformers 5 refuses to make or load a processor that has a video part where torchvision is missing: all families but
LLaVA and LLaVA-NeXT. Importing this module lets their processors do without that part there, for this process only.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available

from . import gemma, glm, internvl, llava, omni, pixtral, qwen, squares, tokenizer, video_llama
from .family import TinyFamily
from .qwen import patches_over_time

__all__ = [
    "ALL",
    "FAMILIES",
    "IMAGE",
    "QWEN_VL",
    "REAL",
    "VIDEO",
    "WIDTHS",
    "build",
    "chat",
    "inputs",
    "make_config",
    "make_processor",
    "make_tokenizer",
    "patches_over_time",
    "save",
    "video_inputs",
]

_FAMILIES: list[TinyFamily] = [
    llava.Llava(),
    llava.LlavaNext(),
    llava.LlavaOnevision(),
    internvl.InternVL(),
    qwen.Qwen2VL(),
    qwen.Qwen25VL(),
    qwen.Qwen3VL(),
    qwen.Qwen3VLMoe(),
    qwen.Qwen35(),
    qwen.Qwen35Moe(),
    omni.Qwen25Omni(),
    omni.Qwen3Omni(),
    glm.Glm4v(),
    glm.Glm4vMoe(),
    glm.Glm46V(),
    gemma.Gemma3(),
    gemma.Gemma4(),
    llava.LlavaNextVideo(),
    pixtral.Mistral3(),
    pixtral.LightOnOcr(),
    squares.Idefics3(),
    squares.SmolVLM(),
    squares.AyaVision(),
    squares.Cohere2Vision(),
    squares.DeepseekVL(),
    squares.DeepseekVLHybrid(),
    squares.Janus(),
    squares.Ovis2(),
    squares.VipLlava(),
    squares.GotOcr2(),
    squares.PaliGemma(),
    squares.PaliGemma2(),
    internvl.QianfanOcr(),
    video_llama.VideoLlama3(),
]
ALL = tuple(dict.fromkeys(family.model_type or family.name for family in _FAMILIES))  # every config.model_type


def _has(name: str) -> bool:
    """Whether the installed Transformers has a class, and what that needs: torchvision, some in some versions."""
    try:
        return hasattr(transformers, name)
    except ModuleNotFoundError:
        return False


TABLE = {family.name: family for family in _FAMILIES if _has(family.needs) and _has(family.processor)}
FAMILIES = tuple(TABLE)
QWEN_VL = tuple(name for name, family in TABLE.items() if isinstance(family, qwen.Qwen2VL))
IMAGE = {name: family.image for name, family in TABLE.items()}  # the placeholders
VIDEO = {name: family.video for name, family in TABLE.items() if family.video is not None}
REAL = ("llava", "qwen2_5_vl")
WIDTHS = ("tiny", "real")


def _without_video() -> None:
    """Let the processors' classes do without their video part, in this process."""
    make = ProcessorMixin.__init__

    def without(self: ProcessorMixin, *parts: Any, **named: Any) -> None:
        named = {name: part for name, part in named.items() if name != "video_processor"}
        make(self, *(part for part in parts if part is not None), **named)

    load = ProcessorMixin.from_args_and_dict.__func__

    def loaded(cls: type[ProcessorMixin], args: Sequence[Any], settings: dict[str, Any], **named: Any) -> Any:
        return load(cls, args, {name: one for name, one in settings.items() if name != "video_processor"}, **named)

    ProcessorMixin.__init__ = without
    ProcessorMixin.from_args_and_dict = classmethod(loaded)
    for family in TABLE.values():
        kind = getattr(transformers, family.processor)
        parts = [part for part in kind.get_attributes() if part != "video_processor"]
        if parts == kind.get_attributes():
            continue
        kind.get_attributes = classmethod(lambda cls, parts=parts: parts)
        arguments = inspect.signature(kind.__init__).parameters
        if arguments["video_processor"].default is inspect.Parameter.empty:  # Gemma 4's comes last of what has none
            kind.__init__.__defaults__ = (None, *(kind.__init__.__defaults__ or ()))


if not is_torchvision_available():
    _without_video()


def build(
    family: str, width: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model with random weights, ready to run, and its processor.

    Args:
        family: one of :data:`FAMILIES`.
        width: "tiny" (4 layers, hidden size 64) or "real", the sizes of LLaVA-1.5-7B and Qwen2.5-VL-7B.
        seed: of the weights; the global random state is left as it is.
        dtype: of the weights.
        device: where the weights are made, at once in ``dtype``; "meta" makes shapes only.

    Returns:
        The model in eval mode, and a processor for it.

    Raises:
        ValueError: an unknown family or width, or a family without a real width.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if width not in WIDTHS:
        raise ValueError(f"width must be tiny or real, got {width!r}")
    if width == "real" and family not in REAL:
        raise ValueError(f"width='real' is there for {' and '.join(REAL)}, got {family!r}")
    words = make_tokenizer(family)
    config = make_config(family, width, words)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = getattr(transformers, TABLE[family].auto).from_config(config, dtype=dtype)
        randomize(model, list(words.added_tokens_decoder))
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model.eval(), make_processor(family, config, words)


def save(
    family: str, folder: str | Path, width: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model and its processor of :func:`build` as a folder that Transformers' Auto classes load."""
    model, processor = build(family, width, seed, dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if TABLE[family].video_processor and not is_torchvision_available():
        # The part that this process does without: where torchvision is there, the folder loads like any other.
        path = Path(folder) / "processor_config.json"
        video = TABLE[family].video_settings(processor.image_processor)
        settings = json.loads(path.read_text()) | {"video_processor": video}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def inputs(
    processor: ProcessorMixin, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
) -> transformers.BatchFeature:
    """One batch, padded on the left, of prompts that each follow any number of images.

    Args:
        processor: of :func:`build`, or one that AutoProcessor loaded.
        images: for each prompt its images; an empty list for text alone.
        prompts: what the user says, without placeholders.

    Returns:
        Everything that the model's forward takes.

    Example:
        >>> _, processor = build("llava")
        >>> batch = inputs(processor, [[Image.new("RGB", (40, 30))], []], ["What is this?", "Hello"])
        >>> int((batch["input_ids"] == processor.image_token_id).sum())
        64
    """
    if len(images) != len(prompts):
        raise ValueError(f"images must hold one list for each prompt, got {len(images)} for {len(prompts)}")
    texts = [chat(processor, ["image"] * len(own), prompt) for own, prompt in zip(images, prompts, strict=True)]
    shown = [list(own) for own in images] if any(images) else None
    return processor(images=shown, text=texts, padding=True, return_tensors="pt")


def chat(processor: ProcessorMixin, media: Sequence[str], prompt: str) -> str:
    """The text up to the model's turn: a placeholder for each of ``media`` ("image" or "video"), then the prompt."""
    content = [{"type": kind} for kind in media] + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def video_inputs(
    family: str, model: PreTrainedModel, processor: ProcessorMixin, frames: Sequence[Image.Image], prompt: str
) -> transformers.BatchFeature:
    """One prompt about one video of two frames a second, for every family but LLaVA and LLaVA-NeXT.

    The video processors of Transformers need torchvision, so the frames go through the image processor, and its output
    is put in the order of a video's. The placeholders are the processor's own, Qwen3-VL's time stamps among them.

    Args:
        family: one of :data:`FAMILIES` with video.
        model: of that family; the inputs go to its device.
        processor: of that family.
        frames: of one size, at least one.
        prompt: what the user says, without placeholders.

    Raises:
        ValueError: a family without video, or no frames.
    """
    if family not in VIDEO:
        raise ValueError(f"family must be one with video, {', '.join(VIDEO)}, got {family!r}")
    if not frames:
        raise ValueError("frames must hold at least one image, got none")
    kind = TABLE[family]
    video = kind.video_pixels(processor.image_processor, frames)
    writer = copy.copy(processor)
    writer.video_processor = processor.image_processor  # holds the sizes that replace_video_token asks for
    text = chat(processor, ["video"], prompt).replace(VIDEO[family], kind.video_text(writer, video), 1)
    batch = dict(processor.tokenizer([text], return_tensors="pt")) | video
    batch.pop("video_metadata", None)
    return transformers.BatchFeature(kind.video_batch(processor, batch)).to(model.device)


def randomize(model: nn.Module, silent: Sequence[int]) -> None:
    """Weights that keep the activations' scale through a layer, so that attention is not flat and outputs differ.

    The tokens ``silent`` are as good as never generated: their rows in the output layer are zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / float(getattr(module, "embed_scale", 1)))
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.weight[0].numel()))
        for name, parameter in module.named_parameters(recurse=False):
            if name in (
                "class_embedding",
                "cls_token",
                "position_embeddings",
                "position_embedding_table",
                "image_newline",
            ):
                nn.init.normal_(parameter)
            elif name == "mm_input_projection_weight":  # [in, out]
                nn.init.normal_(parameter, std=1.5 / math.sqrt(len(parameter)))
            elif name in ("gate_up_proj", "down_proj"):  # of all experts, [experts, out, in]
                nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]))
    with torch.no_grad():
        model.get_output_embeddings().weight[list(silent)] = 0


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its special tokens."""
    kind = TABLE[family]
    named = {kind.image_name: kind.image} | ({"video_token": kind.video} if kind.video else {}) | dict(kind.named)
    return tokenizer.make(kind.turns, named)


def make_config(family: str, width: str, words: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The configuration of a family, with the tokenizer's ids; real sizes are those of the published config.json."""
    text = {"tie_word_embeddings": False, "bos_token_id": None, "rms_norm_eps": 1e-6}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 4096}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "patch_size": 14}
    return TABLE[family].config(width == "real", text, vision, words)


def make_processor(family: str, config: PreTrainedConfig, words: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The family's own processor, over the image processor that needs no torchvision."""
    kind = TABLE[family]
    template = kind.template.replace("IMAGE", (kind.written or kind.image).join(kind.around_image))
    if kind.video:
        template = template.replace("VIDEO", kind.video.join(kind.around_video))
    images, options = kind.image_processor(config), {"chat_template": template} | kind.options(config)
    if kind.video_processor and is_torchvision_available():
        settings = kind.video_settings(images)
        options["video_processor"] = getattr(transformers, settings.pop("video_processor_type"))(**settings)
    parts = {"image_processor": images, "tokenizer": words} | kind.processor_parts()
    return getattr(transformers, kind.processor)(**parts, **options)
