"""The one reader of the user's images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import files
from .console import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Modes of more than 8 bits, which Pillow would cut off at 255, and the highest value that an image of each holds.
_DEEP = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}


def read_image(path: Path) -> np.ndarray:
    """The image, upright, as uint8 ``[height, width, 3]``; what is transparent shows white.

    Images of 16 bits are scaled from 0..65535, those of 32 bits as well, and floating-point ones from 0..1.

    Raises:
        InputError: there is no such file, Pillow cannot decode the whole of it, or values are out of these ranges.
    """
    from PIL import Image, ImageOps

    files.must_be_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                return np.asarray(_grey(upright) if upright.mode in _DEEP else _opaque(upright))
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image (nor .npz or .safetensors with features)") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on corrupt data
        raise InputError(f"{path} cannot be decoded as an image: {error or type(error).__name__}") from None


def _opaque(image: Image) -> Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    from PIL import Image

    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")


def _grey(image: Image) -> Image:
    """An image of one channel of more than 8 bits."""
    from PIL import Image

    values, highest = np.asarray(image).astype(np.float64), _DEEP[image.mode]
    if not ((values >= 0) & (values <= highest)).all():  # nor is NaN
        numbers = values[~np.isnan(values)]
        found = f"{numbers.min():g} to {numbers.max():g}" if numbers.size else "none"
        also = " and NaN" if numbers.size < values.size else ""
        raise ValueError(f"values of mode {image.mode} must lie in 0..{highest}, got {found}{also}")
    grey = np.round(values * (255 / highest)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
