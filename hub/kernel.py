"""flashprune's selectors in Triton, for one image or video: which k of N visual tokens a multimodal LLM keeps.

Each function returns int64 indices `[k]` on the device of its input, ascending, or with `sort=False` in the order
picked. Inputs are float32, float16 or bfloat16 on a GPU. No host synchronisation. Batches, packed segments and other
backends are in the Python package flashprune.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["dpp_select", "evs_select", "maxmin_select", "mmr_select", "topk_select", "vidcom2_select"]


def topk_select(scores: Tensor, k: int, *, sort: bool = True) -> Tensor:
    """The k highest of scores `[N]`; ties go to the lower index."""
    return _launch("topk", scores, [_budget(k, scores, 1)], None, sort)


def mmr_select(
    features: Tensor, importance: Tensor, k: int, *, lam: float = 0.5, per_round: int = 1, sort: bool = True
) -> Tensor:
    """Maximal marginal relevance (IDPruner): features `[N, D]`, importance `[N]`, `lam` its weight against cosine."""
    k = _budget(k, features, 2)
    return _launch(
        "mmr", features, _per_token("importance", importance, features), [k], None, float(lam), per_round, sort
    )


def maxmin_select(features: Tensor, k: int, *, sort: bool = True) -> Tensor:
    """Greedy max-min diversity by 1 - cosine (DivPrune) of features `[N, D]`."""
    return _launch("maxmin", features, [_budget(k, features, 2)], None, sort)


def dpp_select(features: Tensor, relevance: Tensor, k: int, *, sort: bool = True) -> Tensor:
    """Greedy MAP of a determinantal point process (CDPruner): features `[N, D]`, relevance `[N]`."""
    k = _budget(k, features, 2)
    return _launch("dpp", features, _per_token("relevance", relevance, features), [k], None, sort)


def evs_select(features: Tensor, frames: int, k: int, *, sort: bool = True) -> Tensor:
    """Efficient Video Sampling: features `[N, D]` of a video, frame after frame; k at least the tokens of a frame."""
    k = _budget(k, features, 2)
    if k < _places(features, frames):
        raise ValueError(f"k={k} is less than the {_places(features, frames)} tokens of the first frame")
    return _launch("evs", features, frames, k, sort)


def vidcom2_select(features: Tensor, frames: int, k: int, *, sort: bool = True) -> Tensor:
    """Video Compression Commander: features `[N, D]` of a video, frame after frame; k at least one token a frame."""
    k = _budget(k, features, 2)
    _places(features, frames)
    if k < frames:
        raise ValueError(f"k={k} is less than one token for each of frames={frames}")
    return _launch("vidcom2", features, frames, k / len(features), k, sort)


def _launch(name: str, *arguments: Any) -> Tensor:
    # imported here, so that loading the kernel does not take Triton's seconds
    select = getattr(importlib.import_module(f".triton_kernels.{name}", __name__), f"{name}_select")
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device; no effect for a CPU tensor
        return select(*arguments)


def _budget(k: int, x: Tensor, dims: int) -> int:
    if x.dim() != dims or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        wanted = "[N]" if dims == 1 else "[N, D]"
        raise ValueError(f"expected float32, float16 or bfloat16 {wanted}, got {x.dtype} {list(x.shape)}")
    if not 0 <= k <= len(x):
        raise ValueError(f"k={k} must lie between 0 and N={len(x)}")
    return k


def _per_token(name: str, x: Tensor, features: Tensor) -> Tensor:
    if x.shape != features.shape[:1] or x.device != features.device:
        raise ValueError(f"{name} must be [{len(features)}] on {features.device}, got {list(x.shape)} on {x.device}")
    return x.float()


def _places(features: Tensor, frames: int) -> int:
    if frames < 1 or len(features) % frames:
        raise ValueError(f"frames={frames} must divide N={len(features)}")
    return len(features) // frames
