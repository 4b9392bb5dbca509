"""Scratch memory of the caller's, on the emulated CUDA operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashprune as fp
from flashprune import native, operators, selectors, workspaces
from inputs import gaussian

EMULATED = native._PACKAGE / "libflashprune_emulated.so"
FEATURES, SCORES = gaussian(70, 32)
CALLS: dict[str, Callable[[], Tensor]] = {
    "mmr": lambda: fp.mmr_select(FEATURES, SCORES, 20, backend="cuda"),
    "mis": lambda: fp.mis_select(FEATURES, SCORES, 20, backend="cuda"),
    "maxmin": lambda: fp.maxmin_select(FEATURES, 20, backend="cuda"),
    "dpp": lambda: fp.dpp_select(FEATURES, SCORES, 20, backend="cuda"),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" is the emulation, and takes CPU tensors."""
    if not EMULATED.exists():
        pytest.skip("the emulated CUDA operators are not built")
    torch.ops.load_library(EMULATED)
    for module in (selectors, workspaces):
        monkeypatch.setattr(module, "resolve", lambda backend, *_: backend)
    for module in (operators, workspaces):
        monkeypatch.setattr(module, "namespace", lambda _: torch.ops.flashprune_emulated)


@each_call
def test_a_buffer_of_the_size_that_was_measured_serves(call: Callable[[], Tensor]) -> None:
    expected = call()
    with fp.workspace(device="cpu") as needed:
        assert call().equal(expected)
        assert needed.bytes > 0
    for fill in (0, 255):
        buffer = torch.full((needed.bytes,), fill, dtype=torch.uint8)
        with fp.workspace(buffer) as used:
            assert call().equal(expected)
            assert used.bytes == needed.bytes
        assert not (buffer == fill).all()


@each_call
def test_too_small_is_an_error_and_nothing_is_left_behind(call: Callable[[], Tensor]) -> None:
    expected = call()
    with fp.workspace(device="cpu") as needed:
        call()
    with (
        pytest.raises(ValueError, match=f"workspace: expected at least {needed.bytes} bytes, got {needed.bytes - 1}"),
        fp.workspace(torch.empty(needed.bytes - 1, dtype=torch.uint8)),
    ):
        call()
    assert call().equal(expected)


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    for buffer in (torch.empty(64), torch.empty(8, 8, dtype=torch.uint8), torch.empty(64, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match=r"workspace: expected a contiguous uint8 \[bytes\]"), fp.workspace(buffer):
            pass
    odd = torch.empty(65, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of 16"), fp.workspace(odd[1 + -odd.data_ptr() % 16 :]):
        pass
    with pytest.raises(TypeError, match="buffer: expected a tensor or None, got int"), fp.workspace(4096):
        pass


def test_without_the_backend_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if fp.backends()["cuda"] == "ready":
        pytest.skip("the CUDA backend is ready here")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run"), fp.workspace():
        pass
