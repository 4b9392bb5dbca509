"""What pruning changes in a prefill, measured: visual tokens, latencies, and bytes of the key-value cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import caches
from .families import family_of
from .prune import Handle, prune
from .report import Selection, Stopwatch


@dataclass(frozen=True)
class Variant:
    """One way to run a model: the arguments of `prune`, or the whole model where there is no method."""

    method: str = ""
    keep: int | float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, model: Any) -> AbstractContextManager[Handle | None]:
        """A context in which the model runs this way; gives `prune`'s handle, or None for the whole model."""
        if not self.method:
            return nullcontext()
        return prune(model, self.method, self.keep, **self.settings)


@dataclass
class Profile:
    """What was measured of a variant; one entry a run, in seconds, runs of all variants in turns.

    `prefill`: the language model on the whole prompt, the selection included and image encoding not. `selection`: what
    the pruning itself took of that. `forward`: the model's forward, image encoding included. `first_token`: `generate`
    of one token. `tokens`, `kept`: visual tokens of the batch; `cache_bytes`: what the key-value cache holds after the
    prefill; `backend`: what selected, "none" where nothing was dropped.
    """

    variant: Variant
    tokens: int = 0
    kept: int = 0
    cache_bytes: int = 0
    backend: str = "none"
    prefill: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    variants: Sequence[Variant],
    *,
    runs: int = 5,
    first_token: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> list[Profile]:
    """Runs every variant `runs` times on the same inputs, in turns, after one run of each that warms up.

    - `model`: as for `prune`, not pruned; `inputs`: what its forward takes, images among it, on its device.
    - `first_token`: whether to time `generate` too; `progress`: called after each run of each variant.

    Returns one `Profile` a variant, in their order. Times are those of the device, which is waited for.

    Raises what `prune` raises for a variant, before anything is timed; ValueError if `runs` is below 1.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    whole = selection_of(model, inputs, Variant("divprune", 1.0))
    profiles = [Profile(variant, tokens=whole.tokens, kept=whole.tokens) for variant in variants]
    for variant in variants:
        with variant.applied(model):
            pass
    for run in range(runs + 1):
        for profile in profiles:
            with profile.variant.applied(model) as handle:
                _run(model, inputs, profile, handle, first_token, warm_up=run == 0)
            progress()
    return profiles


def selection_of(model: Any, inputs: Mapping[str, Any], variant: Variant) -> Selection:
    """What a variant with a method keeps of the inputs, by one prefill."""
    with variant.applied(model) as handle:
        prefill(model, inputs)
        assert handle is not None and handle.last is not None
        return handle.last


def prefill(model: Any, inputs: Mapping[str, Any]) -> Any:
    """One forward that fills a new cache and computes the logits of the last token only; returns its output."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(**inputs, use_cache=True, **last)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds, and of the states of linear attention."""
    held: list[Any] = []
    for layer in cache.layers:
        held += [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            held += getattr(layer, name, {}).values()
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, Tensor))


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """One prompt's inputs `batch` times over: every tensor of them goes along its first dimension."""
    return {name: tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}


def _run(
    model: Any, inputs: Mapping[str, Any], profile: Profile, handle: Handle | None, first_token: bool, warm_up: bool
) -> None:
    device = next(model.parameters()).device
    inside = Stopwatch()
    with _timing(family_of(model).language_model(model.base_model), inside, device):
        output, forward = _waited(device, lambda: prefill(model, inputs))
    selected = handle.last if handle is not None else None
    if warm_up:
        profile.cache_bytes = cache_bytes(getattr(output, caches.NAME))
        if selected is not None:
            profile.kept, profile.backend = selected.tokens_kept, selected.backend
    else:
        profile.forward.append(forward)
        profile.prefill.append(inside.seconds)
        profile.selection.append(selected.seconds if selected is not None else 0.0)
    del output
    if first_token:
        _, seconds = _waited(device, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))
        if not warm_up:
            profile.first_token.append(seconds)


@contextmanager
def _timing(module: torch.nn.Module, stopwatch: Stopwatch, device: torch.device) -> Iterator[None]:
    """Times a module's calls, hooks that others have put on it included."""
    running: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        running.append(stopwatch.running(device))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _waited(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    _synchronize(device)
    started = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
