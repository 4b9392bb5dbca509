"""Token positions carried in feature columns: integers as bit patterns, so that what moves features moves them too."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

_WORDS = {2: torch.int16, 4: torch.int32}


def pack_positions(features: Tensor, positions: Tensor) -> Tensor:
    """Features with their positions appended as columns, bit for bit.

    A position is cut into as many columns as its bits fill: an int32 takes one float32 or two float16 or bfloat16, an
    int64 twice as many. The columns are bit patterns, not numbers: copy, gather or send them, but do no arithmetic on
    them and convert no dtype; some are NaN patterns, and even those come back unchanged.

    Args:
        features: ``[..., N, D]``; float32, float16 or bfloat16, any strides.
        positions: int32 or int64 ``[..., N, P]`` on the same device, such as the ``(t, y, x)`` of each token.

    Returns:
        ``[..., N, D + P * columns]``, the features' dtype; a new tensor.

    Raises:
        TypeError: features or positions of another dtype.
        ValueError: leading dimensions or devices that differ, or features that require grad.

    Examples:
        >>> import torch
        >>> packed = pack_positions(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([[0, 7], [1, -1]]))
        >>> packed.shape
        torch.Size([2, 11])
        >>> unpack_positions(packed, 2)[1].tolist()
        [[0, 7], [1, -1]]
    """
    word = _word("features", features)
    checks.no_grad(features=features)
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must be an int32 or int64 tensor, got {_kind(positions)}")
    if positions.dim() != features.dim() or positions.shape[:-1] != features.shape[:-1]:
        wanted = "[" + "".join(f"{n}, " for n in features.shape[:-1]) + "P]"
        raise ValueError(
            f"positions must be {wanted} like features {checks.shape(features)}, got {list(positions.shape)}"
        )
    checks.same_device("positions", positions, features)
    # as integers throughout: a float move may make a NaN quiet
    columns = positions.clone(memory_format=torch.contiguous_format).view(word)
    return torch.cat([features.contiguous().view(word), columns], dim=-1).view(features.dtype)


def unpack_positions(packed: Tensor, count: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """What `pack_positions` put together.

    Args:
        packed: ``[..., N, D + columns]``, as `pack_positions` returned it, or any rows of it.
        count: P, positions a token.
        dtype: int32 or int64, as packed.

    Returns:
        features ``[..., N, D]``, a view of ``packed``; positions ``[..., N, P]`` of ``dtype``, a new tensor.

    Raises:
        TypeError: packed is not float32, float16 or bfloat16, or dtype is neither int32 nor int64.
        ValueError: packed has fewer columns than the positions take.

    Examples:
        >>> import torch
        >>> features, places = torch.ones(4, 8), torch.arange(4, dtype=torch.int32)[:, None]
        >>> unpack_positions(pack_positions(features, places)[2:], 1, torch.int32)[1].tolist()
        [[2], [3]]
    """
    word = _word("packed", packed)
    count = checks.integer("count", count, 0)
    if dtype not in (torch.int32, torch.int64):
        raise TypeError(f"dtype must be torch.int32 or torch.int64, got {dtype}")
    columns = count * (dtype.itemsize // word.itemsize)
    width = packed.shape[-1] - columns
    if width < 0:
        needed = f"at least {columns} columns for {count} positions"
        raise ValueError(f"packed must have {needed}, got {checks.shape(packed)}")
    bits = packed.view(word)[..., width:]
    return packed[..., :width], bits.clone(memory_format=torch.contiguous_format).view(dtype)


def _word(name: str, x: Tensor) -> torch.dtype:
    """The integer dtype as wide as an element."""
    checks.floating(name, x)
    if x.dtype == torch.float64:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got float64")
    if x.dim() == 0:
        raise ValueError(f"{name} must be [..., N, D], got []")
    return _WORDS[x.dtype.itemsize]


def _kind(x: object) -> str:
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
