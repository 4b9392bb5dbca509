"""What is put on a model's modules while it is pruned, and taken off again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .capture import Observer, Tap


class _Removable(Protocol):
    def remove(self) -> None: ...


class Hooks:
    """Hooks, replaced methods and taps, in the order in which they were put on.

    All of them belong to the modules for as long as the pruning lasts, none to one call: threads share the modules.
    """

    def __init__(self) -> None:
        self._on: list[_Removable] = []

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls `hook(module, args, kwargs)`; it may change `kwargs`, a dictionary of that call alone."""
        self._on.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., None], always: bool = True) -> None:
        """Calls `hook(module, args, output)`; `always`: where the module raises too, with None as its output."""
        self._on.append(module.register_forward_hook(hook, always_call=always))

    def replace(self, owner: Any, name: str, call: Callable[..., Any], original: Any = None) -> None:
        """`owner.name(...)` becomes `call(original, ...)`, by default with what it was."""
        self._on.append(_Replacement(owner, name, call, original))

    def tap(self, module: nn.Module, observer: Observer) -> None:
        """Shows queries and keys of an attention module; see `Tap`."""
        self._on.append(Tap(module, observer))

    def forget_compiled(self) -> None:
        """What was compiled calls the hooks that were there when it was traced: it is traced anew, with these."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def remove(self) -> None:
        """Everything is as it was."""
        while self._on:
            self._on.pop().remove()


class _Replacement:
    """An attribute of this one object, found before its class's until removed."""

    def __init__(self, owner: Any, name: str, call: Callable[..., Any], original: Any) -> None:
        self._owner, self._name, self._call = owner, name, call
        self._own = vars(owner).get(name)
        self._original = getattr(owner, name) if original is None else original
        setattr(owner, name, self)

    @property
    def __signature__(self) -> inspect.Signature:  # generate chooses arguments by it
        return inspect.signature(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._original, *args, **kwargs)

    def remove(self) -> None:
        if vars(self._owner).get(self._name) is not self:
            return  # it was set anew since, which stays
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)
