import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on CPU tensors, interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import flashprune as fp


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have found out of kernels, as one table, whichever process ran them."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = sorted(row for report in reports for name, row in report.user_properties if name == "resources")
    if rows:
        columns = ("kernel", "form", "GPU", "registers a thread", "shared memory, KiB", "tensor cores")
        terminalreporter.write_line("\n".join(("", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows)))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine's CPU; the same test holds for all."""
    status = fp.backends()[request.param]
    if status != "ready":
        pytest.skip(f"{request.param}: {status}")
    return request.param


@pytest.fixture
def native() -> None:
    """For tests of the native operators themselves."""
    if fp.backends()["cpu"] != "ready":
        pytest.skip(f"cpu: {fp.backends()['cpu']}")


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """The CUDA kernels, compiled for the CPU: built in a checkout, not in a wheel."""
    return pytest.importorskip("flashprune._emulation")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models as folders."""
    pytest.importorskip("transformers", minversion="5.19")
    from examples import tiny_models
    from tests.vlm import FAMILIES

    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_models.save(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven photographs, in two folders."""
    from tests.calibration import write_photos

    sizes = [(120, 90), (90, 150), (112, 112), (160, 60), (70, 140), (140, 70), (100, 101)]
    return write_photos(tmp_path / "photos", sizes)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under torchrun, whatever runs the tests."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU with Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")
