"""The emulated CUDA kernels under AddressSanitizer, with checks of alignment and integer overflow; needs GCC.

    python -m tests.sanitized [pytest arguments]

compiles csrc/emulation with the sanitizers into a temporary folder and runs pytest on it, by default all tests of the
emulated kernels. What lies out of bounds of shared memory, a workspace, an input or an output stops the run with a
report, and so do misaligned vectors and integers that overflow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "emulation"
COMPILER = "g++"
CHECKS = [
    "-fsanitize=address,alignment,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")  # to be there before Python's first allocation
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]


def missing() -> str | None:
    """Why the sanitizers cannot run here."""
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        return "needs Linux and g++"
    return next((f"g++ has no {name}" for name in LIBRARIES if not os.path.isabs(find(name))), None)


def find(library: str) -> str:
    answer = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def build(sources: Sequence[Path], folder: Path) -> None:
    """`_emulation`, compiled from some files of csrc/emulation, in `folder`."""
    import pybind11

    includes = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, *CHECKS, *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"_emulation{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, *CHECKS, "-shared", *objects, "-o", library], check=True)


def run(folder: Path, code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that finds `folder`'s flashprune._emulation before the regular one."""
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(find, LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    begin = f"import sys, flashprune; flashprune.__path__.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", begin + code, *arguments], cwd=ROOT, env=environment, **options)


def main() -> int:
    if reason := missing():
        print(f"not run: {reason}")
        return 0
    sources = sorted(path for path in SOURCES.glob("*.cpp") if path.stem != "dots")  # that one is the CPU engine's
    tests = [f"tests/test_cuda_{source.stem}.py" for source in sources]
    tests = [test for test in tests if (ROOT / test).exists()]
    tests += ["tests/test_cuda_offsets.py", "tests/test_emulation.py"]
    arguments = sys.argv[1:] or ["-q", "-m", "not slow", *tests]
    with tempfile.TemporaryDirectory() as folder:
        build(sources, Path(folder))
        code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        # A sanitizer's report would be lost with what pytest captures of the file descriptors.
        return run(Path(folder), code, "--capture=sys", "-p", "no:cacheprovider", *arguments).returncode


if __name__ == "__main__":
    sys.exit(main())
