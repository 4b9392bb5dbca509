"""Where on the image a model's visual tokens lie: grids over the part that each covers, the finest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .photos import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..integrations.transformers import Item


# Families whose image is cut into tiles, and where the whole of it comes: before them or after.
_TILED = dict.fromkeys(("internvl", "qianfan_ocr", "aya_vision", "cohere2_vision", "idefics3", "smolvlm"), "after")
_TILED["ovis2"] = "before"
_PACKED = ("llava_next", "llava_next_video", "llava_onevision")  # the model itself puts the tiles together
_CROPPED = ("llava", "vipllava", "deepseek_vl", "deepseek_vl_hybrid", "janus")  # or padded to a square


@dataclass(frozen=True)
class Panel:
    """A grid of tokens over a part of the image.

    `box`: (left, top, right, bottom) of that part in pixels, beyond the image where the processor pads; `cells`: int64
    `[n]`, the raster index of each token of the item, -1 for those of other panels and for newlines.
    """

    name: str
    grid: Grid
    box: tuple[float, float, float, float]
    cells: Tensor

    def kept(self, kept: Tensor) -> Tensor:
        """int64, the raster indices of those of the item's tokens `kept` that are in this panel."""
        cells = self.cells[kept]
        return cells[cells >= 0]

    def picture(self, image: Image, longest: int) -> Image:
        """The part of the image, its longer side at most `longest` pixels."""
        from PIL import Image as images

        left, top, right, bottom = self.box
        shrink = min(1.0, longest / max(right - left, bottom - top))
        size = max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink))
        if (left, top) >= (0, 0) and right <= image.width and bottom <= image.height:
            return image.resize(size, images.Resampling.LANCZOS, box=self.box)
        whole = round(left), round(top), round(right), round(bottom)
        return image.crop(whole).resize(size, images.Resampling.LANCZOS)


def panels(model_type: str, processor: Any, size: tuple[int, int], item: Item) -> list[Panel]:
    """The panels of an item that is an image of `size` (width, height), as the processors of Transformers cut it.

    Tiles are put together, and a thumbnail of the whole image comes after them, wherever it stands in the prompt; the
    models of LLaVA-NeXT and LLaVA-OneVision put theirs together themselves. LLaVA-1.5, ViP-LLaVA, DeepSeek-VL and Janus
    see a square about the centre of the image. Every other plane, those of families that are registered too, is taken
    to show the whole image.
    """
    last = len(item.planes) - 1
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    if model_type in _TILED and last > 0:
        first = int(_TILED[model_type] == "before")
        columns = _columns(model_type, processor, size, last)
        return [_mosaic(item, columns, whole, first), _plane("thumbnail", item, 0 if first else last, whole)]
    if model_type in _PACKED and last == 1:
        return [_plane("tiles", item, 1, whole), _plane("base image", item, 0, whole)]
    if model_type in _CROPPED:  # a CLS token is the first plane
        return [_plane("image", item, last, _centre(processor.image_processor, size))]
    return [_plane(f"plane {t}" if last else "image", item, t, whole) for t in range(last + 1)]


def _plane(name: str, item: Item, t: int, box: tuple[float, float, float, float]) -> Panel:
    rows, columns = item.planes[t]
    plane, y, x = item.positions.long().unbind(1)
    cells = torch.where((plane == t) & (x < columns), y * columns + x, -1)
    return Panel(name, (rows, columns), box, cells)


def _columns(model_type: str, processor: Any, size: tuple[int, int], tiles: int) -> int:
    """How many tiles lie side by side: as a rule they divide the image nearest to its aspect ratio."""
    width, height = size
    if model_type in ("idefics3", "smolvlm"):
        return int(processor.image_processor.get_number_of_image_patches(height, width, {})[2])
    if model_type == "ovis2":  # tells no one but with an image
        from PIL import Image

        return int(processor.image_processor([Image.new("RGB", size)], crop_to_patches=True)["grids"][0][1])
    across = [n for n in range(1, tiles + 1) if tiles % n == 0]
    return min(across, key=lambda n: abs(width / height - n / (tiles // n)))


def _mosaic(item: Item, columns: int, box: tuple[float, float, float, float], first: int) -> Panel:
    """All tiles, from plane `first` on."""
    tiles, (h, w) = len(item.planes) - 1, item.planes[0]
    t, y, x = item.positions.long().unbind(1)
    t = t - first
    raster = (t // columns * h + y) * (columns * w) + t % columns * w + x
    shown = (t >= 0) & (t < tiles)
    return Panel("tiles", (tiles // columns * h, columns * w), box, torch.where(shown, raster, -1))


def _centre(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What is left of the image when it is padded to a square, resized and cropped at the centre, as asked for."""
    width, height = size
    if getattr(processor, "do_pad", False):
        width = height = max(size)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    wanted, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    if not (getattr(processor, "do_center_crop", False) and processor.do_resize and crop.get("height")):
        return (left, top, left + width, top + height)
    if wanted.get("shortest_edge"):
        x_scale = y_scale = wanted["shortest_edge"] / min(width, height)
    else:
        x_scale, y_scale = wanted["width"] / width, wanted["height"] / height
    seen_width, seen_height = crop["width"] / x_scale, crop["height"] / y_scale
    left, top = (size[0] - seen_width) / 2, (size[1] - seen_height) / 2
    return (left, top, left + seen_width, top + seen_height)
