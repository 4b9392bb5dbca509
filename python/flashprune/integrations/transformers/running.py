"""What each thread is doing with a pruned model: nothing of one forward pass is seen by another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .encoders import Encoding
from .outputs import Asked
from .prefill import Prefill
from .tokens import Item


@dataclass
class Forward:
    """One forward pass of the base model, as its arguments and encoder calls tell of it."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    arguments: Mapping[str, Any]  # all of them
    encoded: dict[str, Sequence[Item]] = field(default_factory=dict)


@dataclass
class Decoding:
    """One pass through the language model."""

    cache: Any
    prefill: Prefill | None = None  # if it drops tokens
    attention: list[Tensor] = field(default_factory=list)  # of each prompt's last token, for methods inside the LLM
    shorter: dict[str, Any] | None = None  # what the layers after a pruning inside the LLM are given


@dataclass
class Running:
    """The calls that a thread is in."""

    asked: Asked | None = None
    encoding: Encoding | None = None
    forward: Forward | None = None  # until it comes to the language model
    decoding: Decoding | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the model may be called anew: by an importance of the user's, for one."""
        before = self.asked, self.encoding, self.forward, self.decoding
        self.asked = self.encoding = self.forward = self.decoding = None
        try:
            yield
        finally:
            self.asked, self.encoding, self.forward, self.decoding = before


class Threads(threading.local):
    """The calls that the current thread is in.

    They are one object a thread, which torch.compile can trace changes of; of a `threading.local` it loses them.
    """

    def __init__(self) -> None:
        self.running = Running()

    def __reduce__(self) -> Any:
        """A copy is in no call."""
        return Threads, ()
