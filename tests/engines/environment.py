"""Makes the environment of the engines' tests, `.venv-engines`, or finds it made; prints what it took.

It holds the engines and what they import; torch, flashprune and the rest come from the environment that runs this.

    .venv/bin/python -m tests.engines.environment && .venv-engines/bin/python -m pytest tests/engines
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv-engines"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")


def main() -> None:
    if sys.version_info < (3, 11):
        raise SystemExit("vLLM and SGLang need Python 3.11 or later; make one with: make PYTHON=python3.11")
    for group in GROUPS:
        if "flashprune" not in entry_points(group=group).names:
            raise SystemExit(f"the installed flashprune has no entry point {group}: make build")
    packages = sysconfig.get_path("purelib")
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + packages.encode() + sys.version.encode()).hexdigest()
    stamp = PLACE / "requirements.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{PLACE.name} is there")
        return
    started = time.monotonic()
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE, symlinks=True)
    python = PLACE / "bin" / "python"
    # Without the project's constraints: an engine may need another version.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-warn-conflicts"]
    subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True, env=environment)
    [own] = PLACE.glob("lib/python*/site-packages")
    # As a site directory, so that the files in it that tell of editable installs are read too; after the engines' own.
    (own / "project.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    stamp.write_text(wanted)
    print(f"made {PLACE.name} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
