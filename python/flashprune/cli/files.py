"""Reading the user's images and feature files, and writing results that are either whole or absent."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .console import InputError

FEATURE_SUFFIXES = (".npz", ".safetensors")
_ENTRIES = ("features", "importance", "grid")


class FeatureFile(NamedTuple):
    """``features`` float [N, D]; ``importance`` float [N] or None; ``grid`` (h, w) or (t, h, w) or None."""

    features: torch.Tensor
    importance: torch.Tensor | None
    grid: tuple[int, ...] | None


def read_image(path: Path) -> np.ndarray:
    """The image, upright, as uint8 ``[height, width, 3]``.

    Raises:
        InputError: there is no such file, or Pillow cannot decode the whole of it.
    """
    from PIL import Image, ImageOps

    _must_be_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image (nor .npz or .safetensors with features)") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on corrupt data
        raise InputError(f"{path} cannot be decoded as an image: {error}") from None


def read_features(path: Path) -> FeatureFile:
    """Read ``.npz`` or ``.safetensors`` holding ``features`` and, if there, ``importance`` and ``grid``.

    float64 becomes float32, the precision in which every backend works.

    Raises:
        InputError: there is no such file, it is corrupt, or an entry is missing or has a wrong shape or type.
    """
    _must_be_file(path)
    arrays = _read_npz(path) if path.suffix.lower() == ".npz" else _read_safetensors(path)
    if "features" not in arrays:
        held = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise InputError(f"{path} has no entry named features (it holds {held})")
    features = _floating(path, "features", arrays["features"], "[N, D]", 2)
    tokens = features.shape[0]
    if 0 in features.shape:
        raise InputError(f"{path}: features must be float [N, D] with N, D >= 1, got {list(features.shape)}")
    importance = None
    if "importance" in arrays:
        importance = _floating(path, "importance", arrays["importance"], f"[{tokens}]", 1)
        if importance.shape[0] != tokens:
            raise InputError(f"{path}: importance must be [{tokens}] like features, got {list(importance.shape)}")
    grid = _grid(path, arrays["grid"], tokens) if "grid" in arrays else None
    return FeatureFile(features, importance, grid)


def check_output(path: Path, option: str, *others: Path | None, suffix: str = "") -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        InputError: wrong suffix, missing folder, a folder in the way, or the same file as one of ``others``.
    """
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{option} must end in {suffix}, got {path}")
    if path.exists() and not path.is_file():
        raise InputError(f"{option}: {path} exists and is not a regular file")
    if not path.parent.is_dir():
        raise InputError(f"{option}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option}: the folder {path.parent} is not writable")
    if any(other is not None and _same_file(path, other) for other in others):
        raise InputError(f"{option}: {path} is also the input or another output")


def write_whole(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, then rename: a reader sees the old file or the new one, never half.

    Raises:
        InputError: the file system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 ``[height, width, 3]`` as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _must_be_file(path: Path) -> None:
    try:
        if path.is_file():
            with path.open("rb"):
                return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    raise InputError(f"{path} is not a regular file" if path.exists() else f"there is no file {path}")


def _read_npz(path: Path) -> Mapping[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a readable .npz file: not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            # only what is needed: a stranger's archive may hold more, of types that torch lacks
            arrays = {name: archive[name] if name in _ENTRIES else np.empty(0) for name in archive.files}
        native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
        return {name: torch.from_numpy(array) for name, array in native.items()}
    except Exception as error:  # zip, zlib, header parser and torch each raise their own on corrupt data
        raise InputError(f"{path} is not a readable .npz file: {error}") from None


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as archive:
            names = archive.keys()
            return {name: archive.get_tensor(name) if name in _ENTRIES else torch.empty(0) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable .safetensors file: {error}") from None


def _floating(path: Path, name: str, tensor: torch.Tensor, shape: str, ndim: int) -> torch.Tensor:
    if tensor.ndim != ndim or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{path}: {name} must be float {shape}, got {dtype} {list(tensor.shape)}")
    return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.float()


def _grid(path: Path, tensor: torch.Tensor, tokens: int) -> tuple[int, ...]:
    whole = tensor.ndim == 1 and tensor.shape[0] in (2, 3) and not tensor.is_floating_point()
    sides = tuple(int(side) for side in tensor.tolist()) if whole else ()
    if not sides or min(sides) < 1 or int(np.prod(sides, dtype=object)) != tokens:
        got = "x".join(map(str, sides)) if sides else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise InputError(f"{path}: grid must be integers (h, w) or (t, h, w) that multiply to N={tokens}, got {got}")
    return sides


def _same_file(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)
