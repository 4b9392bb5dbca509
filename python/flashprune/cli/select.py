"""`flashprune select`: prune the tokens of the user's own image or feature file."""

from __future__ import annotations

import json
import math
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

import flashprune as fp

from . import console, draw, features, files
from .console import InputError
from .images import read_image
from .photos import patch_features, stand_in_importance
from .runs import METHODS, Run, Tokens, run, serving_device
from .variants import read_keep

_DIM = 1024
_PATCHES = 576  # of an image without --grid, split by its aspect ratio
_MAX_PATCHES = 65536
_MAX_SIDE = 1536  # pixels of the written picture


class Source(NamedTuple):
    """What is pruned; a feature file has no `image` and maybe no `grid`; `stand_in`: no model computed the tokens."""

    tokens: Tokens
    grid: tuple[int, ...] | None
    image: np.ndarray | None
    stand_in: bool


def select(
    path: Path, method: str, keep: str, grid: str | None, backend: str, out: Path | None, json_path: Path | None
) -> None:
    """Select, print a summary, and write the picture and the JSON that were asked for.

    Raises InputError for whatever is wrong with the arguments, the file or the outputs.
    """
    if out is not None:
        files.check_output(out, "--out", path, suffix=".png")
    if json_path is not None:
        files.check_output(json_path, "--json", path, out)
    source = _read(path, grid, method)
    n = source.tokens.features.shape[0]
    k = parse_keep(keep, n)
    if out is not None and source.grid is None:
        raise InputError(f"--out needs a grid: {path} has no entry named grid (give --grid ROWSxCOLS)")
    timed = run(method, source.tokens, k, backend)
    outputs: list[tuple[Path, bytes]] = []
    if out is not None:
        outputs.append((out, files.png_bytes(_picture(source, timed.indices))))
    if json_path is not None:
        outputs.append((json_path, _json(_report(path, method, keep, source, timed))))
    for file, data in outputs:
        files.write_whole(file, data)
    _print(path, method, source, timed, out, json_path)


def parse_keep(keep: str, n: int) -> int:
    """The count K of N tokens: a whole number is a count, anything with a point, an exponent or a % is a ratio.

    Raises InputError when it is neither, or out of range.
    """
    found = read_keep(keep.strip())
    if isinstance(found, int) and found > n:
        raise InputError(f"--keep {keep}: a count must be between 1 and the {n} tokens there are")
    return fp.budget(n, found)


def parse_grid(grid: str) -> tuple[int, int]:
    """`ROWSxCOLS` as two positive integers.

    Raises InputError for anything else.
    """
    match = re.fullmatch(r"(\d{1,6})[x×,](\d{1,6})", grid.strip())
    rows, cols = (int(side) for side in match.groups()) if match else (0, 0)
    if rows < 1 or cols < 1 or rows * cols > _MAX_PATCHES:
        raise InputError(f"--grid must be ROWSxCOLS, such as 24x24, with at most {_MAX_PATCHES} patches; got {grid}")
    return rows, cols


def _read(path: Path, grid: str | None, method: str) -> Source:
    asked = parse_grid(grid) if grid is not None else None
    device = serving_device()
    if path.suffix.lower() in features.SUFFIXES:
        held = features.read_features(path, method if METHODS[method].needs_importance else "")
        n = held.features.shape[0]
        if asked is not None and asked[0] * asked[1] != n:
            raise InputError(f"--grid {grid} has {asked[0] * asked[1]} patches, but {path} holds N={n} tokens")
        importance = None if held.importance is None else held.importance.to(device)
        return Source(Tokens(held.features.to(device), importance), asked or held.grid, None, False)
    image = read_image(path)
    cut = asked or _grid_of(image)
    tokens = Tokens(patch_features(image, cut, _DIM).to(device), stand_in_importance(image, cut).to(device))
    return Source(tokens, cut, image, True)


def _grid_of(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    rows = round(math.sqrt(_PATCHES * height / width))
    rows = min(max(rows, 1), _PATCHES)
    return rows, max(1, round(_PATCHES / rows))


def _picture(source: Source, kept: torch.Tensor) -> np.ndarray:
    assert source.grid is not None
    grid = (math.prod(source.grid[:-1]), source.grid[-1])  # frames one below the other
    if source.image is None:
        side = max(2, min(16, _MAX_SIDE // max(grid)))
        importance = source.tokens.importance
        values = torch.ones(grid[0] * grid[1]) if importance is None else importance
        return draw.dim_dropped(draw.heat_map(values, grid, (side, side)), grid, kept, (side, side))
    height, width = source.image.shape[:2]
    shrink = min(1.0, _MAX_SIDE / max(height, width))
    cell = (max(2, round(height * shrink / grid[0])), max(2, round(width * shrink / grid[1])))
    return draw.dim_dropped(source.image, grid, kept, cell)


def _report(path: Path, method: str, keep: str, source: Source, timed: Run) -> dict[str, Any]:
    tokens = source.tokens.features
    return {
        "method": method,
        "settings": dict(METHODS[method].settings),
        "input": str(path),
        "stand_in_features": source.stand_in,
        "n": tokens.shape[0],
        "dim": tokens.shape[1],
        "dtype": str(tokens.dtype).removeprefix("torch."),
        "keep": keep,
        "k": timed.indices.shape[0],
        "grid": None if source.grid is None else list(source.grid),
        "indices": timed.indices.tolist(),
        "backend": timed.backend,
        "device": str(tokens.device),
        "latency_ms": timed.latency_ms,
        "latency_runs": timed.runs,
        "versions": {"flashprune": fp.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _json(report: dict[str, Any]) -> bytes:
    """One entry a line: indented JSON would give every index its own."""
    entries = (f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in report.items())
    return ("{\n" + ",\n".join(entries) + "\n}\n").encode()


def _print(path: Path, method: str, source: Source, timed: Run, out: Path | None, json_path: Path | None) -> None:
    screen = files.screen(out, json_path)
    if source.stand_in:
        screen.print("No model runs here: patch features and importance stand in for a model's.", soft_wrap=True)
    importance = source.tokens.importance
    facts = {
        "input": str(path),
        "method": METHODS[method].label,
        "grid": "not known" if source.grid is None else "x".join(map(str, source.grid)),
        "kept": f"{timed.indices.shape[0]} of {len(source.tokens.features)} tokens",
        "latency": f"{timed.latency_ms:.2f} ms, median of {timed.runs}",
        "backend": timed.backend,
    }
    if importance is not None and bool((importance.isfinite() & (importance >= 0)).all()):
        facts["importance kept"] = f"{fp.metrics.importance_retention(importance, timed.indices):.1%}"
    facts |= {name: files.name_of(file) for name, file in (("picture", out), ("JSON", json_path)) if file is not None}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, console.one_line(value))
    screen.print(grid)
