"""The native libraries: loading them, and saying in one line why one is not there.

Nothing here raises because a library is missing: `import flashprune` works without any, and `flashprune info` shows the
reasons that are kept here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_facts", "cpu_status", "cuda_status", "device_facts", "load"]

READY = "ready"
OLDEST_CAPABILITY = (8, 0)
DEVICE_FACTS = ("compiled_for", "device", "multiprocessors", "shared_memory", "l2_cache", "driver")

_PACKAGE = Path(__file__).resolve().parent
_NOT_BUILT = "not built (pure-Python install): reinstall flashprune with a C++ compiler and without FLASHPRUNE_NATIVE=0"


def load() -> bool:
    """Load the native libraries, once: the CPU library, and the CUDA library under a CUDA build of torch.

    Returns:
        Whether the operators of the CPU library are registered under `torch.ops.flashprune`.

    Examples:
        >>> from flashprune import native
        >>> native.load() == (native.cpu_status() == "ready")
        True
    """
    _load_cuda()
    return _load_cpu() == READY


def cpu_status() -> str:
    """`"ready"`, or one line: why the CPU library is not loaded and what to do.

    Examples:
        >>> from flashprune import native
        >>> len(native.cpu_status().splitlines())
        1
    """
    return _load_cpu()


def cuda_status() -> str:
    """`"ready"`, or one line: why the CUDA library cannot run here and what to do.

    Ready means that the library is loaded and that the driver and the current CUDA device can run it; asking
    initialises CUDA.

    Examples:
        >>> from flashprune import native
        >>> len(native.cuda_status().splitlines())
        1
    """
    status = _load_cuda()
    if status != READY:
        return status
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    status = capability_status()
    return _driver_status(*_cuda_versions()) if status == READY else status


def capability_status() -> str:
    """`"ready"`, or one line: why the current NVIDIA GPU is too old. Initialises CUDA.

    Examples:
        >>> import torch
        >>> from flashprune import native
        >>> if torch.cuda.is_available():
        ...     assert len(native.capability_status().splitlines()) == 1
    """
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return "GPU too old: compute capability {}.{}, and 8.0 or later is needed".format(*capability)
    return READY


def build_facts() -> dict[str, Any]:
    """What the native code was built from; empty for a pure-Python install.

    Returns:
        A new dict: `version`, `system`, `compiler`, `instruction_sets`, `torch` (version of the headers),
        `torch_target` (oldest torch that the libraries load on), `nvcc`, `cuda_architectures`, and `cuda_missing` (why
        there is no CUDA library). `nvcc` and `cuda_missing` are None where they do not apply.

    Examples:
        >>> from flashprune import native
        >>> isinstance(native.build_facts(), dict)
        True
    """
    facts = _PACKAGE / "build_facts.json"
    return json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}


def device_facts(device: torch.device | str | int | None = None) -> dict[str, int]:
    """Launch the CUDA library's smallest kernel on a device and return what it tells. Synchronises.

    Args:
        device: a CUDA device; None is the current one.

    Returns:
        `compiled_for` and `device` (compute capabilities of the code that ran and of the card, 90 for 9.0),
        `multiprocessors`, `shared_memory` (bytes a thread block may use), `l2_cache` (bytes), `driver` (the newest CUDA
        that the driver supports, 13000 for 13.0).

    Raises:
        RuntimeError: the CUDA library cannot run here; the message is `cuda_status()`.

    Examples:
        >>> from flashprune import native
        >>> if native.cuda_status() == "ready":
        ...     assert native.device_facts()["compiled_for"] >= 80
    """
    status = cuda_status()
    if status != READY:
        raise RuntimeError(f"flashprune's CUDA library: {status}")
    like = torch.empty(0, device=torch.device("cuda") if device is None else torch.device(device))
    return dict(zip(DEVICE_FACTS, torch.ops.flashprune.device_facts(like).tolist(), strict=True))


@functools.cache
def _load_cpu() -> str:
    return _load_library("libflashprune_cpu.so", _NOT_BUILT)


@functools.cache
def _load_cuda() -> str:
    missing = build_facts().get("cuda_missing")
    if missing is not None:
        return (
            f"not built ({missing}): reinstall flashprune where the CUDA toolkit, 12.8 or later, is found, "
            "with FLASHPRUNE_CUDA=all for every GPU"
        )
    # The library refers to symbols that only a CUDA build of torch has.
    if (_PACKAGE / "libflashprune_cuda.so").exists() and torch.version.cuda is None:
        return f"built, but torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    return _load_library("libflashprune_cuda.so", _NOT_BUILT)


def _cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the driver supports and that of the runtime inside the library: 13000 for 13.0."""
    return torch.ops.flashprune.driver_version(), torch.ops.flashprune.runtime_version()


def _driver_status(driver: int, runtime: int) -> str:
    """A runtime runs on every driver of its major version, and on later ones; torch may carry an earlier runtime."""
    if driver // 1000 >= runtime // 1000:
        return READY
    needs, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"driver too old: it supports CUDA {has}, and the library has the runtime of CUDA {needs}: "
        f"update the driver, or reinstall flashprune with an nvcc of CUDA {driver // 1000}"
    )


def _load_library(name: str, missing: str) -> str:
    path = _PACKAGE / name
    if not path.exists():
        return missing
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"{name} does not load under torch {torch.__version__} ({reason}): reinstall flashprune"
    return READY
