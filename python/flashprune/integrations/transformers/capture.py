"""Queries and keys of one attention layer, seen on their way into whatever attention function the model uses."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Called with query [B, H, Lq, d], key [B, Hkv, L, d], the softmax's scale and what else the layer passes.
Observer = Callable[[Tensor, Tensor, float, dict[str, Any]], None]

_PREFIX = "pruning|"


class Tap:
    """Shows an attention module's queries and keys to an observer, until removed; the model computes as before.

    Transformers looks its attention function up by a name in the module's config. The tap stands in for the config of
    this one module, with a registered function under a name of its own that ends with the model's: nothing else
    changes, neither masks nor other layers, for SDPA, FlashAttention and eager attention alike.
    """

    def __init__(self, module: Any, observer: Observer) -> None:
        self.module = module
        self.observer = observer
        self.module.config = _Config(self.module.config, self)

    def remove(self) -> None:
        """The module's own config is back."""
        self.module.config = self.module.config._original


class _Config:
    """A config but for the name of its attention function."""

    def __init__(self, original: Any, tap: Tap) -> None:
        self._original = original
        self._tap = tap
        self._threads = _Threads()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask of it is not the original's to answer
            raise AttributeError(name)
        return getattr(self._original, name)

    @property
    def _attn_implementation(self) -> str:
        if self._threads.inside:  # FlashAttention reads its own name there
            return self._original._attn_implementation
        name = _PREFIX + (self._original._attn_implementation or "eager")
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _attend)
        return name


class _Threads(threading.local):
    """Whether the current thread is past the observer, in the model's own attention function: then not empty."""

    def __init__(self) -> None:
        self.inside: list[Any] = []  # torch.compile loses what is set on a `threading.local` itself

    def __reduce__(self) -> Any:
        """A copy is in no call."""
        return _Threads, ()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    config = module.config
    config._tap.observer(query, key, kwargs["scaling"], kwargs)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._original._attn_implementation or "eager", eager)
    config._threads.inside.append(module)
    try:
        return attention(module, query, key, value, *args, **kwargs)
    finally:
        config._threads.inside.clear()


def attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The self-attention modules of an encoder, in order."""
    return [m for m in tower.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
