"""Validation shared by the public functions and the reference.

Each check names the argument, what was expected and what came. Shapes and host values are checked always; the values of
``cu_seqlens`` only where reading them costs no synchronisation and no graph break (the operators check them as well).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Grid = tuple[int, int] | tuple[int, int, int]


def working_dtype(x: Tensor) -> torch.dtype:
    """The precision a selection computes in: float64 for float64 features, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, operations on the device of ``x`` keep the precision of their inputs, whatever autocast is around."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def no_grad(**tensors: Tensor) -> None:
    """Refuse tensors that require grad while grad mode is on: a selection has no gradient to give."""
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and a selection has no gradient: call it under torch.no_grad()")


def floating(name: str, x: Tensor) -> None:
    """A tensor of one of the dtypes that the library takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {_dtype(x)}")


def features(x: Tensor, name: str = "features") -> None:
    """``[N, D]`` or ``[B, N, D]``."""
    floating(name, x)
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be [N, D] or [B, N, D], got {shape(x)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have D >= 1, got {shape(x)}")
    no_grad(**{name: x})


def scores(x: Tensor, name: str = "scores") -> None:
    """``[N]`` or ``[B, N]``."""
    floating(name, x)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} must be [N] or [B, N], got {shape(x)}")
    no_grad(**{name: x})


def per_token(name: str, x: Tensor, like: Tensor, like_name: str = "features") -> None:
    """One floating value for each row of ``like``, on its device."""
    floating(name, x)
    if x.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} must be {shape(like[..., 0])}, one value for each row of {like_name} {shape(like)}, got {shape(x)}"
        )
    same_device(name, x, like, like_name)
    no_grad(**{name: x})


def same_device(name: str, x: Tensor, like: Tensor, like_name: str = "features") -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {x.device}")


def one_device(op: Any, arguments: Sequence[Any]) -> None:
    """All tensors of a direct call of an operator are on the device of the first, fake and meta ones included."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    device = tensors[0].device
    if all(x.device == device for x in tensors):
        return
    names = [argument.name for argument in op._schema.arguments]
    (first, _), *others = ((n, x) for n, x in zip(names, arguments, strict=False) if isinstance(x, Tensor))
    for name, x in others:
        same_device(name, x, tensors[0], first)


def budgets(k: Any, features: Tensor, cu_seqlens: Tensor | None, name: str = "features") -> list[int]:
    """``k`` as a list: one entry for ``[N, D]`` and ``[B, N, D]``, one a segment for packed ``[T, D]``.

    Checks ``cu_seqlens`` too, and that no ``k`` exceeds its segment.
    """
    if cu_seqlens is None:
        ks = [integer("k", k, 0)]
        check_fit(ks, [features.shape[-2]], "")
        return ks
    if features.ndim != 2:
        tokens = shape(features[..., 0])
        raise ValueError(f"{name} must be packed along one dimension when cu_seqlens is given, got tokens {tokens}")
    check_cu_seqlens(cu_seqlens, features, name)
    ks = per_segment("k", k, cu_seqlens.shape[0] - 1)
    if readable(cu_seqlens):
        check_fit(ks, cu_seqlens.diff().tolist())
    return ks


def check_fit(ks: list[int], sizes: list[int], where: str = " in segment {}") -> None:
    """No budget exceeds its segment's size."""
    for segment, (k, n) in enumerate(zip(ks, sizes, strict=True)):
        if k > n:
            raise ValueError(f"k={k} exceeds N={n}" + where.format(segment))


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, name: str = "features") -> None:
    """int32 ``[B + 1]`` on the device of packed ``x [T, …]``, from 0 up to T, never falling."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 tensor [B+1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {_dtype(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [B+1], got {shape(cu_seqlens)}")
    same_device("cu_seqlens", cu_seqlens, x, name)
    if readable(cu_seqlens):
        check_bounds(cu_seqlens.tolist(), x.shape[0])


def check_bounds(bounds: list[int], total: int) -> None:
    """The values of ``cu_seqlens``."""
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    for segment, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not fall, got {start} then {end} at segment {segment}")
    if bounds[-1] != total:
        raise ValueError(f"cu_seqlens must end at T={total}, got {bounds[-1]}")


def readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read for free: no device to wait for, no graph being traced, no fake."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not isinstance(x, FakeTensor) and get_proxy_mode() is None


def per_segment(name: str, value: Any, segments: int) -> list[int]:
    """A host int for all segments, or one for each, as a list of ``segments`` ints >= 0."""
    if not isinstance(value, list | tuple):
        return [integer(name, value, 0)] * segments
    if len(value) != segments:
        raise ValueError(f"{name} must be an int or one int a segment, expected {segments} values, got {len(value)}")
    return [integer(f"{name}[{i}]", v, 0) for i, v in enumerate(value)]


def integer(name: str, value: Any, least: int) -> int:
    """A host integer; tensors are refused because reading one would synchronise."""
    if not isinstance(value, int | Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a host int, got {_described(value)}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite host number in [least, most]."""
    if not isinstance(value, int | float | Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a host number, got {_described(value)}")
    result = float(value)
    if not -math.inf < result < math.inf:  # math.isfinite takes no symbolic float
        raise ValueError(f"{name}={value} must be finite")
    if not least <= result <= most:
        wanted = f"between {least:g} and {most:g}" if math.isfinite(most) else f"at least {least:g}"
        raise ValueError(f"{name}={value} must be {wanted}")
    return result


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_described(value)}")
    return value


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def shape(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _described(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Tensor | list | tuple) else f"{type(value).__name__} {value!r}"
