"""The `flashprune` command. Its libraries, those of the `cli` extra, load on first use."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # and no other failure of the system
_EXTRA = {"typer", "rich", "PIL", "skimage", "matplotlib"}


def main() -> None:
    """Entry point of the `flashprune` command."""
    try:
        from .model_commands import app

        try:
            app(prog_name="flashprune")
        finally:
            sys.stdout.flush()  # here, where an error can still be told
    except OSError as error:
        if error.errno not in _FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes nowhere
        print(f"flashprune: error: cannot write: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(f"flashprune: error: {missing} is not installed; run: pip install flashprune[cli]", file=sys.stderr)
        sys.exit(2)


def __getattr__(name: str) -> Any:
    if name == "app":
        from .model_commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
