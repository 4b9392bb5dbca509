"""Similarity kernels against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import similarity
from torch import Tensor

from flashprune.reference.segments import nearest_other, unit_rows
from flashprune.replay import cosine_bound
from inputs import gaussian, halves, signs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected_norms(features: Tensor) -> Tensor:
    norms = features.float().flatten(0, -2).square().sum(-1).sqrt()
    return torch.where((norms > 0) & norms.isfinite(), 1 / norms, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_norms(dtype: torch.dtype, device: torch.device) -> None:
    for shape in ((9, 5), (2, 3, 17), (3, 1030)):
        features = gaussian(*shape)[0].to(device, dtype)
        torch.testing.assert_close(similarity.inverse_norms(features), expected_norms(features), rtol=1e-6, atol=0)


def test_inverse_norms_of_views(device: torch.device) -> None:
    wide = gaussian(2, 12, 20)[0].to(device)
    for view in (wide[..., 1:], wide[:, :, :7], wide[:, 1::2], wide.transpose(0, 1), wide.transpose(1, 2), wide[0]):
        torch.testing.assert_close(similarity.inverse_norms(view), expected_norms(view), rtol=1e-6, atol=0)


def test_inverse_norms_without_a_norm(device: torch.device) -> None:
    features = signs(7, 16).to(device)
    features[1] = 0.0
    features[2, 3] = math.nan
    features[3, 0] = -math.inf
    features[4] = 1e30  # its square overflows
    assert similarity.inverse_norms(features).tolist() == [0.25, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    assert similarity.inverse_norms(features[:0]).shape == (0,)


def expected_nearest(features: Tensor) -> Tensor:
    return nearest_other(unit_rows(features.float()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_other(dtype: torch.dtype, device: torch.device) -> None:
    (features,) = halves(gaussian(2, 70, 40)[0].to(device, dtype) * 2)
    inverse = similarity.inverse_norms(features)
    expected = torch.cat([expected_nearest(x) for x in features])
    torch.testing.assert_close(similarity.nearest_other(features, inverse), expected, rtol=0, atol=1e-6)
    alone = similarity.nearest_other(features[1], inverse[70:])
    assert torch.equal(alone, similarity.nearest_other(features, inverse)[70:])
    starts = torch.tensor([0, 1, 1, 45, 70], dtype=torch.int32, device=device)
    packed = similarity.nearest_other(features[0], inverse[:70], starts)
    parts = [expected_nearest(features[0, a:b]) for a, b in ((0, 1), (1, 45), (45, 70))]
    torch.testing.assert_close(packed, torch.cat(parts), rtol=0, atol=1e-6)
    again = similarity.nearest_other(features[0, 1:45], inverse[1:45])
    assert torch.equal(packed[1:45], again)


def test_nearest_other_of_exact_and_odd_rows(device: torch.device) -> None:
    features = signs(66, 16).to(device)
    features[3] = 0.0
    features[5, 1] = math.nan
    features[64] = -math.inf
    nearest = similarity.nearest_other(features, similarity.inverse_norms(features))
    assert torch.equal(nearest, expected_nearest(features))
    assert similarity.nearest_other(features[:0], features.new_empty(0)).shape == (0,)


@pytest.fixture
def cutting_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as tensor cores add them up: eight at a time onto the accumulator, and what does not fit is cut off."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def dot(builder: Any, a: Any, b: Any, accumulator: Any, *more: Any) -> Any:
        sums = accumulator.data.astype(np.float32)
        for k in range(0, a.data.shape[1], 8):
            exact = sums + a.data[:, k : k + 8].astype(np.float64) @ b.data[k : k + 8].astype(np.float64)
            nearest = exact.astype(np.float32)
            sums = np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)
        return interpreter.TensorHandle(sums, accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's products are replaced")
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_on_tensor_cores(dtype: torch.dtype, device: torch.device, cutting_off: None) -> None:
    """Errors of one sign, which add up: nothing but float32 may sum the whole of a row."""
    features = gaussian(6, 4096)[0].to(device, dtype).repeat(2, 1)  # cosines of 1, where every product is positive
    found = similarity.cosine_matrix(features, similarity.inverse_norms(features))
    unit = unit_rows(features.double())
    assert (found.double() - unit @ unit.T).abs().max().item() < cosine_bound(features.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_matrix(dtype: torch.dtype, device: torch.device) -> None:
    features = gaussian(2, 70, 20)[0].to(device, dtype)
    features[0, 3] = 0.0
    features[1, 5, 1] = math.nan
    matrix = similarity.cosine_matrix(features, similarity.inverse_norms(features))
    unit = torch.stack([unit_rows(x.float()) for x in features])
    torch.testing.assert_close(matrix, unit @ unit.mT, rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.mT)
    view = features[0, 1::2, 3:]
    matrix = similarity.cosine_matrix(view, similarity.inverse_norms(view), torch.bfloat16)
    unit = unit_rows(view.float())
    torch.testing.assert_close(matrix.float(), unit @ unit.T, rtol=2**-7, atol=1e-6)  # the interpreter truncates
