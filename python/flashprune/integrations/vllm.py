"""vLLM's plugin for video pruning; see docs/engines.md. vLLM calls `register` in each of its processes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import video

CHECKED = "0.33.0"
# One module a method of vLLM's, each with a function of either name.
_MODULES = {"evs": "vllm.multimodal.video_prune.evs", "vidcom2": "vllm.multimodal.video_prune.vidcom2"}
_COUNT, _MASK = "compute_retained_tokens_count", "compute_retention_mask"
_replaced: list[tuple[Callable[..., Any], Callable[..., Any]]] = []


def register() -> None:
    """Put flashprune's pair of functions in the place of vLLM's, where FLASHPRUNE_VIDEO_METHOD asks for it.

    Both of vLLM's methods are replaced, in their modules and in every module that imported them by name; models that
    are imported later find the new ones. Calling it again changes nothing.

    Raises SystemExit with one line for wrong settings, or a vLLM that this was not checked with.
    """
    settings = video.start("vllm", CHECKED)
    if settings is None or _replaced:
        return
    logger = import_module("vllm.logger").init_logger("vllm.flashprune")
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
    for rule, path in _MODULES.items():
        module, pruning = import_module(path), video.Pruning(settings, rule, logger.info)
        pairs += [(getattr(module, _COUNT), pruning.retained_tokens), (getattr(module, _MASK), pruning.retention_mask)]
    for theirs, ours in pairs:
        video.check_parameters(theirs, ours)
    for theirs, ours in pairs:
        video.swap(theirs, ours)
    _replaced.extend(pairs)
    video.announce(settings, logger)


def unregister() -> None:
    """Put vLLM's own functions back, also into modules imported since."""
    while _replaced:
        theirs, ours = _replaced.pop()
        video.swap(ours, theirs)
