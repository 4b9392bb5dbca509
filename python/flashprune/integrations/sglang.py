"""SGLang's plugin for video pruning; see docs/engines.md. SGLang calls `register` in each of its processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from . import video

CHECKED = "0.5.23"
_MODULE = "sglang.srt.multimodal.evs.evs_core"
_CONFIG = "sglang.srt.configs.model_config.ModelConfig.__init__"
_registered: dict[str, Callable[..., Any]] = {}
_unchecked: list[video.Settings] = []  # until a model's configuration is seen
_logger = logging.getLogger(__name__)


class Pruning(video.Pruning):
    """SGLang passes a video of one frame on whole, whatever the method, and counts on all of its tokens."""

    def retained_tokens(self, tokens_per_frame: int, num_frames: int, q: float) -> int:
        kept = super().retained_tokens(tokens_per_frame, num_frames, q)
        return tokens_per_frame if num_frames == 1 else kept


def register() -> None:
    """Register flashprune's pair of functions in SGLang's HookRegistry, where FLASHPRUNE_VIDEO_METHOD asks for it.

    SGLang applies the hooks when it has called all plugins, also to modules that imported the functions by name.
    A model of which no video is pruned gets a warning. Calling it again changes nothing.

    Raises SystemExit with one line for wrong settings, or an SGLang that this was not checked with.
    """
    settings = video.start("sglang", CHECKED)
    if settings is None or _registered:
        return
    pruning = Pruning(settings, note=_logger.info)
    try:
        module, hooks = import_module(_MODULE), import_module("sglang.srt.plugins.hook_registry")
    except ImportError as error:
        raise SystemExit(f"flashprune: cannot import {_MODULE}: {error}") from None
    functions: dict[str, Callable[..., int | Tensor]] = {
        "compute_retained_tokens_count": pruning.retained_tokens,
        "compute_retention_mask": pruning.retention_mask,
    }
    for name, ours in functions.items():
        video.check_parameters(getattr(module, name), ours)
    for name, ours in functions.items():
        hooks.HookRegistry.register(f"{_MODULE}.{name}", ours, hooks.HookType.REPLACE)
        _registered[name] = getattr(module, name)
    _unchecked.append(settings)
    if all(hook is not _look for _, hook, _ in hooks.HookRegistry._hooks[_CONFIG]):
        hooks.HookRegistry.register(_CONFIG, _look, hooks.HookType.AFTER)
    video.announce(settings, _logger)


def unregister() -> None:
    """Put SGLang's own functions back and forget the hooks, so that they can be registered anew."""
    module, hooks = import_module(_MODULE), import_module("sglang.srt.plugins.hook_registry")
    while _registered:
        name, theirs = _registered.popitem()
        if getattr(module, name) is not theirs:
            video.swap(getattr(module, name), theirs)
        hooks.HookRegistry._hooks.pop(f"{_MODULE}.{name}", None)
        hooks.HookRegistry._patched.discard(f"{_MODULE}.{name}")
    _unchecked.clear()


def _look(result: None, config: Any, *args: Any, **kwargs: Any) -> None:
    """Hook on the configuration of a model, which is made after plugins are loaded: is there anything to prune?"""
    if _unchecked and not config.is_draft_model:
        settings, rate = _unchecked.pop(), getattr(config.hf_config, "video_pruning_rate", None)
        model = (config.hf_config.architectures or ["this model"])[0]
        if rate is None:
            video.warn_of_no_effect(settings, f"SGLang has no pruning for {model}", _logger)
        elif rate == 0:
            why = "give SGLang video_pruning_rate above 0 in the model's config.json or --json-model-override-args"
            video.warn_of_no_effect(settings, why, _logger)
