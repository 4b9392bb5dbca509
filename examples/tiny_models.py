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

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

# Family: its processor, and the video processor of that.
PROCESSORS = {
    "llava": ("LlavaProcessor", None),
    "llava_next": ("LlavaNextProcessor", None),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor"),
    "internvl": ("InternVLProcessor", "InternVLVideoProcessor"),
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
FAMILIES = tuple(PROCESSORS)
QWEN_VL = FAMILIES[4:]
REAL = ("llava", "qwen2_5_vl")
WIDTHS = ("tiny", "real")

if not is_torchvision_available():
    for _name, _video in PROCESSORS.values():
        if _video:
            getattr(transformers, _name).get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

# The tokenizer's merges are learnt from this; any other text is spelt out byte by byte where needed.
TEXT = """Describe the image. What is in the picture, and what is it next to? Read the text on the sign and say which
colour it has. How many people are there in the photograph, and where do they stand? Answer the question with a word.
Compare the first image with the second one: what has changed between them? What happens at the end of the video?"""

# What stands for an image and for a video, and two ways to write a conversation.
IMAGE = {family: "<image>" for family in FAMILIES[:3]} | {"internvl": "<IMG_CONTEXT>"}
IMAGE |= {family: "<|image_pad|>" for family in QWEN_VL}
VIDEO = {"llava_onevision": "<video>", "internvl": "<video>"} | {family: "<|video_pad|>" for family in QWEN_VL}
LLAVA_CHAT = """{% for message in messages %}{{ message.role.upper() }}: {% if message.content is string %}\
{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
CHATML_CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% elif part.type == 'text' %}{{ part.text }}\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


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
    tokenizer = make_tokenizer(family)
    config = make_config(family, width, tokenizer)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        randomize(model, list(tokenizer.added_tokens_decoder))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), make_processor(family, config, tokenizer)


def save(
    family: str, folder: str | Path, width: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model and its processor of :func:`build` as a folder that Transformers' Auto classes load."""
    model, processor = build(family, width, seed, dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in VIDEO and not is_torchvision_available():
        # The part that this process does without: where torchvision is there, the folder loads like any other.
        path = Path(folder) / "processor_config.json"
        settings = json.loads(path.read_text()) | {"video_processor": video_settings(family, processor.image_processor)}
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
    shown = [list(own) for own in images if own]
    return processor(images=shown or None, text=texts, padding=True, return_tensors="pt")


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
    fps = 2.0
    video: dict[str, Any] = {}
    if family == "internvl":  # every frame is one tile, and for the model an image like any other
        tiles = processor.image_processor(list(frames), crop_to_patches=False, return_tensors="pt")["pixel_values"]
        video["pixel_values_videos"] = tiles[None]
    elif family == "llava_onevision":  # every frame is one tile: the first of an image's, which shows all of it
        tiles = [processor.image_processor([frame], return_tensors="pt")["pixel_values"][0, 0] for frame in frames]
        video["pixel_values_videos"] = torch.stack(tiles)[None]
    else:
        times = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=list(range(len(frames))))
        patches, grid = patches_over_time(processor.image_processor, frames, family == "qwen3_vl")
        video = {"pixel_values_videos": patches, "video_grid_thw": grid, "video_metadata": [times]}
    writer = copy.copy(processor)
    writer.video_processor = processor.image_processor  # holds the sizes that replace_video_token asks for
    text = chat(processor, ["video"], prompt).replace(VIDEO[family], writer.replace_video_token(video, 0), 1)
    batch = dict(processor.tokenizer([text], return_tensors="pt")) | video
    batch.pop("video_metadata", None)
    if family == "internvl":
        batch["pixel_values"] = batch.pop("pixel_values_videos")[0]
    if family in QWEN_VL:
        batch["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(batch["input_ids"]))
    if family == "qwen2_5_vl":
        batch["second_per_grid_ts"] = torch.tensor([processor.image_processor.temporal_patch_size / fps])
    return transformers.BatchFeature(batch).to(model.device)


def patches_over_time(images: Any, frames: Sequence[Image.Image], shared: bool) -> tuple[Tensor, Tensor]:
    """Qwen's patches of a video ``[t * h * w, C * 2 * p * p]``, and ``[[t, h, w]]``.

    A patch spans two frames, and the image processor ``images`` fills both with the one image: here the second comes
    from the next frame. An odd last frame is repeated, as the video processor does. The limits on a frame's size are an
    image's, or ``shared``: the whole video has the pixels of one pair of such frames. (Qwen3-VL's own video processor
    lets an odd number of frames be a little larger.)
    """
    span, side = images.temporal_patch_size, images.patch_size
    frames = [*frames, *[frames[-1]] * (-len(frames) % span)]
    share = len(frames) // span if shared else 1
    size = {edge: images.size[edge] // share for edge in ("shortest_edge", "longest_edge")}
    batch = images(frames, size=size, return_tensors="pt")
    _, height, width = batch["image_grid_thw"][0].tolist()
    pixels = batch["pixel_values"].view(-1, span, height * width, 3, span, side, side)
    pixels = torch.stack([pixels[:, i, :, :, i] for i in range(span)], dim=3)
    return pixels.reshape(-1, 3 * span * side * side), torch.tensor([[len(frames) // span, height, width]])


def randomize(model: nn.Module, silent: Sequence[int]) -> None:
    """Weights that keep the activations' scale through a layer, so that attention is not flat and outputs differ.

    The tokens ``silent`` are as good as never generated: their rows in the output layer are zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.weight[0].numel()))
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("class_embedding", "cls_token", "position_embeddings", "image_newline"):
                nn.init.normal_(parameter)
    with torch.no_grad():
        model.get_output_embeddings().weight[list(silent)] = 0


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE over :data:`TEXT`: gives any text back as it was, and knows the family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    named = {"context_image_token" if family == "internvl" else "image_token": IMAGE[family]}
    if family in VIDEO:
        named["video_token"] = VIDEO[family]
    if family == "internvl":
        named |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    elif family in QWEN_VL:
        named |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    turns = ["</s>", "<pad>"] if family in ("llava", "llava_next") else ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
    eos, pad, *_ = special = [*turns, *named.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    options = {"eos_token": eos, "pad_token": pad, "extra_special_tokens": named, "padding_side": "left"}
    options |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make_config(family: str, width: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The configuration of a family, with the tokenizer's ids; real sizes are those of the published config.json."""
    real = width == "real"
    text: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": None, "rms_norm_eps": 1e-6}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "patch_size": 14}
    image_id = tokenizer.convert_tokens_to_ids(IMAGE[family])
    video_id = tokenizer.convert_tokens_to_ids(VIDEO[family]) if family in VIDEO else None

    if family == "llava":
        vision |= {"image_size": 112, "projection_dim": 32}
        if real:
            text |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32064}
            text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336}
            vision |= {"num_attention_heads": 16, "projection_dim": 768}
        towers = {"vision_config": transformers.CLIPVisionConfig(**vision)}
        towers |= {"text_config": transformers.LlamaConfig(**text)}
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        return transformers.LlavaConfig(**towers, image_token_index=image_id, image_seq_length=tokens)
    if family == "llava_next":
        towers = {"vision_config": transformers.CLIPVisionConfig(**vision, image_size=70, projection_dim=32)}
        towers |= {"text_config": transformers.MistralConfig(**text, sliding_window=None)}
        pinpoints = [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]
        return transformers.LlavaNextConfig(**towers, image_token_index=image_id, image_grid_pinpoints=pinpoints)
    if family == "llava_onevision":  # at most 2 tiles' worth of tokens: the larger grids are scaled down to that
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**vision, image_size=70, vision_use_head=False),
            text_config=transformers.Qwen2Config(**text),
            image_token_index=image_id,
            video_token_index=video_id,
            image_grid_pinpoints=[[70 * rows, 70 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
            vision_aspect_ratio="anyres_max_2",
        )
    if family == "internvl":
        return transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**vision, image_size=112),
            text_config=transformers.Qwen2Config(**text),
            **{"image_token_id": image_id, "image_seq_length": 16, "tie_word_embeddings": False},
        )

    special = {"image_token_id": image_id, "video_token_id": video_id, "tie_word_embeddings": False}
    special |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("vision_start", "vision_end")}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    tower: dict[str, Any] = {"depth": 4, "num_heads": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=tower, **special)
    if family == "qwen3_vl":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 5e6}
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 256}
        tower |= {"deepstack_visual_indexes": [0, 1, 2]}
        text |= {"rope_parameters": rope, "head_dim": 16}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **special)
    # Windows of 4 x 4 tokens, as published: every image of more tokens is split.
    tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 112}
    tower |= {"fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
    if real:
        rope |= {"mrope_section": [16, 24, 24]}
        text |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
        text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000}
        tower |= {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 32}
        tower |= {"num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}
    return transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=tower, **special)


