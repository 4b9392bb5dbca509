"""What the CUDA library's kernels take of a GPU, read off the machine code for every architecture; no GPU is needed.

Run with `-s` to see registers, shared memory and stack of each. The shared memory that launches ask for is not in it;
from sm_90 on, 1,024 bytes are the system's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import defaultdict
from importlib import util
from pathlib import Path
from typing import NamedTuple

import pytest

from flashprune import native

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(native.__file__).parent / "libflashprune_cuda.so"
ARCHITECTURES = [name for name in native.build_facts().get("cuda_architectures", []) if name.startswith("sm_")]
TENSOR_CORES = (
    "all_pairs_kernel",
    "edges_kernel",
    "later_panels_kernel",
    "greedy_kernel",
    "dpp_kernel",
)  # multiply there


class Usage(NamedTuple):
    registers: int  # a thread
    shared: int  # bytes a block, static
    stack: int  # bytes a thread; spilled registers are here
    local: int


Kernels = dict[str, dict[str, Usage]]  # by name and architecture


def cuobjdump() -> str | None:
    triton = util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    return str(own) if own and own.exists() else shutil.which("cuobjdump")


def dump(*arguments: str) -> str:
    tool = cuobjdump()
    if not LIBRARY.exists():
        pytest.skip(f"no CUDA library: {native.cuda_status()}")
    if tool is None:
        pytest.skip("no cuobjdump: it comes with the triton package and with the CUDA toolkit")
    environment = {"PATH": str(Path(tool).parent)}  # nvdisasm is beside it
    return subprocess.run(
        [tool, *arguments, str(LIBRARY)], env=environment, capture_output=True, text=True, check=True
    ).stdout


def readable(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    name = demangle(mangled.encode(), None, None, ctypes.byref(ctypes.c_int()))
    if name is None:
        return mangled
    short = re.sub(r"\(anonymous namespace\)::|flashprune::|gpu::|^void |\(\w+\)(?=\d)", "", name.decode())
    return short.split("(")[0]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found: Kernels = defaultdict(dict)
    architecture = name = ""
    for line in dump("-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = readable(match[1])
        elif line.startswith("  REG:"):
            of = dict(re.findall(r"(\w+):(\d+)", line))
            found[name][architecture] = Usage(*(int(of[key]) for key in ("REG", "SHARED", "STACK", "LOCAL")))
    return dict(sorted(found.items()))


def base(name: str) -> str:
    return name.split("<")[0]


def test_every_kernel_is_there_for_every_architecture(kernels: Kernels) -> None:
    print_table(kernels)
    missing = [(name, sorted(set(ARCHITECTURES) - set(of))) for name, of in kernels.items()]
    assert not [entry for entry in missing if entry[1]]
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/**/*.cu*"))
    assert set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources)) == {base(name) for name in kernels}


def test_no_kernel_spills(kernels: Kernels) -> None:
    assert not {
        (name, architecture): usage
        for name, of in kernels.items()
        for architecture, usage in of.items()
        if usage.stack or usage.local
    }


def test_products_are_on_tensor_cores(kernels: Kernels) -> None:
    """For every type of features. One architecture: they all have the same PTX, and disassembling takes seconds."""
    multiplying = set()
    name = ""
    for line in dump("-sass", "-arch", ARCHITECTURES[0]).splitlines():
        if match := re.match(r"\s+Function : (\S+)", line):
            name = readable(match[1])
        elif "MMA." in line:
            multiplying.add((base(name), re.split("[<,>]", name)[1]))
    assert not {(name, dtype) for name in TENSOR_CORES for dtype in ("float", "Half", "BFloat16")} - multiplying


def print_table(kernels: Kernels) -> None:
    print(f"\n| kernel | {' | '.join(f'{name}: registers / shared / stack' for name in ARCHITECTURES)} |")
    print("|---" * (len(ARCHITECTURES) + 1) + "|")
    for name, of in kernels.items():
        cells = [f"{u.registers} / {u.shared} / {u.stack + u.local}" for u in map(of.get, ARCHITECTURES) if u]
        print(f"| {name} | {' | '.join(cells)} |")
