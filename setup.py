"""Builds flashprune: pyproject.toml holds the metadata, CMakeLists.txt the native code, this file joins them.

FLASHPRUNE_NATIVE=0 leaves out all native code (reference and Triton backends only). FLASHPRUNE_CUDA says for which GPUs
the CUDA library is built: by default for those of this machine, `all`, a list such as `80,90a`, or `0` for none.
FLASHPRUNE_EMULATION=1 builds the CUDA kernels for the CPU too, which the tests need.
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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("FLASHPRUNE_NATIVE", "1") != "0"
EMULATION = os.environ.get("FLASHPRUNE_EMULATION", "0") == "1"
PURE = "set FLASHPRUNE_NATIVE=0 for a pure-Python install (reference and Triton backends only)"
# Packages that lie beside python/ in a checkout, `flashprune bench` among them, and the modules that only serve there.
ELSEWHERE = {
    "flashprune.triton_kernels": "triton_kernels",
    "flashprune.benchmarks": "benchmarks",
    "flashprune.benchmarks.peers": "benchmarks/peers",
}
CHECKOUT_ONLY = {
    ("flashprune.benchmarks", name) for name in ("conftest", "engines", "gpu", "gpu_models", "host", "launches")
}
# Cubins: one also runs on later minor versions of its architecture (sm_80 on 8.6 and 8.9), except sm_90a, which alone
# has Hopper's wgmma. With all of them goes PTX of the last, for what comes after it.
ARCHITECTURES = {8: "80", 9: "90a", 10: "100", 12: "120"}  # by the major compute capability of a GPU
OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
OLDEST_TORCH = (2, 11)  # the stable ABI that the libraries target


def say(line: str) -> None:
    print(f"flashprune: {line}", file=sys.stderr, flush=True)


def version_tuple(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def require_compiler(extensions: bool) -> None:
    """Stop at once, in one sentence, when the machine cannot compile C++, or Python extensions where there are any."""
    compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise SystemExit(
            f"flashprune: no C++ compiler found (looked for {', '.join(compilers)}): install one (Debian, Ubuntu: "
            f"apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or {PURE}."
        )
    if extensions and not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(
            f"flashprune: Python.h of {sys.executable} not found: install Python's headers (Debian, Ubuntu: "
            "apt install python3-dev; Fedora: dnf install python3-devel), or do without FLASHPRUNE_EMULATION=1."
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


def wanted_architectures() -> tuple[list[str], str]:
    """Those to build the CUDA library for, in CMake's words; or none, and the reason."""
    wanted = os.environ.get("FLASHPRUNE_CUDA", "")
    every = list(ARCHITECTURES.values())
    if wanted == "0":
        return [], "FLASHPRUNE_CUDA=0"
    if wanted in ("all", "1"):
        return [*(f"{name}-real" for name in every[:-1]), every[-1]], ""
    if wanted:
        names = wanted.split(",")
        if not set(names) <= set(every):
            raise SystemExit(
                f"flashprune: FLASHPRUNE_CUDA must be all, 0 or a list of {', '.join(every)}, got {wanted!r}"
            )
        return [f"{name}-real" for name in names], ""
    capabilities = gpus()
    if not capabilities:
        return [], "no GPU in the machine that built it"
    found = sorted({major for major, _ in capabilities} & set(ARCHITECTURES))
    if not found:
        return [], "no kernels for compute capability " + ", ".join(f"{a}.{b}" for a, b in capabilities)
    return [f"{ARCHITECTURES[major]}-real" for major in found], ""


def gpus() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs, as the driver tells them: torch's may be a CPU build."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout
    return sorted({version_tuple(line) for line in answer.splitlines() if re.fullmatch(r"\s*\d+\.\d+\s*", line)})


def find_nvcc() -> tuple[str | None, str]:
    """nvcc and its version, or None and the reason."""
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


