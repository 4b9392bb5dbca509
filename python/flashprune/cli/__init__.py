"""The `flashprune` command. Its libraries, those of the `cli` extra, load on first use."""

from __future__ import annotations

import sys
from typing import Any

_EXTRA = {"typer", "rich", "PIL", "skimage", "matplotlib"}


def main() -> None:
    """Entry point of the `flashprune` command."""
    try:
        from .model_commands import app

        app(prog_name="flashprune")
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
