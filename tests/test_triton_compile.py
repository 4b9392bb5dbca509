"""Every shipped configuration of every Triton kernel, compiled ahead of time for each generation of GPUs it serves.

No GPU is needed: Triton brings its assembler. Run with `-s` to see registers and shared memory of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CHIPS = {"datacenter": (80, 90, 100), "consumer": (80, 120)}  # Triton generates the same for 8.6 and 8.9 as for 8.0
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a program may have
MATRIX_INSTRUCTIONS = {  # PTX
    80: ("mma.sync",),
    90: ("wgmma", "mma.sync"),
    100: ("tcgen05", "wgmma", "mma.sync"),
    120: ("mma.sync",),
}
PROCESSES = max(2, min(8, os.cpu_count() or 2))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """The facts of every variant on every chip; by processes of their own, since here Triton may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, __file__, str(i)], **pipes) for i in range(PROCESSES)]
    found = []
    for worker in workers:
        out, errors = worker.communicate()
        assert worker.returncode == 0, errors
        found += [json.loads(line) for line in out.splitlines()]
    return sorted(found, key=lambda facts: facts["number"])


def test_every_variant_compiles_and_fits(compiled: list[dict[str, Any]]) -> None:
    print_table(compiled)
    complaints = []
    for facts in compiled:
        problems = [facts["error"]] if "error" in facts else unfit(facts)
        complaints += [f"{facts['module']} {facts['name']} sm_{facts['chip']}: {problem}" for problem in problems]
    assert not complaints, "\n".join(complaints)


def unfit(facts: dict[str, Any]) -> list[str]:
    from flashprune.triton_kernels import configs

    chip, problems = facts["chip"], []
    if facts["spills"]:
        problems.append(f"spills {facts['spills']} bytes a thread to local memory")
    classes = [configs.SHARED_MEMORY[name] for name in facts["devices"] if chip in CHIPS[name]]
    limit = min(SHARED_MEMORY[chip], *classes)
    if facts["shared"] > limit:
        problems.append(f"needs {facts['shared']} bytes of shared memory, {limit} are there")
    if facts["tensor_cores"] and not facts["matrix"]:
        problems.append("claims tensor cores and does not use them")
    return problems


def test_every_kernel_file_ships_a_variant(compiled: list[dict[str, Any]]) -> None:
    from flashprune import triton_ops

    modules = {facts["module"] for facts in compiled}
    assert {op.removesuffix("_select") for op in triton_ops.KERNELS} <= modules
    assert {facts["chip"] for facts in compiled} == set(SHARED_MEMORY)
    assert {(80, "datacenter"), (120, "consumer")} <= {(f["chip"], name) for f in compiled for name in f["devices"]}


def print_table(compiled: list[dict[str, Any]]) -> None:
    """Registers a thread / kilobytes of shared memory / matrix instructions, by chip."""
    rows: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for facts in compiled:
        if "error" not in facts:
            matrix = f" {facts['matrix']}" if facts["matrix"] else ""
            rows[facts["module"], facts["name"]][facts["chip"]] = (
                f"{facts['registers']} / {facts['shared'] / 1024:.1f}{matrix}"
            )
    print("\n| kernel | " + " | ".join(f"sm_{chip}: registers / shared KiB" for chip in SHARED_MEMORY) + " |")
    print("|---" * (len(SHARED_MEMORY) + 1) + "|")
    for (module, name), cells in rows.items():
        print(f"| {module}: {name} | " + " | ".join(cells.get(chip, "") for chip in SHARED_MEMORY) + " |")


def compile_share(share: int) -> None:
    """Print the facts of every PROCESSES-th compilation, one JSON object a line."""
    import importlib
    import pkgutil

    from flashprune import triton_kernels

    variants = []
    for name in sorted(module.name for module in pkgutil.iter_modules(triton_kernels.__path__)):
        module = importlib.import_module(f"flashprune.triton_kernels.{name}")
        if hasattr(module, "variants"):
            variants += [(name, variant) for variant in module.variants()]
    work = [
        (name, variant, chip)
        for name, variant in variants
        for chip in sorted({chip for device in variant.devices for chip in CHIPS[device]})
    ]
    for number, (name, variant, chip) in enumerate(work):
        if number % PROCESSES == share:
            facts = {"number": number, "module": name, "name": variant.name, "chip": chip, "devices": variant.devices}
            print(json.dumps(facts | compile_one(variant, chip)), flush=True)


def compile_one(variant: Any, chip: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    multiples = {(variant.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = triton.compiler.ASTSource(
        fn=variant.kernel, signature=dict(variant.signature), constexprs=dict(variant.constexprs), attrs=multiples
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    except Exception as error:  # each failure is one line of the report
        return {"error": f"{type(error).__name__}: {error}"}
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "tensor_cores": variant.tensor_cores,
        "matrix": next((name for name in MATRIX_INSTRUCTIONS[chip] if name in ptx), ""),
        **resources(kernel.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes a thread has in local memory beyond its stack of arrays: what was spilled."""
    import re
    import tempfile

    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spills": stack + local}


if __name__ == "__main__":
    compile_share(int(sys.argv[1]))
