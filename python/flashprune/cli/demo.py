"""`flashprune demo`: every method on photographs, one picture and one table."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

import flashprune as fp

from . import console, draw, files
from .photos import DEMO_PHOTOS, Photo, crop_to_grid, load_photo, patch_features, stand_in_importance
from .runs import METHODS, Run, Tokens, run, serving_device

RATIOS = (0.25, 0.10)
PICTURE = "flashprune-demo.png"
_DIM = 1024  # the width of CLIP ViT-L/14, whose patches LLaVA prunes
_PANEL_HEIGHT = 192

_STAND_INS = (
    "No model runs here: the patch features are a fixed random layer over the pixels and the importance is a saliency "
    "map. Both stand in for a model's. Latency is real; the other figures serve to compare the rows of one block."
)


class Scene(NamedTuple):
    photo: Photo
    image: np.ndarray
    tokens: Tokens


class Result(NamedTuple):
    scene: Scene
    ratio: float
    method: str
    run: Run
    retention: float
    hopkins: float


def demo(out: Path, backend: str) -> None:
    """Run the demo and write its picture into the folder `out`, which is made if need be.

    Raises InputError when the folder or the picture cannot be written, or a photograph is missing.
    """
    files.check_folder_name(out, "--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise console.InputError(f"--out: cannot make the folder {out}: {error.strerror}") from None
    path = out / PICTURE
    files.check_output(path, "--out")
    screen = console.stdout()
    screen.print(_STAND_INS)
    try:
        scenes = [_scene(photo) for photo in DEMO_PHOTOS]
    except FileNotFoundError as error:
        raise console.InputError(str(error)) from None
    results = _run_all(scenes, backend)
    screen.print()
    screen.print(_table(results))
    files.write_whole(path, files.png_bytes(_picture(scenes, results)))
    screen.print(f"Picture: {path}", soft_wrap=True)


def _scene(photo: Photo) -> Scene:
    image = crop_to_grid(load_photo(photo.file), photo.grid)
    device = serving_device()
    features = patch_features(image, photo.grid, _DIM).to(device)
    return Scene(photo, image, Tokens(features, stand_in_importance(image, photo.grid).to(device)))


def _run_all(scenes: list[Scene], backend: str) -> list[Result]:
    results = []
    with console.progress() as progress:
        bar = progress.add_task("selecting", total=len(scenes) * len(RATIOS) * len(METHODS))
        for scene in scenes:
            for ratio in RATIOS:
                for method in METHODS:
                    results.append(_result(scene, ratio, method, backend))
                    progress.advance(bar)
    return results


def _result(scene: Scene, ratio: float, method: str, backend: str) -> Result:
    features, importance = scene.tokens
    assert importance is not None
    timed = run(method, scene.tokens, fp.budget(features.shape[0], ratio), backend)
    retention = fp.metrics.importance_retention(importance, timed.indices)
    return Result(scene, ratio, method, timed, retention, fp.metrics.hopkins(features, timed.indices))


def _table(results: list[Result]) -> Table:
    grids = list(dict.fromkeys(result.scene.photo.grid for result in results))
    table = console.table("Mean over the photographs of a grid; latency: median of a few runs")
    table.add_column("method")
    for heading in ("grid", "N", "kept", "latency ms", "importance", "Hopkins"):
        table.add_column(heading, justify="right")
    table.add_column("backend")
    for grid in grids:
        for ratio in RATIOS:
            for method in METHODS:
                rows = [r for r in results if (r.scene.photo.grid, r.ratio, r.method) == (grid, ratio, method)]
                _add_row(table, rows)
            table.add_section()
    table.caption = "importance: the share kept. Hopkins: lower when the kept patches are more spread out."
    return table


def _add_row(table: Table, rows: list[Result]) -> None:
    first = rows[0]
    tokens, kept = first.scene.tokens.features.shape[0], first.run.indices.shape[0]
    table.add_row(
        METHODS[first.method].label,
        f"{first.scene.photo.grid[0]}x{first.scene.photo.grid[1]}",
        str(tokens),
        str(kept),
        f"{statistics.median(row.run.latency_ms for row in rows):.2f}",
        f"{statistics.fmean(row.retention for row in rows):.1%}",
        f"{statistics.fmean(row.hopkins for row in rows):.3f}",
        first.run.backend,
    )


def _picture(scenes: list[Scene], results: list[Result]) -> np.ndarray:
    rows = [draw.Row("Photograph", "and stand-in\nimportance")]
    rows += [draw.Row(method.label, method.note) for method in METHODS.values()]
    groups = [_group(scene, [r for r in results if r.scene is scene]) for scene in scenes]
    note = "In colour: kept. Faded: dropped. Features and importance stand in for a model's."
    return draw.sheet("Which patches each method keeps", note, rows, groups)


def _group(scene: Scene, results: list[Result]) -> draw.Group:
    grid = scene.photo.grid
    side = max(1, _PANEL_HEIGHT // grid[0])
    cell = (side, side)
    assert scene.tokens.importance is not None
    whole = draw.Panel(draw.dim_dropped(scene.image, grid, torch.arange(grid[0] * grid[1]), cell), "original")
    heat = draw.Panel(draw.heat_map(scene.tokens.importance, grid, cell), "importance")
    columns = []
    for ratio, first in zip(RATIOS, (whole, heat), strict=True):
        chosen = [r for r in results if r.ratio == ratio]
        panels = [first]
        for result in chosen:
            caption = f"{result.retention:.0%} of importance"
            panels.append(draw.Panel(draw.dim_dropped(scene.image, grid, result.run.indices, cell), caption))
        columns.append(draw.Column(f"{ratio:.0%}: {chosen[0].run.indices.shape[0]} kept", panels))
    return draw.Group(scene.photo.name, f"{grid[0]} x {grid[1]} patches", columns)
