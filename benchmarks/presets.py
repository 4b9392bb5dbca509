"""Shapes of models in use, by name: tokens, features, heads, budgets, grid, and the LLM behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .cases import Case
from .prefill import INTERNLM2_5_7B, QWEN2_5_7B, VICUNA_7B, Model


@dataclass(frozen=True)
class Preset:
    """``shape`` is the grid of visual tokens as they enter the LLM; ``ks`` the budgets; ``vision`` the heads and head
    dimension of the encoder's attention. ``sizes``: tokens of each image of a packed batch, half of which are kept."""

    d: int
    model: Model | None
    shape: tuple[int, ...] = ()
    ks: tuple[int, ...] = ()
    vision: tuple[int, int] = (16, 64)
    sizes: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        if self.sizes:
            return sum(self.sizes)
        count = 1
        for side in self.shape:
            count *= side
        return count


PRESETS = {
    "llava-1.5": Preset(4096, VICUNA_7B, (24, 24), (64, 128)),
    "llava-next": Preset(4096, VICUNA_7B, (5, 24, 24), (288, 720)),
    "internvl2.5": Preset(4096, INTERNLM2_5_7B, (10, 16, 16), (256, 640)),  # 9 tiles of 256 and the thumbnail
    "qwen2.5-vl": Preset(3584, QWEN2_5_7B, (39, 69), (269, 673), (16, 80)),  # 1920×1080 in cells of 28 pixels
    "qwen2.5-vl-video": Preset(3584, QWEN2_5_7B, (24, 32, 32), (2458, 6144), (16, 80)),
    # The sizes are those of `gpu.py`, in the range that UniAttn reports; which LLM follows is not said.
    "uniattn-13-images": Preset(
        3072, None, sizes=(196, 324, 256, 240, 300, 210, 324, 196, 288, 272, 256, 225, 312)
    ),
}  # fmt: skip


def cases_of(name: str, ops: tuple[str, ...], dtype: torch.dtype) -> list[Case]:
    """Every op at every budget. Top-k and importance do not depend on D; packed images have no attention here."""
    preset = PRESETS[name]
    ks = preset.ks or (sum(n // 2 for n in preset.sizes),)
    cases = []
    for op in ops:
        if op in ("query_attention", "received_attention"):
            if not preset.sizes and preset.model is not None:
                cases.append(_attention(op, preset, preset.model, dtype))
            continue
        d, data = (1, "gaussian") if op == "topk" else (preset.d, "photo")
        base = Case(op, preset.n, d, ks[0], data, dtype, shape=preset.shape)
        if preset.sizes:
            base = replace(base, sizes=preset.sizes, keeps=tuple(n // 2 for n in preset.sizes))
        cases += [replace(base, k=k) for k in ks]
    return [replace(case, preset=name) for case in cases]


def _attention(op: str, preset: Preset, model: Model, dtype: torch.dtype) -> Case:
    k = preset.ks[0]
    if op == "query_attention":
        heads = {"heads": model.heads, "kv_heads": model.kv_heads}
        return Case(op, preset.n, model.head_dim, k, "gaussian", dtype, **heads)
    heads_, dim = preset.vision
    return Case(op, preset.n, dim, k, "gaussian", dtype, heads=heads_)
