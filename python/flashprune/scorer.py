"""The learned scorer of VisionSelector, which is also IDPruner's importance."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import checks

_NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
_KEY = re.compile(r"(?:(?:.*\.)?importance_scorer\.)?([qk]_proj\.(?:weight|bias))")


class VisionSelector(nn.Module):
    """Scores visual tokens by `score_i = mean_j q_i·k_j / sqrt(hidden)`, with q and k linear in the features.

    The mean over j moves inside both linear maps, so a score is one product with a vector that the segment's mean
    feature fixes: `score_i = x_i·(W_q^T m) + b_q·m` with `m = (W_k mean(x) + b_k) / sqrt(hidden)`. Work O(N·D) and no
    N x N matrix, where the definition costs O(N·D·hidden + N²·hidden).

    Sources: VisionSelector (arXiv 2510.16598), `TransformerScorer`; IDPruner (arXiv 2602.13315) uses its raw scores.

    >>> scorer = VisionSelector(in_features=64, hidden=32).requires_grad_(False)
    >>> scorer(torch.randn(576, 64)).shape
    torch.Size([576])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.integer("in_features", in_features, 1)
        self.hidden = checks.integer("hidden", hidden, 1)
        self.q_proj = nn.Linear(in_features, hidden, device=device, dtype=dtype)
        self.k_proj = nn.Linear(in_features, hidden, device=device, dtype=dtype)

    def forward(self, features: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Raw scores of each token, the mean taken over its own segment.

        `features`: `[N, in_features]`; `[B, N, in_features]`; or packed `[T, in_features]` with `cu_seqlens` (int32
        `[B+1]`, on the same device). Returns `[N]`, `[B, N]` or `[T]`, float32 (float64 for float64 features). No host
        synchronisation on a GPU.

        Raises TypeError for features that are not floating point or a `cu_seqlens` that is not int32; ValueError for
        shapes or devices that do not fit.
        """
        checks.floating("features", features)
        if features.dim() not in (2, 3) or features.shape[-1] != self.in_features:
            d = self.in_features
            raise ValueError(f"features must be [N, {d}] or [B, N, {d}], got {checks.shape(features)}")
        checks.same_device("features", features, self.q_proj.weight, "the scorer's weights")
        x = features.to(checks.working_dtype(features))
        w_q, b_q, w_k, b_k = (p.to(x.dtype) for p in (*self.q_proj.parameters(), *self.k_proj.parameters()))
        if cu_seqlens is None:
            mean = x.mean(-2)
        else:
            if features.dim() != 2:
                got = checks.shape(features)
                raise ValueError(f"features must be packed [T, D] when cu_seqlens is given, got {got}")
            checks.check_cu_seqlens(cu_seqlens, features)
            mean = torch.segment_reduce(x, "mean", offsets=cu_seqlens, unsafe=not checks.readable(cu_seqlens))
        with checks.without_autocast(x):
            m = nn.functional.linear(mean, w_k, b_k) * self.hidden**-0.5  # [..., hidden]
            direction, offset = m @ w_q, m @ b_q  # [..., D], [...]
            if cu_seqlens is None:
                return (x @ direction.unsqueeze(-1)).squeeze(-1) + offset.unsqueeze(-1)
        positions = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
        segment = torch.searchsorted(cu_seqlens[1:], positions, right=True)
        return (x * direction[segment]).sum(-1) + offset[segment]

    @classmethod
    def from_checkpoint(cls, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> VisionSelector:
        """A scorer with the trained weights in `source`, frozen (`requires_grad` off), in the dtype they are stored in.

        `source`: a safetensors file, or a state dict, that holds `importance_scorer.{q,k}_proj.{weight,bias}` under any
        prefix (a whole model's checkpoint will do: nothing else is read), or those four names alone.

        Raises ValueError, with every problem in one message, when keys are missing, stand under two prefixes, or have
        shapes that do not fit; or when the file is no safetensors file. OSError when it cannot be read.

        >>> trained = VisionSelector(64, 32).state_dict(prefix="visual.importance_scorer.")
        >>> VisionSelector.from_checkpoint(trained).hidden
        32
        """
        where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
        tensors = _read(source)
        problems = _problems(tensors)
        if problems:
            raise ValueError(f"no fitting importance_scorer in {where}:" + "".join(f"\n  {line}" for line in problems))
        weights = {name: tensors[name][0][1] for name in _NAMES}
        hidden, in_features = weights["q_proj.weight"].shape
        like = weights["q_proj.weight"]
        scorer = cls(in_features, hidden, device=like.device, dtype=like.dtype)
        scorer.load_state_dict(weights)
        return scorer.requires_grad_(False).eval()


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """Every tensor of a scorer in `source`, by its short name: (full key, tensor)."""
    found: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in _NAMES}
    if isinstance(source, Mapping):
        for key, tensor in source.items():
            if match := _KEY.fullmatch(key):
                found[match[1]].append((key, tensor))
        return found
    from safetensors import SafetensorError, safe_open

    with open(source, "rb"):  # a missing or unreadable file is an OSError that names it
        pass
    try:
        with safe_open(source, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if match := _KEY.fullmatch(key):
                    found[match[1]].append((key, file.get_tensor(key)))
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(source)} is not a safetensors file: {error}") from error
    return found


def _problems(found: dict[str, list[tuple[str, Tensor]]]) -> list[str]:
    problems = [f"missing: …importance_scorer.{name}" for name, keys in found.items() if not keys]
    for name, keys in found.items():
        if len(keys) > 1:
            problems.append(f"{name} found {len(keys)} times: {', '.join(key for key, _ in keys)}")
    single = {name: keys[0] for name, keys in found.items() if len(keys) == 1}
    matrices = [t for name, (_, t) in single.items() if name.endswith("weight") and t.dim() == 2]
    hidden, in_features = matrices[0].shape if matrices else ("hidden", "in_features")
    for name, (key, tensor) in single.items():
        expected = [hidden, in_features] if name.endswith("weight") else [hidden]
        if list(tensor.shape) != expected:
            wanted = ", ".join(str(side) for side in expected)
            problems.append(f"{key} must be [{wanted}], got {checks.shape(tensor)}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} must be floating point, got {tensor.dtype}")
    return problems
