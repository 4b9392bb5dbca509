"""The definition of every operation in plain PyTorch: short, slow, obviously right, on any device.

Same names and signatures as the public functions; float64 tensors are worked on in float64.

    >>> import torch
    >>> topk_select(torch.tensor([0.1, 0.9, 0.5, 0.9], dtype=torch.float64), 3)
    tensor([1, 2, 3])
"""

from functools import partial, update_wrapper
from typing import Any

from .. import metrics
from .importance import debias, minmax, query_attention, received_attention, resize_prior, soft_topk
from .selectors import dpp_select, maxmin_select, mis_select, mmr_select, topk_select
from .video import evs_select, vidcom2_select

_METHODS = ("cdpruner", "d2pruner", "divprune", "fastv", "idpruner", "naive_hybrid")

__all__ = [
    "cdpruner",
    "d2pruner",
    "debias",
    "divprune",
    "dpp_select",
    "evs_select",
    "fastv",
    "idpruner",
    "maxmin_select",
    "metrics",
    "minmax",
    "mis_select",
    "mmr_select",
    "naive_hybrid",
    "query_attention",
    "received_attention",
    "resize_prior",
    "soft_topk",
    "topk_select",
    "vidcom2_select",
]


def __getattr__(name: str) -> Any:
    """A method with its selector pinned to the reference; looked up late because methods build on the selectors."""
    if name not in _METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import methods

    method = getattr(methods, name)
    return update_wrapper(partial(method, backend="reference"), method)
