"""Which backend really ran, and what is said when one cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import flashprune as fp
from flashprune import dispatch, native, operators, triton_ops
from inputs import VARIANTS, Variant, gaussian

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
GPU_STATUS = dispatch._gpu_status
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Recorder(TorchDispatchMode):
    """The operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_cuda_found", {})


def ran(variant: Variant, dtype: torch.dtype = torch.float32, **settings: str) -> set[str]:
    features, importance = gaussian(2, 40, 8)
    with Recorder() as recorder:
        variant.select(features.to(dtype), importance.to(dtype), 7, **settings)
    return {name for name in recorder.ran if name.startswith("flashprune::")}


@each_variant
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_on_a_cpu_the_native_operator_runs(variant: Variant, backend: str, native: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(variant, backend=backend) == {f"flashprune::{variant.method}_select"}


@each_variant
def test_the_reference_runs_no_operator(variant: Variant) -> None:
    assert ran(variant, backend="reference") == set()


@each_variant
def test_float64_falls_back_with_one_warning(variant: Variant, native: None) -> None:
    with pytest.warns(UserWarning, match=r"slow reference.*got float64; convert, or choose backend='reference'"):
        assert ran(variant, torch.float64) == set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran(variant, torch.float64)


def test_without_the_library_auto_warns_once_and_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._status, "cpu", "not built: install a compiler")
    variant = VARIANTS[1]
    with pytest.warns(UserWarning, match="slow reference.*not built: install a compiler") as caught:
        assert ran(variant) == set()
        assert ran(variant) == set()
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: not built: install a compiler"):
        ran(variant, backend="cpu")
    assert fp.backends()["cpu"] == "not built: install a compiler"


def test_a_backend_without_its_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_status", lambda: "not built: no nvcc")
    assert fp.backends()["cuda"] == "not built: no nvcc"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: not built: no nvcc"):
        fp.topk_select(torch.ones(3), 1, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_says_why() -> None:
    assert fp.backends()["cuda"] == native.cuda_status() != "ready"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: "):
        fp.topk_select(torch.ones(3), 1, backend="cuda")


def test_cuda_is_asked_until_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["no GPU", "ready"])
    monkeypatch.setattr(native, "cuda_status", lambda: next(answers))
    assert [fp.backends()["cuda"] for _ in range(4)] == ["no GPU", "ready", "ready", "ready"]


def test_asking_for_the_status_does_not_break_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.cpu_status() != "ready":
        pytest.skip(native.cpu_status())
    monkeypatch.setitem(dispatch._status, "cpu", None)  # asked for as that of CUDA is
    monkeypatch.setattr(native, "cuda_status", lambda: "ready")
    scores = torch.rand(30)
    torch._dynamo.reset()
    graphs = CompileCounter()
    whole = torch.compile(lambda x: x[fp.topk_select(x, 4)], fullgraph=True, backend=graphs)
    for _ in range(2):
        assert torch.equal(whole(scores), scores[fp.topk_select(scores, 4)])
    assert graphs.frame_count == 1


