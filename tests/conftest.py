import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on CPU tensors, interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import flashprune as fp  # noqa: E402


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


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
