"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from . import checks, native, triton_ops

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
READY = "ready"
OLDEST_TRITON = (3, 6)


def _triton_status() -> str:
    """Found without importing Triton, which takes seconds, and without asking for a GPU, which breaks a later fork."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if find_spec("triton") is None:
        return f"triton not installed: pip install 'triton>={oldest}'"
    try:
        found = version("triton")
    except PackageNotFoundError:  # builds for other vendors' GPUs go by other names and come with their torch
        return READY
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
        return f"triton {found} is too old: pip install 'triton>={oldest}'"
    return READY


native.load()  # here, so that tracing a selector finds the operators registered and the answer known
_status = {
    "cuda": "not built yet: this version of flashprune has no CUDA selection kernels",
    "triton": _triton_status(),
    "cpu": native.cpu_status(),
    "reference": READY,
}
_warned: set[str] = set()


def backends() -> dict[str, str]:
    """Every backend with ``"ready"`` or the reason why it cannot run here, fastest first.

    >>> backends()["reference"]
    'ready'
    """
    return {backend: _readiness(backend) for backend in _status}


def resolve(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs an operator, such as ``mmr_select``, on tensors of this device and dtype.

    ``"auto"`` takes the fastest that can; where that is only the reference it warns, once for each reason. Any other
    name is taken at its word: RuntimeError if that backend is not ready, ValueError if it does not take such tensors.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        return _automatic(op, device, dtype)
    reason = _unable(backend, op)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    refusal = _refusal(backend, device, dtype)
    if refusal:
        raise ValueError(f"backend={backend!r} cannot run: {refusal}")
    return backend


def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> str:
    candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = []
    for backend in candidates:
        reason = _unable(backend, op) or _refusal(backend, device, dtype)
        if not reason:
            return backend
        reasons.append(f"{backend}: {reason}")
    _warn_once(f"flashprune runs its slow reference on {device.type} tensors ({'; '.join(reasons)})")
    return "reference"


def _readiness(backend: str) -> str:
    if backend == "triton" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return _status[backend]


def _unable(backend: str, op: str) -> str:
    """Why a backend cannot run an operator here, whatever the tensors; empty if it can."""
    status = _readiness(backend)
    if status != READY:
        return status
    return triton_ops.missing_kernel(op) if backend == "triton" else ""


def _refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend that is ready does not take such tensors; empty if it does."""
    if backend == "reference":
        return ""
    takes = "cpu" if backend == "cpu" else "cuda"
    if device.type != takes:
        return f"it takes {takes} tensors, got {device}; move them or choose another backend"
    if dtype == torch.float64:
        return "it takes float32, float16 and bfloat16, got float64; convert, or choose backend='reference'"
    return ""


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=5)
