"""Peak extra memory of one call, measured in a process of its own.

Figure: highest resident set (``VmHWM``) after the call, minus the resident set before it, with the inputs resident and
the library warmed up on 64 tokens. ``ru_maxrss`` will not do: Linux carries the parent's peak over ``exec``, so a large
parent hides the child. Where something before the call had peaked higher, the figure is too large, never too small.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case, inputs_of
from .machine import ROOT
from .ops import race_of
from .race import OURS

WARM_UP_TOKENS = 64
MB = 1_000_000


def supported() -> bool:
    return Path("/proc/self/status").exists()


def peak_extra_mb(case: Case, backend: str, variant: str = OURS) -> float:
    """Megabytes (10⁶ bytes) that the call adds to the process at its highest."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        torch.save({"case": vars(case), "inputs": inputs_of(case)}, file)
        command = [sys.executable, "-m", f"{__package__}.memory", str(file), backend, variant]
        # `benchmarks` is importable from the root of a checkout only, `flashprune.benchmarks` from anywhere
        where = ROOT if __package__ == "benchmarks" else None
        child = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"memory of {variant} on {case}: {child.stderr.strip().splitlines()[-1]}")
    return float(child.stdout) / MB


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def _return_free_memory() -> None:
    """Freed pages that glibc keeps would count as resident before the call, and hide what it then takes from them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _child(file: str, backend: str, variant: str) -> None:
    saved = torch.load(file, weights_only=True)
    case, inputs = Case(**saved["case"]), saved["inputs"]
    tiny = replace(case, n=WARM_UP_TOKENS, k=WARM_UP_TOKENS // 8)
    race_of(tiny, {name: x[:WARM_UP_TOKENS] for name, x in inputs.items()}, backend).variants[variant]()

    call = race_of(case, inputs, backend).variants[variant]
    _return_free_memory()
    before = _status_bytes("VmRSS")
    call()
    print(_status_bytes("VmHWM") - before)


if __name__ == "__main__":
    _child(*sys.argv[1:])
