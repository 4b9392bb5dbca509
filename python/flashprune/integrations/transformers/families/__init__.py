"""One small class a family of models: where its visual tokens are, what grid they form, which modules to look into.

To add a family, derive from `Family`, and pass the class to `register_family`.
"""

from __future__ import annotations

import itertools
from typing import Any

from transformers import Pipeline, PreTrainedModel

from .base import Family
from .gemma import Gemma3, Gemma4
from .glm import Glm4v
from .internvl import InternVL
from .llava import Llava, LlavaNext, LlavaNextVideo, LlavaOnevision
from .pixtral import LightOnOcr, Mistral3
from .qwen import Qwen2VL, Qwen3VL, Qwen25VL, Qwen35
from .squares import AyaVision, DeepseekVL, GotOcr2, Idefics3, Ovis2, PaliGemma, VipLlava
from .video_llama import VideoLlama3

__all__ = ["Family", "family_of", "register_family", "supported", "unwrap"]

_families: list[type[Family]] = [
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    InternVL,
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    Qwen35,
    Glm4v,
    AyaVision,
    DeepseekVL,
    GotOcr2,
    Idefics3,
    LightOnOcr,
    Mistral3,
    Ovis2,
    PaliGemma,
    VideoLlama3,
    VipLlava,
    Gemma3,
    Gemma4,
]


def register_family(family: type[Family]) -> None:
    """Support the models whose `config.model_type` is among `family.model_types`; the latest registered is asked first.

    Raises TypeError if it is not a class derived from `Family`; ValueError if it names no model type.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"family must be a class derived from Family, got {family!r}")
    if not family.model_types:
        raise ValueError(f"{family.__name__}.model_types is empty: it must name the config.model_type it is for")
    _families.insert(0, family)


def supported() -> list[str]:
    """The model types that can be pruned."""
    return sorted(set(itertools.chain.from_iterable(family.model_types for family in _families)))


def unwrap(model: Any) -> Any:
    """The Transformers model in a pipeline, a PEFT model or what torch.compile returns; TypeError if there is none.

    All of these call it, hooks included.
    """
    inside = model
    while not _is_plain(inside):
        if hasattr(inside, "_orig_mod"):
            inside = inside._orig_mod
        elif hasattr(inside, "get_base_model"):
            inside = inside.get_base_model()
        elif isinstance(inside, Pipeline):
            inside = inside.model
        else:
            names = [name for name, one in _attributes(inside) if isinstance(one, PreTrainedModel)]
            instead = f": pass its attribute {' or '.join(names)}" if names else ""
            raise TypeError(f"model must be a Transformers model, got {type(inside).__name__}{instead}")
    return inside


def _is_plain(model: Any) -> bool:
    return isinstance(model, PreTrainedModel) and not hasattr(model, "_orig_mod")


def _attributes(owner: Any) -> list[tuple[str, Any]]:
    held = getattr(owner, "__dict__", {})
    return [*held.items(), *held.get("_modules", {}).items()]


def family_of(model: Any) -> Family:
    """The adapter of a model; TypeError or ValueError if there is none."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a Transformers model, got {type(model).__name__}")
    for family in _families:
        if model.config.model_type in family.model_types:
            return family()
    if getattr(getattr(model, "thinker", None), "config", None) is not None:
        raise ValueError(
            f"{type(model).__name__} sees and writes with its thinker: pass model.thinker, its part to prune"
        )
    raise ValueError(
        f"model type {model.config.model_type!r} is not supported; supported are {', '.join(supported())}. To add one, "
        "derive a class from flashprune.integrations.transformers.Family that says where its visual tokens are, and "
        "pass it to register_family"
    )
