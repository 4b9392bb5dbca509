"""Selections over the frames of one video, with the budgets that serving engines compute before they see a feature.

The contract of vLLM, SGLang and TensorRT-LLM: for `thw`, `merge` and `q` the number kept is
`budget(N, 1 - q, rule="evs" | "vidcom2", tokens_per_frame=...)`, whatever the data, and `indices_to_mask(picks, N)` is
their retention mask. Both selectors work in float32, whatever the features' type; a row without a
direction (`flashprune.selectors`) has cosine 0 to all, and counts as a zero row. No host synchronisation on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import arguments
from .dispatch import resolve
from .operators import call
from .reference import video as reference

__all__ = ["evs_select", "vidcom2_select"]


def evs_select(
    features: Tensor,
    thw: Sequence[int] | Tensor,
    merge: int,
    q: float,
    *,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The tokens of a video that differ most from the token at the same place of the frame before.

    The first frame is kept whole; of the others the tokens with the largest ``1 - cosine`` to their predecessor, over
    the whole video. Source: Efficient Video Sampling (EVS, arXiv 2510.14624), as vLLM 0.33 computes it in
    ``multimodal/video_prune/evs.py``, there in the features' type.

    Args:
        features: ``[N, D]`` with ``N = T * (H // merge) * (W // merge)``, frame after frame; float32, float16 or
            bfloat16. Any strides.
        thw: ``(T, H, W)``, frames and patches of a frame; ints, or an integer tensor ``[3]`` on the CPU.
        merge: patches that the encoder merges into a token, along each side.
        q: the share that is pruned, in [0, 1].
        sort: ascending indices; False puts the first frame first, then the least similar token.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda`` (which is Triton here).

    Returns:
        int64 indices ``[k]``, ``k = max(N // T, int(N * (1 - q)))``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``thw=(4, 6, 8) with merge=2 holds 48 tokens, features
            has 40``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> still, moved = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> evs_select(torch.cat([still, moved]), (2, 1, 2), 1, q=0.25)
        tensor([0, 1, 3])
    """
    frames, _, k = arguments.video("evs", features, thw, merge, q, sort)
    backend = resolve(backend, "evs_select", features.device, features.dtype)
    if backend == "reference":
        return reference.evs_select(features, thw, merge, q=q, sort=sort)
    return call(backend, "evs_select", features, frames, k, sort)


def vidcom2_select(
    features: Tensor,
    thw: Sequence[int] | Tensor,
    merge: int,
    q: float,
    *,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The tokens of a video that are least like its average and their frame's, more of them from frames that stand out.

    Tokens are normalised over the half of the channels that vary least over the video. A token's similarity is a sum of
    Gaussians of its distance to the mean token of the video and to that of its frame. Frames share the budget by a
    softmax over how unlike the video their tokens are, at least one token each; each keeps its least similar ones, and
    rounding is made up for over all frames. Source: Video Compression Commander (VidCom2, arXiv 2505.14454), as vLLM
    0.33 computes it in ``multimodal/video_prune/vidcom2.py``, there in the features' type.

    Args:
        features: ``[N, D]`` with ``N = T * (H // merge) * (W // merge)``, frame after frame; float32, float16 or
            bfloat16. Any strides.
        thw: ``(T, H, W)``, frames and patches of a frame; ints, or an integer tensor ``[3]`` on the CPU.
        merge: patches that the encoder merges into a token, along each side.
        q: the share that is pruned, in [0, 1].
        sort: ascending indices; False puts tokens within their frame's budget first, the least similar ones ahead.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda`` (which is Triton here).

    Returns:
        int64 indices ``[k]``, ``k = max(T, int(N * (1 - q)))``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``thw=(4, 6, 8) with merge=2 holds 48 tokens, features
            has 40``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> vidcom2_select(torch.randn(4 * 6 * 8, 32), (4, 12, 16), merge=2, q=0.75).shape
        torch.Size([48])
    """
    frames, keep, k = arguments.video("vidcom2", features, thw, merge, q, sort)
    backend = resolve(backend, "vidcom2_select", features.device, features.dtype)
    if backend == "reference":
        return reference.vidcom2_select(features, thw, merge, q=q, sort=sort)
    return call(backend, "vidcom2_select", features, frames, keep, k, sort)
