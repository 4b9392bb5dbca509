"""Reading the user's feature files: names, types, shapes and sizes first, then the data."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import files
from .console import InputError

SUFFIXES = (".npz", ".safetensors")
_ENTRIES = ("features", "importance", "grid")
_HEADER = 1 << 16  # bytes; NumPy refuses more than 10,000
# Types of safetensors that are floating point, and their bytes; of .npz they are NumPy's.
_FLOATING = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


class FeatureFile(NamedTuple):
    """``features`` float [N, D]; ``importance`` float [N] or None; ``grid`` (h, w) or (t, h, w) or None."""

    features: torch.Tensor
    importance: torch.Tensor | None
    grid: tuple[int, ...] | None


class _Entry(NamedTuple):
    """What a file says of an array before the array is read."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def bytes(self) -> int:
        """Held at once: the values of the file, and as float32 those that no backend takes as they are."""
        stored = _FLOATING.get(self.dtype, 8)
        return math.prod(self.shape) * (stored + (0 if self.dtype in ("float32", "float16", "bfloat16") else 4))


class _Archive(NamedTuple):
    """A file's entries by name, those of other names without their facts, and what reads one of ours."""

    entries: Mapping[str, _Entry | None]
    read: Callable[[str], torch.Tensor]


def read_features(path: Path, importance_for: str = "") -> FeatureFile:
    """Read ``.npz`` or ``.safetensors`` holding ``features`` and, if there, ``importance`` and ``grid``.

    float64 becomes float32, the precision in which every backend works. Values that decide nothing (NaN, infinite, too
    large for float32) get a warning.

    Args:
        importance_for: a method that needs an importance.

    Raises:
        InputError: there is no such file, it is corrupt, an entry is missing or has a wrong shape or type, or the
            memory does not hold it; all but damaged data is found before tokens are read.
    """
    files.must_be_file(path)
    kind = "npz" if path.suffix.lower() == ".npz" else "safetensors"
    try:
        archive = _open_npz(path) if kind == "npz" else _open_safetensors(path)
    except Exception as error:  # zip, zlib, header parsers and safetensors each raise their own on corrupt data
        raise _unreadable(path, kind, error) from None
    held = {name: entry for name in _ENTRIES if (entry := archive.entries.get(name)) is not None}
    if "features" not in held:
        names = ", ".join(sorted(archive.entries)[:8]) or "nothing"
        raise InputError(f"{path} has no entry named features (it holds {names})")

    def read(name: str) -> torch.Tensor | None:
        try:
            return archive.read(name) if name in held else None
        except Exception as error:  # as above
            raise _unreadable(path, kind, error) from None

    _check_shapes(path, held)
    grid = _grid(path, read("grid"), held["features"].shape[0])
    if importance_for and "importance" not in held:
        raise InputError(f"{path} has no entry named importance, which {importance_for} needs (divprune works without)")
    _check_memory(path, held)
    features, importance = (_working(read(name)) for name in ("features", "importance"))
    assert features is not None
    _say_what_decides_nothing(path, features, importance)
    return FeatureFile(features, importance, grid)


def _open_npz(path: Path) -> _Archive:
    entries: dict[str, _Entry | None] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            entries[name] = None
            if name in _ENTRIES:  # a stranger's archive may hold more, of types that torch lacks
                with archive.open(member) as file:
                    entries[name] = _npy_header(file.read(_HEADER))

    def read(name: str) -> torch.Tensor:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    return _Archive(entries, read)


def _npy_header(head: bytes) -> _Entry:
    file = io.BytesIO(head)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"array of format {version}, which holds no numbers alone")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    return _Entry(dtype.name, shape)


def _open_safetensors(path: Path) -> _Archive:
    from safetensors import safe_open

    entries: dict[str, _Entry | None] = {}
    with safe_open(path, framework="pt") as archive:
        for name in archive.keys():  # noqa: SIM118 (not a mapping)
            entries[name] = None
            if name in _ENTRIES:
                facts = archive.get_slice(name)
                dtype = facts.get_dtype()
                entries[name] = _Entry(_SAFETENSORS.get(dtype, dtype), tuple(facts.get_shape()))

    def read(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as archive:
            tensor: torch.Tensor = archive.get_tensor(name)
            return tensor

    return _Archive(entries, read)


def _unreadable(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable .{kind} file: {str(error) or type(error).__name__}")


def _check_shapes(path: Path, held: Mapping[str, _Entry]) -> None:
    features = held["features"]
    if features.dtype not in _FLOATING or len(features.shape) != 2:
        raise InputError(f"{path}: features must be float [N, D], got {features}")
    if 0 in features.shape:
        raise InputError(f"{path}: features must be float [N, D] with N, D >= 1, got {list(features.shape)}")
    tokens, importance = features.shape[0], held.get("importance")
    if importance is not None and (importance.dtype not in _FLOATING or len(importance.shape) != 1):
        raise InputError(f"{path}: importance must be float [{tokens}], got {importance}")
    if importance is not None and importance.shape != (tokens,):
        raise InputError(f"{path}: importance must be [{tokens}] like features, got {list(importance.shape)}")
    grid = held.get("grid")
    if grid is not None and (grid.shape not in ((2,), (3,)) or not grid.dtype.startswith(("int", "uint"))):
        raise _wrong_grid(path, tokens, str(grid))


def _check_memory(path: Path, held: Mapping[str, _Entry]) -> None:
    from ..benchmarks import machine

    needed, free = sum(entry.bytes() for entry in held.values()), machine.free_bytes()
    if free is not None and needed > free:
        size = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise InputError(f"{path}: features {held['features']} take {size}")


def _working(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dtype in (torch.float16, torch.bfloat16) else tensor.float()


def _say_what_decides_nothing(path: Path, features: torch.Tensor, importance: torch.Tensor | None) -> None:
    squares = torch.cat([part.float().square().sum(-1) for part in features.split(4096)])
    lost = int((~squares.isfinite()).sum())
    if lost:
        warnings.warn(
            f"{path}: features of {lost} of {len(features)} tokens are NaN, infinite, or too large for float32 to hold "
            "their squares: which of these tokens are kept means nothing",
            stacklevel=3,
        )
    lost = 0 if importance is None else int(importance.isnan().sum())
    if lost:
        warnings.warn(f"{path}: importance of {lost} of {len(features)} tokens is NaN: they come last", stacklevel=3)


def _grid(path: Path, tensor: torch.Tensor | None, tokens: int) -> tuple[int, ...] | None:
    if tensor is None:
        return None
    sides = tuple(int(side) for side in tensor.tolist())
    if min(sides) < 1 or math.prod(sides) != tokens:
        raise _wrong_grid(path, tokens, "x".join(map(str, sides)))
    return sides


def _wrong_grid(path: Path, tokens: int, got: str) -> InputError:
    return InputError(f"{path}: grid must be integers (h, w) or (t, h, w) that multiply to N={tokens}, got {got}")
