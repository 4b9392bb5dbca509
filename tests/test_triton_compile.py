"""What every launch of every Triton kernel compiles to, ahead of time, for each GPU that it serves.

No GPU is needed: Triton brings its assemblers. `make test` compiles the largest form of each kernel for one GPU,
`make test-all` every form for all and prints registers and shared memory of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import flashprune.triton_kernels
from flashprune.triton_kernels import configs
from tests.triton_launches import TARGETS, Launches

SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160, "gfx1100": 64}
SPILLING = ("gfx1100",)  # half the registers of the others, and float32 products without tensor cores
SOURCES = sorted(Path(flashprune.triton_kernels.__path__[0]).glob("*.py"))
KERNELS = [
    f"{path.stem}.{name}" for path in SOURCES for name in re.findall(r"@kernel\ndef (\w+)_kernel\(", path.read_text())
]


@pytest.fixture(scope="module")
def launches() -> Iterator[Launches]:
    process = Launches()
    yield process
    process.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_form(kernel: str, launches: Launches) -> None:
    check(launches.ask("compiled", kernel, "sm_90", ["bf16"]), "sm_90")


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_form(
    kernel: str, target: str, launches: Launches, record_property: Callable[[str, object], None]
) -> None:
    """Of AMD's GPUs those with the largest tiles, of half precision and of single."""
    found = launches.ask("compiled", kernel, target, ["bf16", "fp32"] if target.startswith("gfx") else [])
    for facts in found:
        if "error" not in facts:
            cells = facts["registers"], f"{facts['shared'] / 1024:.1f}", facts["matrix"]
            record_property("resources", f"| {kernel} | {facts['form']} | {target} | {' | '.join(map(str, cells))} |")
    check(found, target)


def check(found: list[dict[str, Any]], target: str) -> None:
    assert found
    complaints = []
    for facts in found:
        problems = [facts["error"]] if "error" in facts else unfit(facts, target)
        complaints += [f"{target} {facts['form']}: {problem}" for problem in problems]
    assert not complaints, "\n".join(complaints)


def unfit(facts: dict[str, Any], target: str) -> list[str]:
    problems = []
    if facts["spills"] and target not in SPILLING:
        problems.append(f"spills {facts['spills']} bytes a thread to memory")
    limit = min(SHARED_MEMORY[target] * 1024, configs.SHARED_MEMORY[facts["class"]])
    if facts["shared"] > limit:
        problems.append(f"needs {facts['shared']} bytes of shared memory, {limit} are there")
    if facts["products"] and not facts["matrix"]:
        problems.append("multiplies and uses no tensor cores")
    return problems


def test_every_kernel_and_every_configuration_is_launched(launches: Launches) -> None:
    found = launches.ask("reached")
    assert found["kernels"] == sorted(KERNELS)
    asked = {tuple(one) for one in found["configurations"]}
    for kind, (_, *rows) in configs.TABLE.items():
        for devices, dtypes, most, *_ in rows:
            for device in devices.split():
                assert any((kind, dtype, device, most) in asked for dtype in dtypes.split()), (kind, devices, most)
