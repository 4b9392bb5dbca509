"""Similarity kernels against plain PyTorch."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton")

import torch
from inputs import gaussian, signs
from torch import Tensor

from flashprune.triton_kernels import similarity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected_norms(features: Tensor) -> Tensor:
    norms = features.float().flatten(0, -2).square().sum(-1).sqrt()
    return torch.where((norms > 0) & norms.isfinite(), 1 / norms, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_norms(dtype: torch.dtype, device: str) -> None:
    for shape in ((9, 5), (2, 3, 17), (3, 1030)):
        features = gaussian(*shape)[0].to(device, dtype)
        torch.testing.assert_close(similarity.inverse_norms(features), expected_norms(features), rtol=1e-6, atol=0)


def test_inverse_norms_of_views(device: str) -> None:
    wide = gaussian(2, 12, 20)[0].to(device)
    for view in (wide[..., 1:], wide[:, :, :7], wide[:, 1::2], wide.transpose(0, 1), wide.transpose(1, 2), wide[0]):
        torch.testing.assert_close(similarity.inverse_norms(view), expected_norms(view), rtol=1e-6, atol=0)


def test_inverse_norms_without_a_norm(device: str) -> None:
    features = signs(7, 16).to(device)
    features[1] = 0.0
    features[2, 3] = math.nan
    features[3, 0] = -math.inf
    features[4] = 1e30  # its square overflows
    assert similarity.inverse_norms(features).tolist() == [0.25, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    assert similarity.inverse_norms(features[:0]).shape == (0,)
