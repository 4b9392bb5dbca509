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
_registered: dict[str, Callable[..., Any]] = {}


class Pruning(video.Pruning):
    """SGLang passes a video of one frame on whole, whatever the method, and counts on all of its tokens."""

    def retained_tokens(self, tokens_per_frame: int, num_frames: int, q: float) -> int:
        kept = super().retained_tokens(tokens_per_frame, num_frames, q)
        return tokens_per_frame if num_frames == 1 else kept


def register() -> None:
    """Register flashprune's pair of functions in SGLang's HookRegistry, where FLASHPRUNE_VIDEO_METHOD asks for it.

    SGLang applies the hooks when it has called all plugins, also to modules that imported the functions by name.
    Calling it again changes nothing.

    Raises SystemExit with one line for wrong settings, or an SGLang that this was not checked with: of other exceptions
    SGLang logs a traceback and starts without the plugin.
    """
    settings = video.start("sglang", CHECKED)
    if settings is None or _registered:
        return
    logger = logging.getLogger(__name__)
    pruning = Pruning(settings, note=logger.info)
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
    video.announce(settings, logger)


def unregister() -> None:
    """Put SGLang's own functions back and forget the hooks, so that they can be registered anew."""
    module, hooks = import_module(_MODULE), import_module("sglang.srt.plugins.hook_registry")
    while _registered:
        name, theirs = _registered.popitem()
        if getattr(module, name) is not theirs:
            video.swap(getattr(module, name), theirs)
        hooks.HookRegistry._hooks.pop(f"{_MODULE}.{name}", None)
        hooks.HookRegistry._patched.discard(f"{_MODULE}.{name}")
