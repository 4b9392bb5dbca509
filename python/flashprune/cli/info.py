"""`flashprune info`: what is installed, what runs here, and why the rest does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

import flashprune as fp

from .. import native
from . import console


def info() -> None:
    """Print versions, backends, build facts and the machine."""
    screen = console.stdout()
    sections = {"versions": _versions(), "backends": fp.backends(), "build": _build(), "machine": _machine()}
    for title, facts in sections.items():
        screen.print(_facts_table(title, facts))


def _versions() -> dict[str, str]:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", no CUDA"
    return {
        "flashprune": fp.__version__,
        "torch": torch.__version__ + ("" if "+" in torch.__version__ else cuda),
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
    }


def _build() -> dict[str, str]:
    facts = native.build_facts()
    if not facts:
        return {"native code": "none: a pure-Python install (reference and Triton only)"}
    return {name.replace("_", " "): _written(value) for name, value in facts.items()}


def _machine() -> dict[str, str]:
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": _cpu_name(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"GPU {index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    else:
        facts["GPU"] = "none that torch can use"
    return facts


def _facts_table(title: str, facts: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _written(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
