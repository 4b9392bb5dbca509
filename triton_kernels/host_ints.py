"""A few ints that the host knows, on the device: no synchronisation, and a CUDA graph may record it.

A copy from host memory would be neither: unless the memory is pinned it waits, and a graph copies whatever that memory
holds when it is replayed. Arguments of a kernel are stored in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, kernel

PER_LAUNCH = 8


@kernel
def host_ints_kernel(out_ptr, start, count, v0, v1, v2, v3, v4, v5, v6, v7):
    offs = tl.arange(0, 8)
    values = tl.where(offs == 0, v0, tl.where(offs == 1, v1, tl.where(offs == 2, v2, v3)))
    others = tl.where(offs == 4, v4, tl.where(offs == 5, v5, tl.where(offs == 6, v6, v7)))
    tl.store(out_ptr + start + offs, tl.where(offs < 4, values, others), mask=start + offs < count)


def host_ints(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``[len(values)]``; values below 2^31."""
    if INTERPRETED:  # a program takes it milliseconds
        return torch.tensor(values, dtype=torch.int32, device=device)
    out = torch.empty(len(values), dtype=torch.int32, device=device)
    for start in range(0, len(values), PER_LAUNCH):
        some = [*values[start : start + PER_LAUNCH], *[0] * PER_LAUNCH][:PER_LAUNCH]
        host_ints_kernel[(1,)](out, start, len(values), *some, num_warps=1)
    return out


def budget_starts(ks: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``[B + 1]``: where each segment's picks begin and end in the packed result."""
    if len(set(ks)) <= 1:
        k = ks[0] if ks else 0
        return torch.arange(len(ks) + 1, dtype=torch.int32, device=device) * k
    starts = [0]
    for k in ks:
        starts.append(starts[-1] + k)
    return host_ints(starts, device)
