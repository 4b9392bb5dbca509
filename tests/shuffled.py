"""A pytest plugin, `-p tests.shuffled`: every product of matrices sums in an order of its own.

The host's BLAS decides in what order a sum is taken, and so its last bits, by processor, shape and alignment. Here no
two calls agree, so that a test that asks for bits which only a BLAS could promise fails on every machine. Meant are
PyTorch's products and those of Triton's interpreter: our own kernels keep to an order.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_calls = itertools.count()


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(next(_calls)))


def _matmul(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(product)
    def shuffled(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        if torch.compiler.is_compiling() or not (a.is_floating_point() and a.device.type == "cpu"):
            return product(a, b, **more)
        order = _order(a.shape[-1])
        return product(a[..., order], b[order] if b.ndim == 1 else b[..., order, :], **more)

    return shuffled


def _einsum(einsum: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(einsum)
    def shuffled(equation: str, a: Tensor, b: Tensor) -> Tensor:
        inputs, output = equation.replace("...", ".").split("->")
        left, right = inputs.split(",")
        for axis in set(left) & set(right) - set(output):
            i, j = left.index(axis) - len(left), right.index(axis) - len(right)
            order = _order(a.shape[i])
            a, b = a.index_select(i, order), b.index_select(j, order)
        return einsum(equation, a, b)

    return shuffled


def _dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(dot)
    def shuffled(builder: Any, a: Any, b: Any, *more: Any) -> Any:
        order = _order(a.data.shape[-1]).numpy()
        columns, rows = type(a)(a.data[..., order], a.dtype), type(b)(b.data[..., order, :], b.dtype)
        return dot(builder, columns, rows, *more)

    return shuffled


def pytest_configure(config: pytest.Config) -> None:
    for owner, name in ((torch, "matmul"), (torch, "bmm"), (torch.Tensor, "matmul"), (torch.Tensor, "__matmul__")):
        setattr(owner, name, _matmul(getattr(owner, name)))
    torch.einsum = _einsum(torch.einsum)
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import InterpreterBuilder

        InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
