"""Relevance of visual tokens to a text, CDPruner's weight."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .reference.segments import unit_rows


def text_relevance(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """How visual tokens relate to a text, from embeddings in a space that both share: CDPruner's relevance.

    `s_i = -(mean over text embeddings of cosine(image_i, text))`, scaled to about 1e-6..1 by `(s - min + 1e-6) / (max -
    min)`; equal scores give ones. The sign, which prefers patches whose embedding points away from the text's, is the
    official code's. A row without a direction (`flashprune.selectors`) has cosine 0 to all.

    `image_embeds`: floating `[N, C]`, of the tokens of one image or prompt; `text_embeds`: floating `[M, C]`, one
    embedding a text, or a piece of a text longer than the text encoder takes.

    Returns `[N]`, float32 (float64 for float64 embeddings). No host synchronisation.

    Source: CDPruner (arXiv 2506.10967), official code.

    Raises TypeError for embeddings that are not floating point; ValueError for shapes or devices that do not fit.

    >>> import torch
    >>> text_relevance(torch.eye(2), torch.tensor([[1.0, 0.0]]))
    tensor([1.0000e-06, 1.0000e+00])
    """
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        checks.floating(name, embeds)
        if embeds.dim() != 2:
            raise ValueError(f"{name} must be two-dimensional, [tokens, width], got {checks.shape(embeds)}")
    if text_embeds.shape[0] == 0 or text_embeds.shape[1] != image_embeds.shape[1]:
        wanted = f"[M, {image_embeds.shape[1]}] with M at least 1"
        raise ValueError(f"text_embeds must be {wanted}, got {checks.shape(text_embeds)}")
    checks.same_device("text_embeds", text_embeds, image_embeds, "image_embeds")
    dtype = checks.working_dtype(image_embeds)
    text = unit_rows(text_embeds.to(dtype)).mean(0)
    with checks.without_autocast(image_embeds):
        scores = -(unit_rows(image_embeds.to(dtype)) @ text)
    if scores.numel() == 0:
        return scores
    low, high = scores.aminmax()
    return ((scores - low + 1e-6) / (high - low)).where(high > low, scores.new_ones(()))
