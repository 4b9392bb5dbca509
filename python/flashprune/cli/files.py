"""Files of the user: what can be read, and where results go."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from .. import outputs
from .console import InputError, stdout

STANDARD_OUTPUT = Path("-")


def check_output(path: Path, option: str, *others: Path | None, suffix: str = "") -> None:
    """Refuse an output that cannot be written, before any work is done.

    ``-`` is standard output; devices and pipes may have any name.

    Raises:
        InputError: wrong suffix, missing folder, a folder in the way, or the same file as one of ``others``.
    """
    if any(other is not None and _same_file(path, other) for other in others):
        raise InputError(f"{option}: {path} is also the input or another output")
    if _descriptor(path) is not None:
        return
    if path.exists() and not path.is_file():
        mode = path.stat().st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
            raise InputError(f"{option}: {path} exists and is not a regular file")
    elif suffix and path.suffix.lower() != suffix:
        raise InputError(f"{option} must end in {suffix}, got {path}")
    elif not path.parent.is_dir():
        raise InputError(f"{option}: there is no folder {path.parent}")
    elif not os.access(path.parent, os.W_OK):
        raise InputError(f"{option}: the folder {path.parent} is not writable")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{option}: {path} is not writable")


def check_folder_name(path: Path, option: str) -> None:
    """Refuse ``-`` where several files are written.

    Raises:
        InputError: it is.
    """
    if path == STANDARD_OUTPUT:
        raise InputError(f"{option} is a folder for several files, which standard output (-) cannot be")


def write_whole(path: Path, data: bytes) -> None:
    """Write an output, whole or not at all; see :func:`flashprune.outputs.write_whole`.

    Standard output, and a path that stands for an open file (``/dev/stdout``, ``/dev/fd/3``), is written from where it
    stands, also if it is a regular file.

    Raises:
        InputError: the file system refuses.
    """
    try:
        descriptor = _descriptor(path)
        if descriptor is None:
            outputs.write_whole(path, data)
        elif descriptor == 1:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        else:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
    except BrokenPipeError:
        raise  # whoever read it has seen enough
    except OSError as error:
        raise InputError(f"cannot write {name_of(path)}: {error.strerror or error}") from None


def is_regular(path: Path) -> bool:
    """Whether an output is a file of its own, beside which others can lie."""
    return _descriptor(path) is None and (path.is_file() or not path.exists())


def name_of(path: Path) -> str:
    return "standard output" if _descriptor(path) == 1 else str(path)


def screen(*results: Path | None) -> Console:
    """Where a summary goes: standard error if one of the outputs is standard output."""
    taken = any(path is not None and _descriptor(path) == 1 for path in results)
    return Console(stderr=True, highlight=False, markup=False, emoji=False) if taken else stdout()


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 ``[height, width, 3]`` as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def must_be_file(path: Path) -> None:
    """Refuse an input that cannot be read.

    Raises:
        InputError: there is no such file, it may not be read, or it is a folder or a device.
    """
    try:
        if path.is_file():
            with path.open("rb"):
                return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    raise InputError(f"{path} is not a regular file" if path.exists() else f"there is no file {path}")


def _same_file(path: Path, other: Path) -> bool:
    one, two = _descriptor(path), _descriptor(other)
    return one == two if one is not None or two is not None else os.path.realpath(path) == os.path.realpath(other)


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path stands for: 1 for ``-`` and for the file standard output goes to."""
    if path == STANDARD_OUTPUT:
        return 1
    try:
        if path.is_file() and os.path.samestat(path.stat(), os.fstat(1)):
            return 1
        for _ in range(4):  # /dev/stdout leads to /proc/self/fd/1, and that to the file itself
            if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
                return int(path.name)
            path = path.parent / os.readlink(path)
    except (OSError, ValueError):
        pass
    return None
