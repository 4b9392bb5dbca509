"""The commands that run a model: arguments and help texts. The work is in the module named after each command."""

from __future__ import annotations

from .commands import app

__all__ = ["app"]
