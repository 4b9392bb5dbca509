"""Writes a project of Hugging Face's kernel-builder with flashprune's Triton kernels into a new folder.

    python hub/assemble.py DIR
    cd DIR && git init -q && git add . && nix run .#build-and-copy

The kernels are pure Python and import each other relatively, so this copies and nothing is compiled.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAME = "flashprune"


def assemble(target: Path) -> Path:
    """Writes the project; returns the folder of the kernel's Python package.

    Raises FileExistsError if `target` is there and not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    package = target / "torch-ext" / NAME
    package.mkdir(parents=True)
    for name in ("build.toml", "flake.nix"):
        shutil.copy(HERE / name, target)
    shutil.copy(HERE / "kernel.py", package / "__init__.py")
    shutil.copytree(
        HERE.parent / "triton_kernels", package / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python hub/assemble.py DIR")
    try:
        print(assemble(Path(sys.argv[1])))
    except OSError as error:
        raise SystemExit(f"assemble.py: {error}") from None
