"""What Triton's interpreter does not see: memory of no tensor of the launch that a kernel reads or writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


class BoundedMemory:
    """Stands in for the interpreter's memory access; every address must lie in a tensor that the kernel was given."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.spans: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def add(self, tensor: Any) -> None:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel():
            start = tensor.data_ptr()
            self.spans.append((start, start + (last + 1) * tensor.element_size()))

    def check(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        touched = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape)).astype(bool)
        ]
        inside = np.zeros(touched.shape, bool)
        for start, end in self.spans:
            inside |= (touched >= start) & (touched < end)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} addresses lie in no tensor of the launch")

    def load(self, addresses: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self.check(addresses, mask)
        return self.memory.load(addresses, mask, *rest)

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        self.check(addresses, mask)
        return self.memory.store(addresses, values, mask)

    def atomic_rmw(self, op: Any, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self.check(addresses, mask)
        return self.memory.atomic_rmw(op, addresses, values, mask, *rest)


def bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are interpreted from now on raise an error where they leave the tensors of their launch."""
    from triton.runtime import interpreter

    memory = BoundedMemory(interpreter._interpreter)
    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def converted(argument: Any) -> Any:
        if hasattr(argument, "data_ptr"):
            memory.add(argument)
        return convert(argument)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.spans.clear()
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
