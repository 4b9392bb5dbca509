"""The CUDA kernels of norms and cosines, emulated, against plain PyTorch."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from emulated import SEEDS, numbers
from flashprune.reference.segments import nearest_other, unit_rows
from flashprune.replay import cosine_bound
from inputs import gaussian, signs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected_norms(features: Tensor) -> Tensor:
    norms = features.float().flatten(0, -2).square().sum(-1).sqrt()
    return torch.where((norms > 0) & norms.isfinite(), 1 / norms, 0.0)


def inverse_norms(emulation: ModuleType, features: Tensor, **more: object) -> Tensor:
    return torch.from_numpy(emulation.inverse_norms(numbers(features), **more))


def nearest(emulation: ModuleType, features: Tensor, cu_seqlens: np.ndarray | None = None, **more: object) -> Tensor:
    inverse = emulation.inverse_norms(numbers(features))
    return torch.from_numpy(emulation.nearest_other(numbers(features), inverse, cu_seqlens, **more))


def matrix(emulation: ModuleType, features: Tensor, cu_seqlens: np.ndarray | None = None, **more: object) -> Tensor:
    inverse = emulation.inverse_norms(numbers(features))
    return torch.from_numpy(emulation.cosine_matrix(numbers(features), inverse, cu_seqlens, **more))


def expected_nearest(features: Tensor) -> Tensor:
    return nearest_other(unit_rows(features.float()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_norms(dtype: torch.dtype, emulation: ModuleType) -> None:
    for shape in ((9, 5), (2, 3, 17), (3, 1040)):
        features = gaussian(*shape)[0].to(dtype)
        torch.testing.assert_close(inverse_norms(emulation, features), expected_norms(features), rtol=1e-6, atol=0)


def test_inverse_norms_of_views(emulation: ModuleType) -> None:
    wide = gaussian(2, 12, 20)[0]
    for view in (wide[..., 1:], wide[:, :, :7], wide[:, 1::2], wide.transpose(0, 1), wide[0]):
        torch.testing.assert_close(inverse_norms(emulation, view), expected_norms(view), rtol=1e-6, atol=0)


def test_inverse_norms_without_a_norm(emulation: ModuleType) -> None:
    features = signs(7, 16)
    features[1] = 0.0
    features[2, 3] = math.nan
    features[3, 0] = -math.inf
    features[4] = 1e30  # its square overflows
    assert inverse_norms(emulation, features).tolist() == [0.25, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    assert inverse_norms(emulation, features[:0]).shape == (0,)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_matrix(dtype: torch.dtype, tile: int, emulation: ModuleType) -> None:
    """Several steps of features with a tail, several tiles, several items."""
    features = gaussian(2, tile + 6, 200)[0].to(dtype)
    features[0, 3] = 0.0
    features[1, 5, 1] = math.nan
    cosines = matrix(emulation, features, tile=tile).unflatten(0, (2, tile + 6))
    unit = torch.stack([unit_rows(x.double()) for x in features])
    torch.testing.assert_close(cosines.double(), unit @ unit.mT, rtol=0, atol=1e-6)
    assert torch.equal(cosines, cosines.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_has_one_value(dtype: torch.dtype, emulation: ModuleType) -> None:
    """Whatever the tile, its place and the alignment of the rows."""
    features = gaussian(70, 40)[0].to(dtype)
    cosines = matrix(emulation, features, tile=64)
    assert torch.equal(cosines, matrix(emulation, features, tile=128, seed=1))
    assert torch.equal(cosines[6:, 6:], matrix(emulation, features[6:], tile=64))
    padded = torch.zeros(70, 41, dtype=dtype)
    padded[:, :40] = features
    assert torch.equal(cosines, matrix(emulation, padded[:, :40], tile=64))
    inverse = inverse_norms(emulation, features)
    packed = emulation.cosine_matrix(numbers(features), inverse.numpy(), np.array([0, 2, 70], np.int32))
    assert torch.equal(cosines[2:, 2:], torch.from_numpy(packed)[2:, :68])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 4096])
def test_long_sums_on_tensor_cores(d: int, dtype: torch.dtype, emulation: ModuleType) -> None:
    """What a tensor core adds it cuts off: errors of one sign. 22 units are the bound of tile.cuh."""
    features = gaussian(6, d)[0].to(dtype).repeat(2, 1)  # cosines of 1, where every product is positive
    unit = unit_rows(features.double())
    errors = (matrix(emulation, features, tile=64).double() - unit @ unit.T).abs().max().item()
    assert errors < min(cosine_bound(features.float()), (22 + 8) * 2.0**-23)


def test_odd_widths(emulation: ModuleType) -> None:
    for d in (1, 7, 33):
        features = gaussian(9, d)[0]
        unit = unit_rows(features.double())
        torch.testing.assert_close(matrix(emulation, features).double(), unit @ unit.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_other(dtype: torch.dtype, emulation: ModuleType) -> None:
    features = gaussian(2, 70, 40)[0].to(dtype)
    expected = torch.cat([expected_nearest(x) for x in features])
    found = nearest(emulation, features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for seed in SEEDS:
        assert torch.equal(found, nearest(emulation, features, seed=seed, blocks=1 + seed, tile=64))
    assert torch.equal(found, nearest(emulation, features, tile=128))
    assert torch.equal(found[70:], nearest(emulation, features[1]))


def test_nearest_other_of_packed_segments(emulation: ModuleType) -> None:
    features = gaussian(140, 24)[0]
    bounds = [0, 1, 1, 75, 140]
    found = nearest(emulation, features, np.array(bounds, np.int32), tile=64)
    parts = [expected_nearest(features[a:b]) for a, b in ((0, 1), (1, 75), (75, 140))]
    torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=1e-6)
    assert torch.equal(found[1:75], nearest(emulation, features[1:75]))
    many = np.array([0] * 40 + [70] + [140] * 30, np.int32)  # more segments than lanes of a warp
    assert torch.equal(nearest(emulation, features, many)[70:], nearest(emulation, features[70:]))


def test_nearest_other_of_exact_and_odd_rows(emulation: ModuleType) -> None:
    features = signs(66, 16)
    features[3] = 0.0
    features[5, 1] = math.nan
    features[64] = -math.inf
    assert torch.equal(nearest(emulation, features), expected_nearest(features))
    assert nearest(emulation, features[:0]).shape == (0,)


def test_bounds_beyond_the_tokens_stay_inside(emulation: ModuleType) -> None:
    features = gaussian(40, 16)[0]
    for bounds in ([0, 90], [-5, 30], [30, 10], [0, 40, 0, 40]):
        nearest(emulation, features, np.array(bounds, np.int32))