def cuda_arguments() -> list[str]:
    """What CMake is told of CUDA, and the line that tells the user."""
    architectures, missing = wanted_architectures()
    nvcc = None
    if architectures:
        nvcc, answer = find_nvcc()
        missing = "" if nvcc else answer
    if nvcc is None:
        say(f"CPU library and Triton only, no CUDA library ({missing}). FLASHPRUNE_CUDA=all builds it for every GPU.")
        return ["-DFLASHPRUNE_CUDA=OFF", f"-DFLASHPRUNE_CUDA_MISSING={missing}"]
    names = ", ".join(f"sm_{name.removesuffix('-real')}" for name in architectures)
    say(f"building the CUDA library for {names} with nvcc {answer}, a minute or more for each.")
    return [
        "-DFLASHPRUNE_CUDA=ON",
        "-DFLASHPRUNE_CUDA_MISSING=",
        f"-DFLASHPRUNE_CUDA_ARCHITECTURES={';'.join(architectures)}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
    ]


class CMakeBuild(build_ext):
    """Builds the libraries with CMake and Ninja, and puts them into the package directory."""

    def run(self) -> None:
        require_compiler(extensions=EMULATION)
        self.cmake(self.package_dir(self.inplace or self.editable_mode))

    def package_dir(self, in_source: bool) -> Path:
        if in_source:
            return ROOT / self.get_finalized_command("build_py").get_package_dir("flashprune")
        return Path(self.build_lib, "flashprune").resolve()

    def cmake(self, package: Path) -> None:
        try:
            import cmake
            import ninja

            if EMULATION:
                import pybind11
        except ImportError as error:
            raise SystemExit(
                f"flashprune: the native build needs {error.name}: install it, or build "
                f"without --no-build-isolation, or {PURE}."
            ) from None

        torch_dir, torch_version = find_torch()
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFLASHPRUNE_TORCH={torch_dir}",
            f"-DFLASHPRUNE_TORCH_VERSION={torch_version}",
            f"-DFLASHPRUNE_VERSION={self.distribution.get_version()}",
        ]
        choices = [*cuda_arguments(), f"-DFLASHPRUNE_EMULATION={'ON' if EMULATION else 'OFF'}"]
        if EMULATION:
            choices.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        # pip's own build environments are temporary: a directory apart for them, or each would spoil the other's. CMake
        # keeps what it first found: start anew when what it was told of compilers and torch has changed.
        environment = "isolated" if not torch_dir.is_relative_to(sys.prefix) else sys.implementation.cache_tag
        build_dir = ROOT / "build" / str(environment)
        told = build_dir / "arguments.txt"
        compilers = [choice for choice in choices if "COMPILER" in choice]
        said = "\n".join([*arguments, *compilers, *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS"))])
        if not told.exists() or told.read_text() != said:
            shutil.rmtree(build_dir, ignore_errors=True)
            build_dir.mkdir(parents=True)
            told.write_text(said)

        program = str(Path(cmake.CMAKE_BIN_DIR, "cmake"))
        call(program, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *arguments, *choices)
        call(program, "--build", build_dir)
        remove_libraries(package)
        call(program, "--install", build_dir, "--prefix", package)


def call(*command: str | Path) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"flashprune: the native build failed, see the messages above; mend that, or {PURE}.")


def remove_libraries(package: Path) -> None:
    """Libraries of an earlier build, perhaps with other options, must not be taken for this one's."""
    for pattern in ("libflashprune_*.so", "_emulation.*.so", "build_facts.json"):
        for library in package.glob(pattern):
            library.unlink()


class Wheel(bdist_wheel):
    """Libraries on the stable ABI serve every Python: the tag names the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


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
    py_modules=["flashprune_plugins"],
    package_dir={"": "python", **ELSEWHERE},
    ext_modules=[Extension("flashprune.libflashprune", sources=[])] if NATIVE else [],  # CMake builds them
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_ext": CMakeBuild, "build_py": BuildPy},
)
