"""What a pruned prefill tells of itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tokens import Item


class Stopwatch:
    """Adds up times on devices; on a GPU without waiting for it until it is read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Times what runs on a device inside."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(device)
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record(stream)
        yield
        events[1].record(stream)
        self._events.append(events)

    @property
    def seconds(self) -> float:
        """The sum so far; on a GPU this waits for it."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


@dataclass
class Selection:
    """What was kept in one prefill, segment by segment: an image or video, or all of a prompt, by the `scope`.

    `rows`: each segment's prompt; `counts`: (tokens, kept) of each; `items`: its images and videos, with the place of
    each of their tokens; `backend`: what chose, or "none" where everything was kept; `length`: columns of the sequence
    (before, after).
    """

    rows: list[int]
    counts: list[tuple[int, int]]
    items: list[list[Item]] = field(repr=False)
    length: tuple[int, int]
    backend: str
    columns: list[Tensor] = field(repr=False)  # int64 [n], CPU: where each segment's tokens stand in the prompt
    packed: Tensor | None = field(repr=False)  # int64 [sum of kept], packed indices; None for all
    stopwatch: Stopwatch = field(repr=False)

    @property
    def tokens(self) -> int:
        """Visual tokens before pruning."""
        return sum(n for n, _ in self.counts)

    @property
    def tokens_kept(self) -> int:
        """Visual tokens after pruning."""
        return sum(k for _, k in self.counts)

    @property
    def kept(self) -> list[Tensor]:
        """int64 `[k]` of each segment, on the CPU: ascending indices among its tokens."""
        if self.packed is None:
            return [torch.arange(n) for n, _ in self.counts]
        parts = self.packed.cpu().split([k for _, k in self.counts])
        starts = torch.tensor([0, *(n for n, _ in self.counts)]).cumsum(0).tolist()
        return [part - start for part, start in zip(parts, starts, strict=False)]

    @property
    def positions(self) -> list[Tensor]:
        """int64 `[k]` of each segment, on the CPU: the columns of its prompt where the kept tokens stood."""
        return [columns[kept] for columns, kept in zip(self.columns, self.kept, strict=True)]

    @property
    def seconds(self) -> float:
        """Time of importance and selection in this prefill; on a GPU reading it waits for the GPU.

        Importance from the encoder is not in it: that was computed while encoding.
        """
        return self.stopwatch.seconds


class _Own(threading.local):
    """A list a thread: torch.compile loses what is set on a `threading.local` itself."""

    def __init__(self) -> None:
        self.last: list[Selection] = []


class Last:
    """The selection of the calling thread's last prefill; if it ran none, that of any thread's."""

    def __init__(self) -> None:
        self._own = _Own()
        self._latest: Selection | None = None

    def note(self, selection: Selection) -> None:
        """The calling thread's from now on."""
        self._own.last[:] = [selection]
        self._latest = selection

    @property
    def selection(self) -> Selection | None:
        return self._own.last[0] if self._own.last else self._latest

    def __reduce__(self) -> Any:
        """A copy has seen no prefill."""
        return Last, ()
