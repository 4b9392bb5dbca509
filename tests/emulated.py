"""Tensors as the emulated CUDA kernels take them: NumPy arrays, bfloat16 as its bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SEEDS = (0, 1, 2)  # orders in which the threads of the emulation take turns


def numbers(tensor: Tensor) -> np.ndarray:
    """A view of a CPU tensor, strides and all."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def lengths(features: Tensor) -> Tensor:
    """The rows times powers of two: cosines stay exact, and a norm taken for another's shows."""
    return features * 2.0 ** (torch.arange(len(features)) % 5 - 2)[:, None]
