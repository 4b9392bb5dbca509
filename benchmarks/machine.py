"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

import flashprune

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """Short hash of the checkout, with "+" where tracked files differ from it; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():  # installed, perhaps into an environment inside a checkout of something else
        return "unknown"
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts(device: str = "cpu") -> dict[str, str]:
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        **gpu,
        "cpu": cpu_model(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "flashprune": flashprune.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
