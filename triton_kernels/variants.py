"""What one compiled form of a kernel is, for the tests that compile every shipped form ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .configs import shipped


@dataclass(frozen=True)
class Variant:
    """One shipped configuration. `signature` gives each argument its Triton type: `*fp32`, `i32`, `constexpr`, ...

    `devices` are the classes of devices that it serves; `aligned` arguments are multiples of 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False
    devices: tuple[str, ...] = ("datacenter", "consumer")
    aligned: tuple[str, ...] = ()


def variants_of(
    name: str,
    kernel: Any,
    kind: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    tensor_cores: str = "",
    aligned: tuple[str, ...] = (),
) -> list[Variant]:
    """A kernel's forms in every configuration of its kind.

    `types` are those of the arguments that are neither i32 nor constants, with {dtype} for the inputs' data type;
    `tensor_cores` lists the data types whose products run there.
    """
    found = {}
    for dtype, config, devices in shipped(kind):
        own = {key: value for key, value in config.items() if key in kernel.arg_names}
        own_types = {key: type_.format(dtype=dtype) for key, type_ in types.items()}
        parts = [name, *([dtype] if own_types != types else []), *map(str, own.values())]
        full = "-".join(parts + ["aligned"] * bool(aligned))
        own |= constants or {}
        signature = {arg: "constexpr" if arg in own else own_types.get(arg, "i32") for arg in kernel.arg_names}
        warps, stages, products = config["num_warps"], config["num_stages"], dtype in tensor_cores.split()
        found[full, warps, stages] = Variant(full, kernel, signature, own, warps, stages, products, devices, aligned)
    return list(found.values())
