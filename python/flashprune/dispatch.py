"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import warnings

import torch

from . import checks, native

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
READY = "ready"

native.load()  # here, so that tracing a selector finds the operators registered and the answer known
_status = {
    "cuda": "not built yet: this version of flashprune has no CUDA selection kernels",
    "triton": "not built yet: this version of flashprune has no Triton kernels",
    "cpu": native.cpu_status(),
    "reference": READY,
}
_warned: set[str] = set()


def backends() -> dict[str, str]:
    """Every backend with ``"ready"`` or the reason why it cannot run here, fastest first.

    >>> backends()["reference"]
    'ready'
    """
    return dict(_status)


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs a selection on tensors of this device and dtype.

    ``"auto"`` takes the fastest that can; where that is only the reference it warns, once for each reason. Any other
    name is taken at its word: RuntimeError if that backend is not ready, ValueError if it does not take such tensors.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        return _automatic(device, dtype)
    if _status[backend] != READY:
        raise RuntimeError(f"backend={backend!r} cannot run: {_status[backend]}")
    refusal = _refusal(backend, device, dtype)
    if refusal:
        raise ValueError(f"backend={backend!r} cannot run: {refusal}")
    return backend


def _automatic(device: torch.device, dtype: torch.dtype) -> str:
    candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = []
    for backend in candidates:
        reason = _refusal(backend, device, dtype) if _status[backend] == READY else _status[backend]
        if not reason:
            return backend
        reasons.append(f"{backend}: {reason}")
    _warn_once(f"flashprune runs its slow reference on {device.type} tensors ({'; '.join(reasons)})")
    return "reference"


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
