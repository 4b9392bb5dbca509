"""Triton's launches without a GPU: what a call launches, and what each launch would be compiled to.

The launchers run, and so does all of Triton's own `JITFunction.run` up to the compiler; stand-ins take the places of
the driver, the compiler and the GPU's queue. Tensors may be on the meta device. For a process without
TRITON_INTERPRET, in which there would be no `JITFunction`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from flashprune.triton_kernels import configs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_numbers = itertools.count()


@dataclass(frozen=True)
class Form:
    """One form of a kernel, as a launch asks the compiler for it."""

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__.removesuffix('_kernel')}"

    @property
    def key(self) -> str:
        """Equal for forms that compile to the same."""
        parts = (self.name, self.signature, self.constants, self.attributes)
        return repr((*parts, self.options.num_warps, self.options.num_stages))

    @property
    def named(self) -> dict[str, Any]:
        """The constants by name, also the integers that are constant because they are 1."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    def compile(self, target: GPUTarget) -> Any:
        source = triton.compiler.ASTSource(
            self.kernel, signature=dict(self.signature), constexprs=dict(self.constants), attrs=dict(self.attributes)
        )
        return triton.compile(source, target=target, options=self.options.__dict__)


@dataclass(frozen=True)
class Launch:
    form: Form
    grid: tuple[int, ...]


class _Driver:
    """Says what Triton asks a driver before it launches."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """Stands for a compiled kernel and notes its launches."""

    function = packed_metadata = None

    def __init__(self, form: Form, launches: list[Launch]) -> None:
        self.form, self.launches = form, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        self.launches.append(Launch(self.form, (x, y, z)))


@contextmanager
def recorded(target: GPUTarget, device_class: str) -> Iterator[list[Launch]]:
    """The launches made inside, as if the current device were of this target and class (see `configs`)."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets its kernels in this process: unset TRITON_INTERPRET")
    launches: list[Launch] = []

    def compile_nothing(
        kernel: JITFunction,
        key: str,
        signature: dict[str, str],
        device: int,
        constants: dict[tuple[int, ...], Any],
        options: Any,
        attributes: dict[tuple[int, ...], Any],
        warmup: bool,
    ) -> _Compiled:
        compiled = _Compiled(Form(kernel, signature, constants, attributes, options), launches)
        kernel.device_caches[device][0][key] = compiled
        return compiled

    before = driver._active, JITFunction._do_compile, configs.device_class
    # a number of its own: Triton keeps what it compiled by device
    driver.set_active(_Driver(target, next(_numbers)))
    JITFunction._do_compile = compile_nothing
    configs.device_class = lambda device: device_class
    try:
        yield launches
    finally:
        driver._active, JITFunction._do_compile, configs.device_class = before
