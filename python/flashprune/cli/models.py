"""The user's model and its processor, from a folder or the Hugging Face hub, and what the model is called with."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .console import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """A model that flashprune can prune, and its processor.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a hub id ``owner/name``.
        device: where the weights go.
        dtype: one of :data:`DTYPES`; "auto" is what the model was saved in.

    Returns:
        The model in eval mode; its processor, without the video part where torchvision is missing, which that needs.

    Raises:
        InputError: Transformers is missing, there is no such model, its family is not supported, weights or the
            processor cannot be loaded, or there is no such device.
    """
    try:
        from ..integrations.transformers import supported
    except ModuleNotFoundError as error:
        raise InputError(str(error)) from None
    import transformers

    _check_name(name)
    _check_device(device)
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client, JSON and Transformers each raise their own
        raise InputError(f"{name} is not a model that Transformers knows: {error}") from None
    if config.model_type not in supported():
        raise InputError(f"{name} is of type {config.model_type}; supported are {', '.join(supported())}")
    processor = _load_processor(name, config)
    try:
        with _quiet():
            auto: Any = transformers.AutoModelForImageTextToText
            model, report = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model = model.to(device).eval()
    except Exception as error:  # as above, and what a damaged file or a full GPU raises
        raise InputError(f"cannot load the weights of {name}: {error}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{name} lacks weights: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}")
    return model, processor


def prompt_inputs(processor: Any, images: Sequence[Image], text: str) -> Any:
    """What ``model(...)`` takes for one prompt about one or several images.

    Args:
        processor: of :func:`load`.
        images: RGB, in the prompt before the text.
        text: what the user says; the processor's chat template, if it has one, is put around it.

    Returns:
        A BatchFeature of CPU tensors, one row.
    """
    return batch_inputs(processor, [images], text)


def batch_inputs(processor: Any, images: Sequence[Sequence[Image]], text: str) -> Any:
    """:func:`prompt_inputs` for several prompts with the same text, padded to one length."""
    texts = [_prompt(processor, len(own), text) for own in images]
    shown = [list(own) for own in images]
    inputs = processor(images=shown, text=texts, padding=len(texts) > 1, return_tensors="pt")
    inputs.pop("labels", None)  # PaliGemma's come with every prompt
    return inputs


def _prompt(processor: Any, images: int, text: str) -> str:
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token}\n" * images + text
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is not a model's folder: it holds no config.json")
    elif path.exists():
        raise InputError(f"{name} is a file: MODEL must be a folder or a hub id (owner/name)")
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"there is no folder {name}, and it is not a hub id (owner/name)")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device must be a device of PyTorch such as cpu, cuda or cuda:1, got {device}") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} GPUs here")


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of missing weights, which :func:`load` tells itself, and no progress bar in a log."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load_processor(name: str, config: Any) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    kind: Any = AutoProcessor
    try:
        if not is_torchvision_available() and type(config) in PROCESSOR_MAPPING:
            kind = _without_video(PROCESSOR_MAPPING[type(config)])
        processor = kind.from_pretrained(name)
    except Exception as error:  # a missing file is an OSError, a damaged one anything
        raise InputError(f"cannot load the processor of {name}: {error}") from None
    if not hasattr(processor, "image_processor"):
        raise InputError(f"cannot load the processor of {name}: it holds a {type(processor).__name__} only")
    return processor


def _without_video(kind: Any) -> Any:
    """Transformers refuses to load a processor with a video part where torchvision is missing: one without it."""
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    if parts == kind.get_attributes():
        return kind
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: list(parts))})