def make_processor(family: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The family's own processor, over the image processor that needs no torchvision."""
    template = CHATML_CHAT if family in FAMILIES[2:] else LLAVA_CHAT
    start, end = ("<|vision_start|>", "<|vision_end|>") if family in QWEN_VL else ("", "")
    template = template.replace("IMAGE", start + IMAGE[family] + end)
    if family in VIDEO:  # Qwen3-VL's processor puts the marks around every frame of a video by itself
        start, end = ("", "") if family == "qwen3_vl" else (start, end)
        template = template.replace("VIDEO", start + VIDEO[family] + end)
    vision, options = config.vision_config, {"chat_template": template}

    if family in QWEN_VL:
        side = 2 * vision.patch_size  # of the square that one token stands for
        shortest, longest = (16, 100) if config.text_config.hidden_size == 64 else (4, 16384)
        size = {"shortest_edge": shortest * side**2, "longest_edge": longest * side**2}
        images = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=vision.patch_size)
        if family == "qwen3_vl":
            images.image_mean = images.image_std = [0.5] * 3
    elif family == "internvl":
        height, width = vision.image_size
        images = transformers.GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, crop_to_patches=True, max_patches=6
        )
        options["image_seq_length"] = config.image_seq_length
    elif family == "llava_onevision":
        size = {"height": vision.image_size, "width": vision.image_size}
        images = transformers.LlavaOnevisionImageProcessorPil(
            size=size, image_grid_pinpoints=config.image_grid_pinpoints
        )
        options |= {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2}
        options |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        crop = {"height": vision.image_size, "width": vision.image_size}
        sizes = {"size": {"shortest_edge": vision.image_size}, "crop_size": crop}
        if family == "llava":
            images = transformers.LlavaImageProcessorPil(**sizes)
        else:
            images = transformers.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
        options |= {"patch_size": vision.patch_size, "num_additional_image_tokens": 1}
        options |= {"vision_feature_select_strategy": "default"}
    processor, video = PROCESSORS[family]
    if video and is_torchvision_available():
        settings = video_settings(family, images)
        options["video_processor"] = getattr(transformers, settings.pop("video_processor_type"))(**settings)
    return getattr(transformers, processor)(images, tokenizer, **options)


def video_settings(family: str, images: Any) -> dict[str, Any]:
    """What processor_config.json says of the video processor: the settings of the image processor ``images``."""
    settings = {"video_processor_type": PROCESSORS[family][1], "size": dict(images.size)}
    settings |= {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    if family in QWEN_VL:
        settings |= {key: getattr(images, key) for key in ("patch_size", "merge_size", "temporal_patch_size")}
    if family == "qwen3_vl":  # limits the pixels of all frames together
        settings["size"] = {edge: images.temporal_patch_size * pixels for edge, pixels in dict(images.size).items()}
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a vision-language model with random weights as a folder.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    save(arguments.family, arguments.folder, arguments.width, dtype=getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
