"""How kernels are launched: what they are compiled for, and the arithmetic of a grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

INTERPRETED = triton.knobs.runtime.interpret  # whose bfloat16 is silently wrong unless loads are converted
ALIGNMENT = 16  # what Triton compiles a form of its own for

# The integers whose divisibility decides how rows are loaded, and which a model fixes.
# fmt: off
SPECIALIZED = frozenset((
    "D", "item_stride", "row_stride", "stride_n", "stride_qr", "stride_qh", "stride_qn", "stride_kl", "stride_kh",
    "stride_kn", "stride_lr", "stride_ln", "stride_pn", "stride_visual",
))
# fmt: on


def _let_the_interpreter_loop() -> None:
    """Triton 3.6's interpreter makes `range(n)` of an argument from an array of one element, as NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index


if INTERPRETED:
    _let_the_interpreter_loop()


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a kernel that is launched: one form whatever the counts and flags.

    Triton compiles another form where an integer is 1 or a multiple of 16. Counts change from call to call, so of the
    integers only those of `SPECIALIZED` may do that.
    """
    parameters = inspect.signature(function).parameters.values()
    counts = [
        p.name
        for p in parameters
        if "constexpr" not in str(p.annotation) and not p.name.endswith("_ptr") and p.name not in SPECIALIZED
    ]
    return triton.jit(function, do_not_specialize=counts)


def padded(count: int) -> int:
    """At least so many 4-byte elements: a row behind such a row begins at an aligned address, as Triton may expect."""
    return count + -count % ALIGNMENT


def cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which takes microseconds on the host."""
    return -(-a // b)
