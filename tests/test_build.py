"""The build: what setup.py asks of a machine, what a wheel holds, and that `native` tells the truth about both."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from flashprune import native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(native.__file__).parent
FACTS = native.build_facts()

needs_build = pytest.mark.skipif(not FACTS, reason="pure-Python install: no native code to look at")
needs_cuda_library = pytest.mark.skipif(not (PACKAGE / "libflashprune_cuda.so").exists(), reason=native.cuda_status())


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that no build writes into the checkout."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("python", "triton_kernels", "benchmarks", "csrc"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__", "*.egg-info")
        )
    return tree


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("FLASHPRUNE_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


# ---- what was built


@needs_build
def test_facts_match_the_libraries_on_disk():
    assert (PACKAGE / "libflashprune_cpu.so").exists()
    has_cuda = (PACKAGE / "libflashprune_cuda.so").exists()
    assert has_cuda == (FACTS["nvcc"] is not None) == bool(FACTS["cuda_architectures"])
    assert has_cuda == (FACTS["cuda_missing"] is None)
    assert FACTS["instruction_sets"][0] == "baseline"
    assert FACTS["version"] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


@needs_build
def test_cpu_library_loads_and_loading_again_is_harmless():
    assert native.cpu_status() == "ready"
    assert native.load()
    assert native.load()


def images(library: bytes) -> set[str]:
    """The code that a library holds for GPUs, read off its fat binaries: 80 for a cubin, compute_80 for PTX."""
    found = set()
    for match in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), library):
        _, _, header, size = struct.unpack_from("<IHHQ", library, match.start())
        at = match.start() + header
        end = at + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
            (architecture,) = struct.unpack_from("<I", library, at + 28)
            found.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}")
            at += header + size
    return found


@needs_cuda_library
def test_cuda_library_holds_every_architecture_that_the_facts_name():
    names = FACTS["cuda_architectures"]
    assert images((PACKAGE / "libflashprune_cuda.so").read_bytes()) == {name.rstrip("a") for name in names}


@needs_cuda_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_cuda_library_is_left_alone_under_a_cpu_build_of_torch():
    assert "has no CUDA" in native.cuda_status()
    assert not hasattr(torch.ops.flashprune, "device_facts")
    with pytest.raises(RuntimeError, match="install a CUDA build of torch"):
        native.device_facts()


@pytest.mark.gpu
@pytest.mark.skipif(native.cuda_status() != "ready", reason=native.cuda_status())
def test_device_facts_come_from_the_device():
    facts = native.device_facts()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert facts["device"] == 10 * properties.major + properties.minor
    assert facts["multiprocessors"] == properties.multi_processor_count
    assert 80 <= facts["compiled_for"] <= facts["device"]


# ---- what may be missing


def test_statuses_are_one_line():
    for status in (native.cpu_status(), native.cuda_status()):
        assert status
        assert "\n" not in status


def test_missing_library_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    assert "reinstall flashprune with a C++ compiler" in native._load_cpu.__wrapped__()


def test_broken_library_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    (tmp_path / "libflashprune_cpu.so").write_text("no library")
    status = native._load_cpu.__wrapped__()
    assert status.startswith(f"libflashprune_cpu.so does not load under torch {torch.__version__}")
    assert "\n" not in status


def test_no_nvcc_is_a_reason_not_an_error(setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert setup_script["find_nvcc"]() == (None, "nvcc not found")


@pytest.mark.parametrize(
    ("release", "answer"), [("11.8.89", "nvcc 11.8.89 is older than 12.8"), ("13.0.88", "13.0.88")]
)
def test_nvcc_of_the_environment_is_asked_its_version(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, answer: str
):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release[:4]}, V{release}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script["find_nvcc"]() == (str(nvcc) if answer == release else None, answer)


@pytest.mark.parametrize(
    ("wanted", "gpus", "architectures", "missing"),
    [
        ("", "", [], "no GPU in the machine that built it"),
        ("", "8.6\n9.0\n8.9\n", ["80-real", "90a-real"], ""),
        ("", "7.5\n", [], "no kernels for compute capability 7.5"),
        ("0", "9.0\n", [], "FLASHPRUNE_CUDA=0"),
        ("all", "", ["80-real", "90a-real", "100-real", "120"], ""),
        ("90a,120", "8.0\n", ["90a-real", "120-real"], ""),
    ],
)
def test_the_machine_or_the_environment_says_for_which_gpus(
    setup_script: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wanted: str,
    gpus: str,
    architectures: list[str],
    missing: str,
):
    (tmp_path / "answer").write_text(gpus)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ $1 = --query-gpu=compute_cap ] && cat {tmp_path}/answer\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FLASHPRUNE_CUDA", wanted)
    assert setup_script["wanted_architectures"]() == (architectures, missing)


def test_an_unknown_architecture_stops_the_build_with_one_sentence(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLASHPRUNE_CUDA", "75,80")
    with pytest.raises(SystemExit, match="FLASHPRUNE_CUDA must be all, 0 or a list of 80, 90a, 100, 120, got '75,80'"):
        setup_script["wanted_architectures"]()


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent/c++ -O2"}, {"PATH": "/nonexistent", "CXX": ""}])
def test_no_compiler_stops_the_build_with_one_sentence(source_tree: Path, environment: dict[str, str]):
    result = run_setup(source_tree, "-q", "build", FLASHPRUNE_NATIVE="1", **environment)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("flashprune: no C++ compiler found")
    assert "apt install g++" in result.stderr
    assert "FLASHPRUNE_NATIVE=0" in result.stderr
    assert not list(source_tree.rglob("*.so"))


# ---- what a wheel holds


def test_pure_wheel_holds_every_module_and_no_library(source_tree: Path):
    for name in ("libflashprune_cpu.so", "build_facts.json"):
        (source_tree / "python" / "flashprune" / name).write_text("left over from another build")
    result = run_setup(source_tree, "-q", "bdist_wheel", FLASHPRUNE_NATIVE="0", CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    (wheel,) = (source_tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not {name for name in held if name.endswith((".so", ".cpp", ".cu", ".json"))}

    modules = {path.relative_to(source_tree / "python") for path in (source_tree / "python").rglob("*.py")}
    for folder in ("triton_kernels", "benchmarks"):
        modules |= {Path("flashprune", x.relative_to(source_tree)) for x in source_tree.glob(f"{folder}/**/*.py")}
    checkout_only = ("conftest", "engines", "gpu", "gpu_models", "host", "launches")
    modules -= {Path("flashprune/benchmarks", f"{name}.py") for name in checkout_only}
    assert modules
    assert {path.as_posix() for path in modules} <= held
    assert "flashprune/py.typed" in held


def test_torch_is_pinned_to_one_version_everywhere():
    # An unpinned one would download several GB more for each isolated build.
    pins = [re.findall(r"torch==([\d.]+)", (ROOT / name).read_text()) for name in ("pyproject.toml", "constraints.txt")]
    assert pins[0] == pins[1] != []
