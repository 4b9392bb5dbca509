"""Which backend really ran, and what is said when one cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashprune as fp
from flashprune import dispatch
from inputs import VARIANTS, Variant, gaussian

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
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
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())


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


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_what_is_not_built_says_so(backend: str) -> None:
    assert fp.backends()[backend].startswith("not built yet")
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: not built yet"):
        fp.topk_select(torch.ones(3), 1, backend=backend)


def test_a_gpu_without_kernels_falls_back() -> None:
    with pytest.warns(UserWarning, match="slow reference on cuda tensors .*cuda: not built yet.*triton: not built yet"):
        assert dispatch.resolve("auto", GPU, torch.float32) == "reference"


def test_a_backend_takes_its_own_tensors_only(native: None) -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot run: it takes cpu tensors, got cuda:0"):
        dispatch.resolve("cpu", GPU, torch.float32)
    with pytest.raises(
        ValueError, match="backend='cpu' cannot run: it takes float32, float16 and bfloat16, got float64"
    ):
        dispatch.resolve("cpu", CPU, torch.float64)
    assert dispatch.resolve("reference", GPU, torch.float64) == "reference"


def test_a_gpu_backend_that_is_ready_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._status, "triton", "ready")
    assert dispatch.resolve("auto", GPU, torch.bfloat16) == "triton"
    monkeypatch.setitem(dispatch._status, "cuda", "ready")
    assert dispatch.resolve("auto", GPU, torch.bfloat16) == "cuda"
    with pytest.raises(ValueError, match="backend='cuda' cannot run: it takes cuda tensors, got cpu"):
        dispatch.resolve("cuda", CPU, torch.float32)


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
