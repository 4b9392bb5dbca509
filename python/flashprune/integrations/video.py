"""Video pruning in serving engines: settings from the environment, and the pair of functions that engines call.

An engine asks twice: on the host, before a frame is encoded, how many tokens it will get; after encoding, which ones.
The settings are in docs/engines.md. All methods here choose by the video alone: engines keep encoded media, and the
keys and values after them, under a hash of the media, so what one prompt had chosen would be served to others.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..budgets import budget, indices_to_mask
from ..dispatch import BACKENDS
from ..importance import minmax
from ..reference.video import dissimilarity
from ..selectors import maxmin_select, mis_select, mmr_select, topk_select
from ..video import evs_select, vidcom2_select
from . import versions

METHODS = ("evs", "vidcom2", "mmr", "mis", "maxmin", "topk")
IMPORTANCE = ("redundancy", "norm")
PREFIX = "FLASHPRUNE_VIDEO_"
# Which settings a method takes beyond the rate.
_OPTIONS = {"mmr": ("IMPORTANCE", "LAMBDA"), "mis": ("IMPORTANCE", "THRESHOLD"), "topk": ("IMPORTANCE",)}
_NAMES = ("METHOD", "RATE", "IMPORTANCE", "LAMBDA", "THRESHOLD")
_BY_PROMPT = ("d2pruner", "fastv", "cdpruner")
_SELECTOR_OF = {"idpruner": "mmr", "divprune": "maxmin"}
_CHUNK = 2**24  # values
_counters = {"videos": 0, "tokens": 0, "kept": 0}


@dataclass(frozen=True)
class Settings:
    """How videos are pruned, the same in every process of an engine.

    Args:
        method: one of `METHODS`.
        importance: of ``mmr``, ``mis`` and ``topk``: ``redundancy``, half of 1 - cosine to the same place of the frame
            before and 1 in the first frame; or ``norm``, the L2 norm of a token scaled to 0..1 within the video.
        lam: of ``mmr``, see `flashprune.mmr_select`.
        threshold: of ``mis``, see `flashprune.mis_select`.
        rate: the share of tokens pruned, in [0, 1), instead of the engine's.
        backend: see `flashprune.selectors`.

    Raises:
        ValueError: a value does not fit.

    Examples:
        >>> Settings.read({"FLASHPRUNE_VIDEO_METHOD": "mmr", "FLASHPRUNE_VIDEO_LAMBDA": "0.3"}).lam
        0.3
    """

    method: str
    importance: str = "redundancy"
    lam: float = 0.5
    threshold: float = 0.8
    rate: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        checks.choice("method", self.method, METHODS)
        checks.choice("importance", self.importance, IMPORTANCE)
        checks.number("lam", self.lam, 0, 1)
        checks.number("threshold", self.threshold)
        checks.choice("backend", self.backend, BACKENDS)
        if self.rate is not None:
            _rate("rate", self.rate)

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings | None:
        """What the environment says; None if it asks for no method.

        Raises ValueError, naming the variable, for one that is malformed, unknown, or without effect on the method.
        """
        environment = os.environ if environment is None else environment
        given = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
        unknown = sorted(given.keys() - {PREFIX + name for name in _NAMES})
        if unknown:
            raise ValueError(f"{unknown[0]} is no setting; there are {', '.join(PREFIX + name for name in _NAMES)}")
        method = given.pop(PREFIX + "METHOD", None)
        if method is None:
            if given:
                raise ValueError(f"{min(given)} is set, but {PREFIX}METHOD is not, so that no video would be pruned")
            return None
        _check_method(method)
        superfluous = sorted(given.keys() - {PREFIX + name for name in ("RATE", *_OPTIONS.get(method, ()))})
        if superfluous:
            raise ValueError(f"{superfluous[0]} has no effect on {PREFIX}METHOD={method}")
        importance = given.get(PREFIX + "IMPORTANCE", cls.importance)
        backend = environment.get("FLASHPRUNE_BACKEND") or cls.backend
        checks.choice(PREFIX + "IMPORTANCE", importance, IMPORTANCE)
        checks.choice("FLASHPRUNE_BACKEND", backend, BACKENDS)
        lam = checks.number(PREFIX + "LAMBDA", _number(given, "LAMBDA", cls.lam), 0, 1)
        threshold = checks.number(PREFIX + "THRESHOLD", _number(given, "THRESHOLD", cls.threshold))
        rate = _number(given, "RATE", None)
        if rate is not None:
            _rate(PREFIX + "RATE", rate)
        return cls(method, importance, lam, threshold, rate, backend)


class Pruning:
    """The two functions that an engine's models call, with the parameters' names that engines give them.

    Args:
        settings: how to prune.
        rule: ``evs`` or ``vidcom2``, see `flashprune.budget`: how ``mmr``, ``mis``, ``maxmin`` and ``topk`` count, as
            the pair does whose place this one takes. ``evs`` and ``vidcom2`` count by their own rule.
        note: takes a line about the first video that is pruned.

    Examples:
        >>> pruning = Pruning(Settings("evs"))
        >>> pruning.retained_tokens(tokens_per_frame=64, num_frames=8, q=0.75)
        128
        >>> int(pruning.retention_mask(torch.randn(512, 32), (8, 16, 16), spatial_merge_size=2, q=0.75).sum())
        128
    """

    def __init__(self, settings: Settings, rule: str = "evs", note: Callable[[str], object] | None = None) -> None:
        checks.choice("rule", rule, ("evs", "vidcom2"))
        self.settings = settings
        self.rule = settings.method if settings.method in ("evs", "vidcom2") else rule
        self._note = note

    def retained_tokens(self, tokens_per_frame: int, num_frames: int, q: float) -> int:
        """How many tokens of a video are kept: arithmetic on the host, the same whatever the video shows.

        Raises TypeError or ValueError for a number of tokens or frames that is no int or negative, or q outside [0, 1).
        """
        q = self._share(q)
        tokens = checks.integer("tokens_per_frame", tokens_per_frame, 0) * checks.integer("num_frames", num_frames, 0)
        return budget(tokens, 1.0 - q, rule=self.rule, tokens_per_frame=tokens_per_frame) if tokens else 0

    def retention_mask(
        self,
        video_embeds: Tensor,
        video_size_thw: Sequence[int] | Tensor,
        spatial_merge_size: int,
        q: float,
    ) -> Tensor:
        """Which tokens of a video are kept, as many as `retained_tokens` said.

        Args:
            video_embeds: ``[N, D]`` with ``N = T * (H // merge) * (W // merge)``, frame after frame, the encoder's
                output; float32, float16 or bfloat16.
            video_size_thw: ``(T, H, W)``, frames and patches of a frame; reading a tensor on a GPU waits for it, and
                nothing else here does.
            spatial_merge_size: patches merged into a token, along each side.
            q: the share that is pruned, in [0, 1); the setting ``rate`` takes precedence.

        Returns:
            bool ``[N]``, on the device of ``video_embeds``.

        Raises:
            TypeError, ValueError: an argument does not fit.
            RuntimeError: the backend asked for cannot run here.
        """
        frames, height, width = (int(side) for side in video_size_thw)
        merge = checks.integer("spatial_merge_size", spatial_merge_size, 1)
        grid = (frames, height // merge, width // merge)
        tokens = grid[0] * grid[1] * grid[2]
        checks.features(video_embeds, "video_embeds")
        if video_embeds.shape[:-1] != (tokens,):
            expected = f"[{tokens}, D] for video_size_thw={(frames, height, width)} and spatial_merge_size={merge}"
            raise ValueError(f"video_embeds must be {expected}, got {checks.shape(video_embeds)}")
        kept = self.retained_tokens(grid[1] * grid[2], frames, q)
        _counters["videos"] += 1
        _counters["tokens"] += tokens
        _counters["kept"] += kept
        if self._note is not None and _counters["videos"] == 1:
            self._note(f"flashprune: first video pruned, {tokens} tokens to {kept}, on {video_embeds.device}")
        if kept == tokens:
            return torch.ones(tokens, dtype=torch.bool, device=video_embeds.device)
        return indices_to_mask(self._select(video_embeds, grid, self._share(q), kept), tokens)

    def _select(self, features: Tensor, grid: tuple[int, int, int], q: float, k: int) -> Tensor:
        method, backend = self.settings.method, self.settings.backend
        if method == "evs":
            return evs_select(features, grid, 1, q=q, sort=False, backend=backend)
        if method == "vidcom2":
            return vidcom2_select(features, grid, 1, q=q, sort=False, backend=backend)
        if method == "maxmin":
            return maxmin_select(features, k, sort=False, backend=backend)
        scores = self._importance(features, grid[0])
        if method == "mmr":
            return mmr_select(features, scores, k, lam=self.settings.lam, sort=False, backend=backend)
        if method == "mis":
            return mis_select(features, scores, k, threshold=self.settings.threshold, sort=False, backend=backend)
        return topk_select(scores, k, sort=False, backend=backend)

    def _importance(self, features: Tensor, frames: int) -> Tensor:
        """float32 ``[N]``, in 0..1."""
        if self.settings.importance == "norm":
            return minmax(torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32))
        return redundancy(features, frames)

    def _share(self, q: float) -> float:
        return _rate("q", q) if self.settings.rate is None else self.settings.rate


def redundancy(features: Tensor, frames: int) -> Tensor:
    """float32 ``[N]`` in 0..1: half of 1 - cosine to the same place of the frame before, 1 in the first frame.

    A few frames at a time: the float32 copies of a whole video would take several times its memory.
    """
    places = len(features) // frames
    step = max(1, _CHUNK // max(1, places * features.shape[1]))
    scores = []
    for start in range(0, frames, step):
        before = min(start, 1)  # a frame to compare with, which has its scores already
        part = features[(start - before) * places : (start + step) * places].float()
        scores.append(dissimilarity(part, before + min(step, frames - start))[before * places :])
    return torch.cat(scores).clamp(max=2.0) / 2


def counters() -> dict[str, int]:
    """What was pruned in this process: ``videos``, their ``tokens``, and how many were ``kept``.

    >>> sorted(counters())
    ['kept', 'tokens', 'videos']
    """
    return dict(_counters)


def start(engine: str, checked: str) -> Settings | None:
    """The settings of a plugin that an engine loads; None if none is asked for.

    Settings that are wrong, or a version of the engine other than ``checked``, end the process with one line: at start,
    and even where an engine only logs the exceptions of its plugins.
    """
    try:
        settings = Settings.read()
    except ValueError as error:
        raise SystemExit(f"flashprune: {error}") from None
    if settings is None:
        return None
    try:
        found = versions.found(engine)
    except PackageNotFoundError:
        found = "none"
    if re.split(r"\.?post|\+", found)[0] != checked and os.environ.get("FLASHPRUNE_UNCHECKED_ENGINE") != "1":
        raise SystemExit(
            f"flashprune: checked with {engine} {checked}, found {found}: set FLASHPRUNE_UNCHECKED_ENGINE=1 to try it, "
            f"or unset {PREFIX}METHOD"
        )
    return settings


def announce(settings: Settings, logger: logging.Logger) -> None:
    rate = "the engine's rate" if settings.rate is None else f"rate {settings.rate:g} in place of the engine's"
    scores = f" by {settings.importance}" if "IMPORTANCE" in _OPTIONS.get(settings.method, ()) else ""
    logger.info("flashprune prunes videos: %s%s, %s, backend %s", settings.method, scores, rate, settings.backend)


def warn_of_no_effect(settings: Settings, why: str, logger: logging.Logger) -> None:
    """The engine's own settings or its model leave nothing to prune: its users must not believe otherwise."""
    logger.warning("flashprune: %sMETHOD=%s is set, but no video will be pruned: %s", PREFIX, settings.method, why)


def check_parameters(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """SystemExit unless an engine's function takes what ours takes."""
    found, expected = (list(inspect.signature(function).parameters) for function in (theirs, ours))
    if found != expected:
        name = f"{theirs.__module__}.{theirs.__name__}"
        raise SystemExit(f"flashprune: {name} takes {', '.join(found)}; expected {', '.join(expected)}")


def swap(old: object, new: object) -> int:
    """Put ``new`` wherever a module that is loaded holds ``old``; returns in how many places."""
    places = 0
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
                places += 1
    return places


def _check_method(method: str) -> None:
    if method in METHODS:
        return
    name = f"{PREFIX}METHOD={method}"
    if method in _BY_PROMPT:
        raise ValueError(
            f"{name} chooses by the prompt, but engines cache encoded media by the media alone: what one prompt's "
            f"question chose would be served to others; choose one of {', '.join(METHODS)}"
        )
    if method in _SELECTOR_OF:
        scores = " by importance from weights or a prompt, which an engine has not" if method == "idpruner" else ""
        raise ValueError(f"{name} is a method for images{scores}; its selector is here as {_SELECTOR_OF[method]}")
    raise ValueError(f"{PREFIX}METHOD must be one of {', '.join(METHODS)}, got {method!r}")


def _number(given: Mapping[str, str], name: str, default: float | None) -> Any:
    text = given.get(PREFIX + name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{PREFIX}{name} must be a number, got {text!r}") from None


def _rate(name: str, value: Any) -> float:
    rate = checks.number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={value} must be at least 0 and less than 1: the share of tokens that is pruned")
    return rate
