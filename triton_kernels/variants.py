"""What one compiled form of a kernel is, for the tests that compile every shipped form ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One shipped configuration. `signature` gives each argument its Triton type: `*fp32`, `i32`, `constexpr`, ..."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False
