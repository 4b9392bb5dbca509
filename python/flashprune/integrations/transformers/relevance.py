"""Relevance to the prompt where no tower shares a space with text: by the embeddings that enter the LLM."""

from __future__ import annotations

import torch
from torch import Tensor

from ...relevance import text_relevance
from .tokens import VisualTokens


def prompt_relevance(tokens: VisualTokens) -> Tensor:
    """`[T]`: `flashprune.text_relevance` of each segment's tokens to the text of its prompt, by their embeddings.

    Both are what enters the LLM. The text is every token of this pass that is neither padding nor a placeholder, the
    chat template's among them; each counts alike. ValueError if a prompt has none.
    """
    hidden, text = tokens.hidden, tokens.text
    if hidden is None or text is None:
        raise ValueError("importance='text_relevance' needs tokens of a forward pass: hidden and text")
    relevance = []
    for segment, features in zip(tokens.segments, tokens.features.split(tokens.lengths), strict=True):
        columns = text[segment.row].nonzero().flatten().to(hidden.device)
        if len(columns) == 0:
            raise ValueError(f"importance='text_relevance' needs text beside the images: prompt {segment.row} has none")
        relevance.append(text_relevance(features, hidden[segment.row, columns].to(features.device)))
    return torch.cat(relevance)