def test_importing_asks_for_no_gpu() -> None:
    script = (
        "import torch; torch.cuda.is_available = torch.cuda._lazy_init = None\n"
        "import flashprune as fp; print(fp.topk_select(torch.ones(3), 1).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[0]\n", run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_triton_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    assert fp.backends()["triton"] == "no GPU: torch.cuda.is_available() is False"
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: no GPU"):
        fp.topk_select(torch.ones(3), 1, backend="triton")


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (None, "triton not installed: pip install 'triton>=3.6'"),
        ("3.5.1", "triton 3.5.1 is too old: pip install 'triton>=3.6'"),
        ("3.6.0", "ready"),
        ("3.10.0+git1", "ready"),
    ],
)
def test_the_status_of_triton(found: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: found)
    monkeypatch.setattr(dispatch, "version", lambda name: found)
    assert dispatch._triton_status() == status


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, Triton and a CUDA library without kernels, as far as dispatch can see."""
    monkeypatch.setitem(dispatch._status, "triton", "ready")
    monkeypatch.setattr(native, "cuda_status", lambda: "ready")
    monkeypatch.setattr(operators, "CUDA_KERNELS", frozenset())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_gpu_status", lambda: "ready")


@pytest.mark.parametrize(
    ("hip", "chip", "status"),
    [
        ("7.0", "gfx942:sramecc+:xnack-", "ready"),
        ("7.0", "gfx1030", "GPU not known: the kernels are compiled for gfx942, gfx950, gfx1100 of AMD's, got gfx1030"),
        (None, (9, 0), "ready"),
        (None, (7, 5), "GPU too old: compute capability 7.5, and 8.0 or later is needed"),
    ],
)
def test_triton_is_ready_where_its_kernels_compile(
    hip: str | None, chip: Any, status: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_gpu_status", GPU_STATUS)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: chip)
    assert fp.backends()["triton"] == status


def test_triton_interpreted_runs_where_it_is_named() -> None:
    """On CPU tensors, in a process that says so to Triton; "auto" does not take it."""
    pytest.importorskip("triton")
    script = """
import torch, flashprune as fp
from flashprune import dispatch
print(fp.backends()["triton"].split(":")[0], fp.topk_select(torch.tensor([0.0, 2, 1]), 2, backend="triton").tolist())
print(dispatch.resolve("auto", "topk_select", torch.device("cpu"), torch.float32))
fp.topk_select(torch.ones(3, dtype=torch.float64), 1, backend="triton")
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    assert run.stdout.splitlines() in (["interpreter [1, 2]", name] for name in ("cpu", "reference"))
    assert "backend='triton' cannot run: it takes float32" in run.stderr.splitlines()[-1]


def test_a_gpu_without_kernels_falls_back(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._status, "triton", "triton not installed")
    monkeypatch.setattr(native, "cuda_status", lambda: "not built (no nvcc)")
    with pytest.warns(
        UserWarning, match=r"slow reference on cuda tensors .*cuda: not built \(no nvcc\).*triton: triton not installed"
    ):
        assert dispatch.resolve("auto", "topk_select", GPU, torch.float32) == "reference"


def test_an_operator_without_a_triton_kernel_says_so(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "KERNELS", frozenset({"topk_select"}))
    assert dispatch.resolve("auto", "topk_select", GPU, torch.float32) == "triton"
    with pytest.warns(UserWarning, match="triton: no Triton kernel for dpp_select yet") as caught:
        assert dispatch.resolve("auto", "dpp_select", GPU, torch.float32) == "reference"
        assert dispatch.resolve("auto", "dpp_select", GPU, torch.float32) == "reference"
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: no Triton kernel for dpp_select yet"):
        dispatch.resolve("triton", "dpp_select", GPU, torch.float32)


def test_a_backend_takes_its_own_tensors_only(native: None) -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot run: it takes cpu tensors, got cuda:0"):
        dispatch.resolve("cpu", "topk_select", GPU, torch.float32)
    with pytest.raises(
        ValueError, match="backend='cpu' cannot run: it takes float32, float16 and bfloat16, got float64"
    ):
        dispatch.resolve("cpu", "topk_select", CPU, torch.float64)
    assert dispatch.resolve("reference", "topk_select", GPU, torch.float64) == "reference"


