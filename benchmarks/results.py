"""The document that results.json holds, and what changed since an older one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from . import machine
from .floor import Machine

FORMAT = "flashprune-bench/1"


def document(rows: list[dict], measured: Machine, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw samples in seconds included."""
    return {
        "format": FORMAT,
        "machine": {"device": device, **machine.facts(device)},
        "measured": asdict(measured),
        "settings": settings,
        "rows": rows,
    }


def check(found: Any) -> None:
    """ValueError where this is no document of ours."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format", "no format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"not results of this benchmark: expected format {FORMAT}, got {kind}")
    try:
        list(_timed(found))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"results with a row that cannot be read: {type(error).__name__}: {error}") from None


class Change(NamedTuple):
    """Medians in seconds of one variant of one case; ``new`` is None where it is no longer timed, and ``why``."""

    case: dict[str, Any]
    name: str
    kind: str
    old: float
    new: float | None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.new is None else self.new / self.old

    def worse(self, ratio: float) -> bool:
        """Only ours can be: a peer that is slower now says that the machine is."""
        return self.kind == "flashprune" and (self.new is None or self.new > ratio * self.old)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Of every variant that the old run timed and the new one has a row of."""
    before = {key: value for key, _, value in _timed(old)}
    now = {key: value for key, _, value in _timed(new)}
    found = []
    for row in new["rows"]:
        for variant in row["variants"]:
            key = _key(row, variant["name"])
            if key in before:
                why = variant.get("why", "")
                found.append(Change(row["case"], variant["name"], variant["kind"], before[key], now.get(key), why))
    return found


def _timed(found: dict[str, Any]) -> Iterator[tuple[tuple, dict, float]]:
    for row in found["rows"]:
        for variant in row["variants"]:
            if variant["status"] == "timed":
                yield _key(row, variant["name"]), variant, median(variant["seconds"])


def _key(row: dict[str, Any], name: str) -> tuple:
    """Equal for the same variant of the same case; ours on another backend is another variant."""
    case = row["case"]
    facts = tuple(str(case[part]) for part in ("op", "n", "d", "k", "images", "data", "dtype", "heads", "kv_heads"))
    return (*facts, str(case.get("sizes")), found_backend(row, name), name)


def found_backend(row: dict[str, Any], name: str) -> str:
    return row["backend"] if name == "flashprune" else ""
