"""Builds flashprune: pyproject.toml holds the metadata, CMakeLists.txt the native code, this file joins them.

FLASHPRUNE_NATIVE=0 leaves out all native code (reference and Triton backends only), FLASHPRUNE_CUDA=0 the CUDA library.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("FLASHPRUNE_NATIVE", "1") != "0"
PURE = "set FLASHPRUNE_NATIVE=0 for a pure-Python install (reference and Triton backends only)"
# Packages that lie beside python/ in a checkout, `flashprune bench` among them, and the modules that only serve there.
ELSEWHERE = {
    "flashprune.triton_kernels": "triton_kernels",
    "flashprune.benchmarks": "benchmarks",
    "flashprune.benchmarks.peers": "benchmarks/peers",
}
CHECKOUT_ONLY = {("flashprune.benchmarks", name) for name in ("conftest", "engines", "gpu", "gpu_models")}
OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
OLDEST_TORCH = (2, 11)  # the stable ABI that the libraries target


def say(line: str) -> None:
    print(f"flashprune: {line}", file=sys.stderr, flush=True)


def version_tuple(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def require_compiler() -> None:
    """Stop at once, in one sentence, when the machine cannot compile a Python extension."""
    compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise SystemExit(
            f"flashprune: no C++ compiler found (looked for {', '.join(compilers)}): install one (Debian, Ubuntu: "
            f"apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or {PURE}."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(
            f"flashprune: Python.h of {sys.executable} not found: install Python's headers (Debian, Ubuntu: "
            f"apt install python3-dev; Fedora: dnf install python3-devel), or {PURE}."
        )


def find_torch() -> tuple[Path, str]:
    """The directory and version of the torch to compile against, found without the seconds that importing it takes."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None or version_tuple(metadata.version("torch")) < OLDEST_TORCH:
        raise SystemExit(
            "flashprune: the native build needs torch >= 2.11 in the building environment: install torch==2.13.0, "
            f"or build without --no-build-isolation, or {PURE}."
        )
    return Path(spec.origin).parent, metadata.version("torch")


def find_nvcc() -> tuple[str | None, str]:
    """nvcc and its version, or None and the reason. The compiler decides, not whether a GPU is here."""
    if os.environ.get("FLASHPRUNE_CUDA", "1") == "0":
        return None, "FLASHPRUNE_CUDA=0"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    found = (shutil.which(place) for place in [*places, "nvcc", "/usr/local/cuda/bin/nvcc"] if place)
    nvcc = next((path for path in found if path), None)
    if nvcc is None:
        return None, "nvcc not found"
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"\bV(\d+\.\d+\.\d+)", answer)
    if release is None:
        return None, f"{nvcc} does not tell its version"
    if version_tuple(release[1]) < OLDEST_NVCC:
        return None, f"nvcc {release[1]} is older than {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    return nvcc, release[1]


class CMakeBuild(build_ext):
    """Builds the libraries and flashprune._build with CMake and Ninja, and puts them into the package directory."""

    def run(self) -> None:
        require_compiler()
        in_source = self.inplace or self.editable_mode
        tag = f"{'editable' if in_source else 'wheel'}-{sys.implementation.cache_tag}"
        self.cmake(ROOT / "build" / tag, self.package_dir(in_source), emulation=in_source)

    def package_dir(self, in_source: bool) -> Path:
        if in_source:
            return ROOT / self.get_finalized_command("build_py").get_package_dir("flashprune")
        return Path(self.build_lib, "flashprune").resolve()

    def cmake(self, build_dir: Path, package: Path, emulation: bool) -> None:
        try:
            import cmake
            import ninja
            import pybind11
        except ImportError as error:
            raise SystemExit(
                f"flashprune: the native build needs {error.name}: install cmake, ninja and pybind11, or build "
                f"without --no-build-isolation, or {PURE}."
            ) from None

        torch_dir, torch_version = find_torch()
        nvcc, answer = find_nvcc()
        if nvcc is None:
            say(f"no CUDA library ({answer}): CPU library and Triton only.")
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFLASHPRUNE_TORCH={torch_dir}",
            f"-DFLASHPRUNE_TORCH_VERSION={torch_version}",
            f"-DFLASHPRUNE_VERSION={self.distribution.get_version()}",
            f"-DFLASHPRUNE_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DFLASHPRUNE_EMULATION={'ON' if emulation else 'OFF'}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}" if nvcc else f"-DFLASHPRUNE_CUDA_MISSING={answer}",
        ]
        # A build directory outlives the environment it was made in (pip's build environments are temporary), and CMake
        # keeps what it first found: start anew whenever anything that it was told has changed.
        told = build_dir / "arguments.txt"
        said = "\n".join([*arguments, answer, *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS"))])
        if not told.exists() or told.read_text() != said:
            shutil.rmtree(build_dir, ignore_errors=True)
            build_dir.mkdir(parents=True)
            told.write_text(said)

        program = str(Path(cmake.CMAKE_BIN_DIR, "cmake"))
        call(program, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *arguments)
        call(program, "--build", build_dir)
        remove_libraries(package)
        call(program, "--install", build_dir, "--prefix", package)


def call(*command: str | Path) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"flashprune: the native build failed, see the messages above; mend that, or {PURE}.")


def remove_libraries(package: Path) -> None:
    """Libraries of an earlier build, perhaps with other options, must not be taken for this one's."""
    for pattern in ("libflashprune_*.so", "_build.*.so", "_emulation.*.so"):
        for library in package.glob(pattern):
            library.unlink()


class Build(build):
    """Native code first, so that a missing compiler is the first and only thing that the user reads."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # else modules since deleted end up in the wheel
        super().run()


class BuildPy(build_py):
    def run(self) -> None:
        if self.editable_mode and not NATIVE:
            remove_libraries(ROOT / "python" / "flashprune")
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] not in CHECKOUT_ONLY]


setup(
    packages=[*find_packages("python"), *ELSEWHERE],
    package_dir={"flashprune": "python/flashprune", **ELSEWHERE},
    ext_modules=[Extension("flashprune._build", sources=[])] if NATIVE else [],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "build_py": BuildPy},
)