def test_cuda_comes_before_triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "KERNELS", frozenset({"topk_select", "mmr_select"}))
    monkeypatch.setattr(operators, "CUDA_KERNELS", frozenset({"topk_select"}))
    assert dispatch.resolve("auto", "topk_select", GPU, torch.bfloat16) == "cuda"
    assert dispatch.resolve("auto", "mmr_select", GPU, torch.bfloat16) == "triton"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: no CUDA kernel for mmr_select yet"):
        dispatch.resolve("cuda", "mmr_select", GPU, torch.bfloat16)
    with pytest.raises(ValueError, match="backend='cuda' cannot run: it takes cuda tensors, got cpu"):
        dispatch.resolve("cuda", "topk_select", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run: .* got float64"):
        dispatch.resolve("cuda", "topk_select", GPU, torch.float64)
    monkeypatch.setattr(native, "cuda_status", lambda: "GPU too old")
    monkeypatch.setattr(dispatch, "_cuda_found", {})
    assert dispatch.resolve("auto", "topk_select", GPU, torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("driver", "runtime", "ready"),
    [(12080, 13000, False), (0, 13000, False), (13000, 13010, True), (13020, 13000, True), (13000, 12080, True)],
)
def test_a_driver_older_than_the_runtime_leaves_triton(
    driver: int, runtime: int, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library carries its CUDA runtime, which a driver of an earlier major version refuses at every call."""
    monkeypatch.setattr(native, "_load_cuda", lambda: "ready")
    monkeypatch.setattr(native, "_cuda_versions", lambda: (driver, runtime))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(dispatch._status, "triton", "ready")
    monkeypatch.setattr(dispatch, "_cuda_found", {})
    monkeypatch.setattr(operators, "CUDA_KERNELS", frozenset({"topk_select"}))
    assert dispatch.resolve("auto", "topk_select", GPU, torch.bfloat16) == ("cuda" if ready else "triton")
    if not ready:
        message = f"driver too old: it supports CUDA {driver // 1000}.*runtime of CUDA 13.0: update the driver"
        assert re.match(message, fp.backends()["cuda"])  # which `flashprune info` prints
        with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run: {message}"):
            dispatch.resolve("cuda", "topk_select", GPU, torch.bfloat16)


def test_choosing_cuda_does_not_break_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_status", lambda: "ready")
    monkeypatch.setattr(operators, "CUDA_KERNELS", frozenset({"topk_select"}))

    def choose(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, dispatch.resolve("auto", "topk_select", GPU, x.dtype)

    torch._dynamo.reset()
    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1))[1] == "cuda"


@pytest.mark.parametrize("op", dispatch.WIDE)
def test_wide_stages_of_cuda_are_triton_kernels(op: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "KERNELS", frozenset({op}))
    assert dispatch.resolve("cuda", op, GPU, torch.float32) == "triton"
    assert dispatch.resolve("auto", op, GPU, torch.float32) == "triton"
    monkeypatch.setitem(dispatch._status, "triton", "triton not installed")
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run: {op} is a Triton kernel there: triton not installed"):
        dispatch.resolve("cuda", op, GPU, torch.float32)


def test_cuda_kernels_are_those_that_the_library_registers() -> None:
    assert operators.CUDA_KERNELS.issubset(operators.SHAPES)
    if native.cuda_status() == "ready":
        assert "topk_select" in operators.CUDA_KERNELS
    elif torch.version.cuda is None:  # the library is left alone
        assert not operators.CUDA_KERNELS


def test_backends_is_a_copy() -> None:
    fp.backends()["cpu"] = "changed"
    assert fp.backends()["cpu"] != "changed"
    assert set(fp.backends()) == {"cuda", "triton", "cpu", "reference"}


def test_a_tree_without_libraries_imports_and_selects(tmp_path: Path) -> None:
    shutil.copytree(
        Path(fp.__file__).parent, tmp_path / "flashprune", ignore=shutil.ignore_patterns("*.so", "__pycache__", "cli")
    )
    script = (
        "import torch, warnings, flashprune as fp\n"
        "assert fp.__version__ and fp.backends()['cpu'] != 'ready'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    print(fp.mmr_select(torch.eye(4), torch.tensor([.1, .4, .2, .3]), 2).tolist(), len(caught))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.stdout == "[1, 3] 1\n", run.stderr


def test_importing_the_package_imports_no_triton() -> None:
    script = "import sys, flashprune; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
