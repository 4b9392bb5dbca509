"""Where vLLM and SGLang start flashprune's plugins, outside the package: if that cannot be imported, engines must stop.

Engines log what a plugin raises while it is loaded and go on without it: a server that was to prune, and does not.
"""

from __future__ import annotations

import os
from importlib import import_module

_PREFIX = "FLASHPRUNE_VIDEO_"


def vllm() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    _register("vllm")


def sglang() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    _register("sglang")


def _register(engine: str) -> None:
    """`flashprune.integrations.<engine>.register`; where no setting asks for it, nothing is imported.

    Raises SystemExit with one line, whatever goes wrong.
    """
    if not any(name.startswith(_PREFIX) and value for name, value in os.environ.items()):
        return
    try:
        import_module(f"flashprune.integrations.{engine}").register()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"flashprune: cannot prune in {engine}: {reason}") from error
