"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from . import checks, native, operators, triton_ops

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
READY = "ready"
INTERPRETER = "interpreter: TRITON_INTERPRET=1 lets backend='triton' run on CPU tensors too, slowly"
# Wide stages, which read everything once: those of the cuda backend are Triton kernels.
WIDE = ("query_attention", "received_attention", "evs_select", "vidcom2_select")
OLDEST_TRITON = (3, 6)
AMD_CHIPS = ("gfx942", "gfx950", "gfx1100")


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
_status: dict[str, str | None] = {
    "cuda": None,  # asked when needed: where there is a GPU that initialises CUDA, which breaks a later fork
    "triton": _triton_status(),
    "cpu": native.cpu_status(),
    "reference": READY,
}
_cuda_found: dict[str, str] = {}
_warned: set[str] = set()


def backends() -> dict[str, str]:
    """Every backend with ``"ready"`` or the reason why it cannot run here, fastest first.

    Under ``TRITON_INTERPRET=1`` Triton's begins with ``"interpreter"``: it runs where it is named, and only there.

    >>> backends()["reference"]
    'ready'
    """
    return {backend: _readiness(backend) for backend in _status}


def resolve(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs an operator, such as ``mmr_select``, on tensors of this device and dtype.

    ``"auto"`` takes the fastest that can; where that is only the reference it warns, once for each reason. Any other
    name is taken at its word: RuntimeError if that backend is not ready, ValueError if it does not take such tensors.
    ``"cuda"`` has its wide stages in Triton, so for those the answer is ``"triton"``. So it is for meta tensors under
    ``"auto"``: nothing runs, and those operators are registered in every installation.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "triton" if device.type == "meta" else _automatic(op, device, dtype)
    else:
        _insist(backend, op, device, dtype)
    return "triton" if backend == "cuda" and op in WIDE else backend


def unable(backend: str, op: str) -> str:
    """Why a backend cannot run an operator here, whatever the tensors; empty if it can."""
    status = _readiness(backend)
    if status not in (READY, INTERPRETER):
        return status
    if backend == "triton":
        return triton_ops.missing_kernel(op)
    if backend == "cuda" and op in WIDE:
        reason = unable("triton", op)
        return f"{op} is a Triton kernel there: {reason}" if reason else ""
    return operators.missing_kernel(op) if backend == "cuda" else ""


def _insist(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = unable(backend, op)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    refusal = _refusal(backend, device, dtype)
    if refusal:
        raise ValueError(f"backend={backend!r} cannot run: {refusal}")


def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> str:
    candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = []
    for backend in candidates:
        reason = unable(backend, op) or _refusal(backend, device, dtype)
        if not reason:
            return backend
        reasons.append(f"{backend}: {reason}")
    _warn_once(f"flashprune runs its slow reference on {device.type} tensors ({'; '.join(reasons)})")
    return "reference"


def _readiness(backend: str) -> str:
    status = _status[backend]
    if backend == "triton" and triton_ops.INTERPRETED and status == READY:
        return INTERPRETER
    if backend == "triton" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    if backend == "triton" and status == READY:
        return _gpu_status()
    return _cuda_status() if status is None else status


def _gpu_status() -> str:
    """Whether Triton compiles our kernels for this GPU, as the tests do ahead of time; kept once found."""
    if "gpu" not in _cuda_found:
        _cuda_found["gpu"] = _find_gpu()
    return _cuda_found["gpu"]


def _find_gpu() -> str:
    if torch.version.hip is None:
        return native.capability_status()
    chip = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    if chip not in AMD_CHIPS:
        return f"GPU not known: the kernels are compiled for {', '.join(AMD_CHIPS)} of AMD's, got {chip}"
    return READY


def _cuda_status() -> str:
    """Asked until it is ready, and then kept: asking takes microseconds, which is a share of a call."""
    if _cuda_found.get("status") != READY:
        _cuda_found["status"] = native.cuda_status()
    return _cuda_found["status"]


# As torch.compiler.assume_constant_result does, which imports the compiler and Triton for it: a graph that is traced
# asks once and keeps the answer.
for _asked in (_cuda_status, _gpu_status):
    vars(_asked)["_dynamo_marked_constant"] = True


def _refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend that is ready does not take such tensors; empty if it does."""
    if backend == "reference":
        return ""
    takes = "cpu" if backend == "cpu" else "cuda"
    if device.type != takes and not (backend == "triton" and triton_ops.INTERPRETED and device.type == "cpu"):
        return f"it takes {takes} tensors, got {device}; move them or choose another backend"
    if dtype == torch.float64:
        return "it takes float32, float16 and bfloat16, got float64; convert, or choose backend='reference'"
    return ""


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=5)
