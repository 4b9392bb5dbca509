"""Positions in feature columns: every bit pattern comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashprune as fp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


@each_dtype
def test_every_pattern_comes_back(dtype: torch.dtype) -> None:
    """All 2^16 patterns, NaNs that a float move would change among them, as low and as high half."""
    low = torch.arange(-(2**15), 2**15, dtype=torch.int64)
    places = torch.stack([low, low << 16, low << 32, low << 48, low | low << 32], -1)
    features = torch.randn(len(low), 3).to(dtype)
    for integer in (torch.int32, torch.int64):
        wanted = places.to(integer)
        kept, got = fp.unpack_positions(fp.pack_positions(features, wanted), 5, integer)
        assert got.dtype == integer and torch.equal(got, wanted)
        assert torch.equal(kept, features)


@each_dtype
def test_features_keep_their_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.randint(-(2**15), 2**15, (64, 8), generator=generator).to(word) << (8 * dtype.itemsize - 16)
    features = patterns.view(dtype)
    assert features.isnan().any()
    kept, _ = fp.unpack_positions(fp.pack_positions(features, torch.zeros(64, 1, dtype=torch.int32)), 1, torch.int32)
    assert torch.equal(bits(kept), patterns)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 4), (7, 1), (2, 5, 6), (2, 0, 6)])
def test_shapes_strides_and_gathers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
    places = torch.randint(-(2**31), 2**31, (*shape[:-1], 6), dtype=torch.int32)[..., ::2]
    packed = fp.pack_positions(wide[..., 1:-2], places)
    assert packed.shape == (*shape[:-1], shape[-1] + 3 * (4 // dtype.itemsize))
    rows = torch.arange(shape[-2] - 1, -1, -1)
    kept, got = fp.unpack_positions(packed[..., rows, :], 3, torch.int32)
    assert torch.equal(kept, wide[..., rows, 1:-2]) and torch.equal(got, places[..., rows, :])


def test_one_graph() -> None:
    def there_and_back(features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return fp.unpack_positions(fp.pack_positions(features, places), 2)[1]

    places = torch.tensor([[-1, 2**40], [5, 0x7FC07FC0]])
    graph = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(torch.ones(2, 3, dtype=torch.bfloat16), places), places)


@pytest.mark.parametrize(
    ("features", "positions", "error", "message"),
    [
        (
            torch.ones(3, 2).double(),
            torch.zeros(3, 1, dtype=torch.int32),
            TypeError,
            "features must be float32.*float64",
        ),
        (torch.ones(3, 2), torch.zeros(3, 1), TypeError, "positions must be an int32 or int64 tensor, got float32"),
        (torch.ones(3, 2), [1, 2, 3], TypeError, "positions must be an int32 or int64 tensor, got list"),
        (torch.ones(3, 2), torch.zeros(4, 1, dtype=torch.int32), ValueError, r"positions must be \[3, P\].*\[4, 1\]"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int32), ValueError, "positions must be"),
    ],
)
def test_what_does_not_fit_is_refused(features: Any, positions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.pack_positions(features, positions)


def test_unpack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="packed must have at least 4 columns for 2 positions"):
        fp.unpack_positions(torch.ones(2, 3), 2)
    with pytest.raises(TypeError, match=r"dtype must be torch\.int32 or torch\.int64"):
        fp.unpack_positions(torch.ones(2, 3), 1, torch.int16)
