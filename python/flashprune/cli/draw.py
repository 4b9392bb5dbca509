"""Pictures of a selection, drawn with Pillow: one image with dropped patches faded, and the demo's sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .photos import Grid

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BACKGROUND = (250, 250, 248)
_INK = (28, 30, 34)
_FAINT = (112, 116, 124)
_PAPER = np.array([212, 214, 219], dtype=np.float32)  # what dropped patches fade to

# A perceptual ramp from near black through red to pale yellow; the heat map interpolates between these.
_HEAT = np.array([[10, 8, 24], [84, 15, 92], [188, 48, 76], [246, 132, 40], [252, 250, 176]], dtype=np.float32)


class Panel(NamedTuple):
    """One cell of the sheet: uint8 ``[height, width, 3]``."""

    pixels: np.ndarray
    caption: str


class Column(NamedTuple):
    """One photograph at one ratio, a panel a row."""

    heading: str
    panels: Sequence[Panel]


class Group(NamedTuple):
    """The columns of one photograph."""

    title: str
    note: str
    columns: Sequence[Column]


class Row(NamedTuple):
    label: str
    note: str


def dim_dropped(image: np.ndarray, grid: Grid, kept: torch.Tensor, cell: tuple[int, int]) -> np.ndarray:
    """The image with every patch that was not kept grey and faded.

    Args:
        image: uint8 ``[height, width, 3]``; resized so that a patch is exactly one cell.
        grid: ``(rows, cols)``.
        kept: int64 ``[k]``, raster indices of the kept patches.
        cell: ``(height, width)`` of a patch in pixels.

    Returns:
        uint8 ``[rows * cell[0], cols * cell[1], 3]``.
    """
    bright = _fit(image, grid, cell).astype(np.float32)
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[kept.cpu().numpy()] = True
    dim = 0.8 * _PAPER + 0.2 * bright.mean(-1, keepdims=True)
    return np.where(_enlarge(mask.reshape(grid), cell)[..., None], bright, dim).astype(np.uint8)


def heat_map(values: torch.Tensor, grid: Grid, cell: tuple[int, int]) -> np.ndarray:
    """Non-negative ``values`` ``[rows * cols]`` as colours, palest at the largest: uint8 like :func:`dim_dropped`."""
    finite = np.nan_to_num(values.float().cpu().numpy().reshape(grid), nan=0.0, posinf=0.0, neginf=0.0)
    span = float(finite.max() - finite.min())
    unit = (finite - finite.min()) / span if span > 0 else np.full_like(finite, 0.5)
    unit = np.sqrt(unit)  # attention is peaked: without this all but a few patches would be black
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(unit, stops, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    return _enlarge(colours.astype(np.uint8), cell)


def sheet(title: str, note: str, rows: Sequence[Row], groups: Sequence[Group]) -> np.ndarray:
    """The demo's picture: a row a method, a group of columns a photograph. Panels in one row share their height."""
    from PIL import Image, ImageDraw

    margin, gap, group_gap, label_width, header, heading, footer = 44, 12, 36, 236, 124, 100, 36
    heights = [panel.pixels.shape[0] for panel in groups[0].columns[0].panels]
    widths = [[column.panels[0].pixels.shape[1] for column in group.columns] for group in groups]
    inner = sum(sum(group) + gap * (len(group) - 1) for group in widths) + group_gap * (len(groups) - 1)
    width = margin + label_width + inner + margin
    height = margin + header + heading + sum(heights) + footer * len(rows) + margin

    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 6), title, font=_font(52), fill=_INK)
    draw.text((margin, margin + 66), note, font=_font(28), fill=_FAINT)

    top = margin + header + heading
    tops = [top + sum(heights[:i]) + footer * i for i in range(len(rows))]
    for row, y, row_height in zip(rows, tops, heights, strict=True):
        _label(draw, margin, y + row_height // 2, row)

    x = margin + label_width
    for group, group_widths in zip(groups, widths, strict=True):
        draw.text((x, margin + header), group.title, font=_font(34), fill=_INK)
        advance = draw.textlength(group.title + "  ", font=_font(34))
        draw.text((x + advance, margin + header + 10), group.note, font=_font(24), fill=_FAINT)
        for column, panel_width in zip(group.columns, group_widths, strict=True):
            draw.text((x, margin + header + 50), column.heading, font=_font(28), fill=_INK)
            for panel, y in zip(column.panels, tops, strict=True):
                canvas.paste(Image.fromarray(panel.pixels), (x, y))
                draw.text((x, y + panel.pixels.shape[0] + 2), panel.caption, font=_font(20), fill=_FAINT)
            x += panel_width + gap
        x += group_gap - gap
    return np.asarray(canvas)


def _label(draw: ImageDraw.ImageDraw, x: int, middle: int, row: Row) -> None:
    lines = row.note.split("\n")
    top = middle - (40 + 30 * len(lines)) // 2
    draw.text((x, top), row.label, font=_font(34), fill=_INK)
    for i, line in enumerate(lines):
        draw.text((x, top + 44 + 30 * i), line, font=_font(24), fill=_FAINT)


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fit(image: np.ndarray, grid: Grid, cell: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    size = (grid[1] * cell[1], grid[0] * cell[0])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _enlarge(values: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Repeat every value over a cell of pixels."""
    return values.repeat(cell[0], axis=0).repeat(cell[1], axis=1)
