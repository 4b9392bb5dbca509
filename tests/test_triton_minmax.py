"""The Triton min-max scaling against the tensor form, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashprune.triton_kernels import configs
from flashprune.triton_kernels.minmax import minmax

import flashprune as fp

BLOCK = configs.choose("minmax", "fp32", "consumer")["BLOCK"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel wrote is 77."""
    monkeypatch.setattr(torch, "empty", lambda shape, **settings: torch.full(shape, 77.0, **settings))


poisoned = pytest.mark.usefixtures("poison")


def check(scores: Tensor, device: torch.device, cu_seqlens: Tensor | None = None) -> None:
    got = minmax(scores.to(device), None if cu_seqlens is None else cu_seqlens.to(device))
    expected = fp.minmax(scores, cu_seqlens=cu_seqlens)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32)) or (
        torch.equal(got.cpu().isnan(), expected.isnan())
        and torch.equal(got.cpu().nan_to_num(9), expected.nan_to_num(9))
    )


def odd(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-42, 6e4, -3e38, 3e38])
    chosen = special[torch.randint(len(special), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.3, chosen, torch.randn(n, generator=generator))


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_the_formula_to_the_bit(n: int, dtype: torch.dtype, device: torch.device) -> None:
    for scores in (torch.randn(n), torch.rand(n) * 1e-6, torch.full((n,), -3.0), odd(n), torch.full((n,), math.nan)):
        check(scores.to(dtype), device)


@poisoned
def test_a_span_beyond_float32(device: torch.device) -> None:
    check(torch.tensor([3e38, -3e38, 0.0, 1.0]), device)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.stack([odd(60, seed) for seed in range(4)]).to(dtype)
    for scores in (
        wide,
        wide[:, ::3],
        wide.T,
        wide[1:, 7:50],
        wide[0, 1::2],
        wide[:1].expand(3, 60),
        wide[:0],
        wide[:, :0],
    ):
        check(scores, device)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_and_empty_segments(dtype: torch.dtype, device: torch.device) -> None:
    bounds = torch.tensor([0, 0, 5, 5, 6, 40, 100, 100], dtype=torch.int32)
    check(torch.randn(100).to(dtype), device, bounds)
    check(odd(200).to(dtype)[::2], device, bounds)
    check(torch.empty((0,)).to(dtype), device, torch.zeros(3, dtype=torch.int32))


@poisoned
def test_hostile_cu_seqlens_stay_inside(device: torch.device) -> None:
    scores = torch.randn(40, device=device)
    for ends in ([0, 3, 90], [-9, 20, 40], [30, 10, 40]):
        got = minmax(scores, torch.tensor(ends, dtype=torch.int32, device=device))
        assert ((got == 77) | ((got >= 0) & (got <= 1))).all()


def test_the_public_function_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for float64 nor where gradients flow, for which the kernel is not made."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from flashprune import dispatch, importance
    from test_dispatch import Recorder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(dispatch._status, "triton", "ready")

    takes = importance._minmax_kernel_takes
    with FakeTensorMode(), Recorder() as recorder:
        scores = torch.empty(2, 9, device="cuda", dtype=torch.float16)
        assert fp.minmax(scores).shape == (2, 9)
        assert "flashprune_triton::minmax" in recorder.ran
        assert not takes(scores.double())
        assert not takes(torch.empty(9, device="cuda", requires_grad=True))
        with torch.no_grad():
            assert takes(torch.empty(9, device="cuda", requires_grad=True))
    assert not takes(torch.empty(9))
