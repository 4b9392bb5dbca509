"""Scratch memory that the caller keeps, for the CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .dispatch import resolve
from .operators import namespace


class Workspace:
    """What the calls inside have asked for."""

    def __init__(self, operators: Any, like: Tensor) -> None:
        self._operators, self._like = operators, like
        self._final: int | None = None

    @property
    def bytes(self) -> int:
        """The most that one call has needed so far; after the context, all told."""
        return int(self._operators.workspace_bytes(self._like)) if self._final is None else self._final

    def _close(self) -> None:
        self._final = self.bytes
        self._operators.use_workspace(self._like)


@contextmanager
def workspace(buffer: Tensor | None = None, *, device: torch.device | str = "cuda") -> Iterator[Workspace]:
    """Selections of the CUDA backend inside take their scratch memory from `buffer` instead of allocating it.

    What a call needs follows from its shapes, `k` and the device, never from values: a first call without a buffer
    tells it. The result, and the budgets of packed segments where they differ, are allocated as ever. One buffer serves
    any number of calls on one stream, one after another. Holds for the calling thread; contexts do not nest.

    - `buffer`: contiguous uint8 `[bytes]` on a CUDA device, its address a multiple of 16; None only measures.
    - `device`: of the calls, where there is no buffer.

    Raises ValueError for a buffer that does not fit, and, from a call inside, for one that is too small, such as
    `workspace: expected at least 74248 bytes, got 1024`; RuntimeError where the CUDA backend cannot run.

    >>> if fp.backends()["cuda"] == "ready":  # doctest: +SKIP
    ...     with fp.workspace() as needed:
    ...         fp.mmr_select(features, importance, 64)
    ...     buffer = torch.empty(needed.bytes, dtype=torch.uint8, device="cuda")
    ...     with fp.workspace(buffer):
    ...         fp.mmr_select(features, importance, 64)
    """
    if buffer is not None and not isinstance(buffer, Tensor):
        raise TypeError(f"buffer: expected a tensor or None, got {type(buffer).__name__}")
    where = torch.device(device) if buffer is None else buffer.device
    operators = namespace(resolve("cuda", "mmr_select", where, torch.float32))
    nothing = torch.empty(0, dtype=torch.uint8, device=where)
    operators.use_workspace(nothing if buffer is None else buffer)
    used = Workspace(operators, nothing)
    try:
        yield used
    finally:
        used._close()
