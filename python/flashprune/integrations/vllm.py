"""vLLM's plugin for video pruning; see docs/engines.md. vLLM calls `register` in each of its processes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import video

CHECKED = "0.33.0"
# One module a method of vLLM's, each with a function of either name.
_MODULES = {"evs": "vllm.multimodal.video_prune.evs", "vidcom2": "vllm.multimodal.video_prune.vidcom2"}
_ARGUMENTS = "vllm.engine.arg_utils"
_COUNT, _MASK = "compute_retained_tokens_count", "compute_retention_mask"
_replaced: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
_configured: list[Callable[..., Any]] = []  # vLLM's EngineArgs.create_model_config, while ours is in its place


def register() -> None:
    """Put flashprune's pair of functions in the place of vLLM's, where FLASHPRUNE_VIDEO_METHOD asks for it.

    Both of vLLM's methods are replaced, in their modules and in every module that imported them by name; models that
    are imported later find the new ones. A configuration with which no video is pruned gets a warning. Calling it again
    changes nothing.

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
    _watch(settings, logger)
    video.announce(settings, logger)


def unregister() -> None:
    """Put vLLM's own functions back, also into modules imported since."""
    while _replaced:
        theirs, ours = _replaced.pop()
        video.swap(ours, theirs)
    if _configured:
        import_module(_ARGUMENTS).EngineArgs.create_model_config = _configured.pop()


def _watch(settings: video.Settings, logger: Any) -> None:
    """Plugins are loaded before the model's configuration is made, and before logging is set up: tell more then."""
    announced = logger.isEnabledFor(logging.INFO)
    arguments = import_module(_ARGUMENTS).EngineArgs
    theirs = arguments.create_model_config

    @functools.wraps(theirs)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = theirs(self, *args, **kwargs)
        if why := _no_effect(config):
            video.warn_of_no_effect(settings, why, logger)
        elif not announced:
            video.announce(settings, logger)
        return config

    _configured.append(theirs)
    arguments.create_model_config = create_model_config


def _no_effect(config: Any) -> str:
    """Why vLLM prunes no video of a model with this configuration; empty where it does."""
    if config.multimodal_config is None or not config._model_info.supported_video_pruning_methods:
        return f"vLLM has no pruning for {config._model_info.architecture}"
    if config.multimodal_config.get_video_pruning_spec() is None:
        return "give vLLM --video-pruning-rate above 0 (video_pruning_rate of LLM)"
    return ""
