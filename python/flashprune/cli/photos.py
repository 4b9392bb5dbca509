"""Photographs, their patches, and stand-ins for what a vision model would compute on them.

No model is loaded anywhere: :func:`patch_features` is one fixed random layer over the patch pixels and
:func:`stand_in_importance` a saliency map. Both have the redundancy of real photographs, which is what a selector sees,
but say nothing about a model's accuracy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

PATCH_PIXELS = 14  # side of a patch, as in CLIP ViT-L/14
_SEED = 20260213

Grid = tuple[int, int]


class Photo(NamedTuple):
    """A photograph inside the scikit-image wheel, and the patch grid that the demo cuts it into."""

    name: str
    file: str
    grid: Grid


DEMO_PHOTOS = (
    Photo("astronaut", "astronaut.png", (24, 24)),
    Photo("cat", "chelsea.png", (24, 24)),
    Photo("coffee", "coffee.png", (48, 64)),
    Photo("rocket", "rocket.jpg", (48, 64)),
)


def photo_path(file: str) -> Path:
    """Path of a photograph shipped in the scikit-image wheel; its lazy downloader is never touched.

    Raises:
        FileNotFoundError: scikit-image is not installed, or this version does not ship the file.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the photographs are part of scikit-image: pip install flashprune[cli]")
    path = Path(spec.submodule_search_locations[0]) / "data" / file
    if not path.is_file():
        raise FileNotFoundError(f"the installed scikit-image does not ship {file}: pip install flashprune[cli]")
    return path


def load_photo(file: str) -> np.ndarray:
    """The photograph as uint8 ``[height, width, 3]``."""
    from PIL import Image

    with Image.open(photo_path(file)) as image:
        return np.asarray(image.convert("RGB"))


def crop_to_grid(image: np.ndarray, grid: Grid) -> np.ndarray:
    """Centre crop ``[h, w, 3]`` with the grid's aspect ratio, so that patches are square."""
    height, width = image.shape[:2]
    rows, cols = grid
    crop_height = min(height, max(1, round(width * rows / cols)))
    crop_width = min(width, max(1, round(height * cols / rows)))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image[top : top + crop_height, left : left + crop_width]


def patch_features(image: np.ndarray, grid: Grid, dim: int) -> torch.Tensor:
    """Features of an image's patches: standardised pixels through one fixed random layer with a ReLU.

    The ReLU keeps the features of full rank when ``dim`` exceeds the pixels of a patch, as a model's are; a bare
    projection would stop at rank 588. The same image gives the same features on every run.

    Args:
        image: uint8 ``[height, width, 3]``.
        grid: ``(rows, cols)`` of patches.
        dim: number of features D.

    Returns:
        float32 ``[rows * cols, dim]``, in raster order.

    Raises:
        ValueError: wrong image shape or dtype, or a grid or dim that is not positive.

    Examples:
        >>> image = np.zeros((64, 48, 3), dtype=np.uint8)
        >>> patch_features(image, (4, 3), 32).shape
        torch.Size([12, 32])
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    pixels = _resize(image, grid, PATCH_PIXELS)
    pixels = (pixels - pixels.mean((0, 1))) / (pixels.std((0, 1)) + 1e-3)
    rows, cols = grid
    patches = pixels.reshape(rows, PATCH_PIXELS, cols, PATCH_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    flat = torch.from_numpy(np.ascontiguousarray(patches).reshape(rows * cols, -1))
    return torch.relu_(flat @ _projection(flat.shape[1], dim))


def stand_in_importance(image: np.ndarray, grid: Grid) -> torch.Tensor:
    """A saliency map in place of a model's attention: local contrast and unusual colour, strongest near the centre.

    Args:
        image: uint8 ``[height, width, 3]``.
        grid: ``(rows, cols)`` of patches.

    Returns:
        float32 ``[rows * cols]``, positive, sums to 1.

    Raises:
        ValueError: wrong image shape or dtype, or a grid that is not positive.

    Examples:
        >>> image = np.zeros((64, 48, 3), dtype=np.uint8)
        >>> stand_in_importance(image, (4, 3)).shape
        torch.Size([12])
    """
    side = 4
    pixels = _resize(image, grid, side)
    rows, cols = grid
    blocks = pixels.reshape(rows, side, cols, side, 3)
    contrast = blocks.std((1, 3)).mean(-1)
    colour = np.linalg.norm(blocks.mean((1, 3)) - pixels.mean((0, 1)), axis=-1)
    saliency = _smooth(_unit(contrast) + _unit(colour), passes=max(1, round(min(grid) / 16)))
    y = np.linspace(-1, 1, rows)[:, None] if rows > 1 else np.zeros((1, 1))
    x = np.linspace(-1, 1, cols)[None, :] if cols > 1 else np.zeros((1, 1))
    centred = saliency * np.exp(-0.7 * (y * y + x * x)) + 1e-3
    weights = (centred**2).astype(np.float32).reshape(-1)
    return torch.from_numpy(weights / weights.sum())


@lru_cache(maxsize=8)
def _projection(fan_in: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(fan_in, dim, generator=generator) / math.sqrt(fan_in)


def _resize(image: np.ndarray, grid: Grid, side: int) -> np.ndarray:
    """float32 ``[rows * side, cols * side, 3]`` in 0..1."""
    from PIL import Image

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
    rows, cols = grid
    if rows < 1 or cols < 1:
        raise ValueError(f"grid must be positive, got {rows}x{cols}")
    resized = Image.fromarray(image).resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32) / 255


def _unit(values: np.ndarray) -> np.ndarray:
    """Scaled so that the 95th percentile is 1: one glaring patch must not flatten the rest."""
    return np.clip(values / (np.quantile(values, 0.95) + 1e-6), 0, 1)


def _smooth(values: np.ndarray, passes: int) -> np.ndarray:
    for _ in range(passes):
        padded = np.pad(values, 1, mode="edge")
        rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
        values = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return values
