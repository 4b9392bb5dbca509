"""CDPruner's relevance, where the vision tower is CLIP's: what its patches have to do with the prompt's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...relevance import text_relevance
from .tokens import VisualTokens


class CLIPRelevance:
    """An importance for `prune(model, "cdpruner", importance=CLIPRelevance(...))` on LLaVA-1.5 and LLaVA-NeXT.

    - `clip`: the `CLIPModel` that the model's vision tower is of, such as `openai/clip-vit-large-patch14-336`: its text
      encoder and projections are used, and the model's own tower for the images;
    - `tokenizer`: CLIP's;
    - `prompt`: what the images are asked, as CDPruner takes it: without the system prompt. A string for every prompt; a
      list with one for each of the batch; or a callable that makes that list from `VisualTokens`, from `input_ids` say.
      The attribute can be set anew before each call of the model.

    A text longer than CLIP takes is cut into pieces, whose mean counts. Source: CDPruner (arXiv 2506.10967), official
    code; see `flashprune.text_relevance`.
    """

    def __init__(
        self, clip: Any, tokenizer: Any, prompt: str | Sequence[str] | Callable[[VisualTokens], Sequence[str]]
    ) -> None:
        if getattr(getattr(clip, "config", None), "model_type", None) != "clip":
            raise TypeError(f"clip must be a CLIPModel, got {type(clip).__name__}")
        self.clip = clip
        self.tokenizer = tokenizer
        self.prompt = prompt

    def check(self, base: Any) -> None:
        """ValueError if the tower of a model is not this CLIP's."""
        tower, own = base.config.vision_config, self.clip.config.vision_config
        if tower.model_type != own.model_type:
            raise ValueError(f"importance=CLIPRelevance needs a CLIP vision tower, got {tower.model_type!r}")
        if tower.hidden_size != own.hidden_size:
            raise ValueError(f"clip has width {own.hidden_size}, the model's vision tower {tower.hidden_size}")

    def embed(self, features: Tensor) -> Tensor:
        """`[tiles, n, D]`, the tower's patches, to `[tiles, n, C]` in the space shared with text."""
        with torch.no_grad():
            clip = self.clip
            features = features.to(clip.visual_projection.weight.device, clip.visual_projection.weight.dtype)
            return clip.visual_projection(clip.vision_model.post_layernorm(features))

    def __call__(self, tokens: VisualTokens) -> Tensor:
        """`[T]`, each segment scaled by itself."""
        rows = [segment.row for segment in tokens.segments]
        count = max(rows) + 1 if tokens.input_ids is None else len(tokens.input_ids)
        prompts = self._prompts(tokens, count)
        texts = {text: self._text(text) for text in set(prompts)}
        repeats = count // len(prompts)  # beams
        relevance = []
        for segment in tokens.segments:
            embeds = torch.cat([item.embeds for item in segment.items if item.embeds is not None])
            relevance.append(text_relevance(embeds.float(), texts[prompts[segment.row // repeats]].float()))
        return torch.cat(relevance).to(tokens.features.device)

    def _prompts(self, tokens: VisualTokens, count: int) -> list[str]:
        given = self.prompt(tokens) if callable(self.prompt) else self.prompt
        prompts = [given] if isinstance(given, str) else list(given)
        if not prompts or count % len(prompts):
            raise ValueError(f"prompt must be one string, or one for each of the {count} prompts, got {len(prompts)}")
        return prompts

    def _text(self, text: str) -> Tensor:
        """`[M, C]`, of each piece of a text."""
        with torch.no_grad():
            ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
            longest = self.clip.config.text_config.max_position_embeddings
            pieces = -(-len(ids) // longest)
            padded = ids.new_zeros(pieces * longest)
            padded[: len(ids)] = ids
            mask = (torch.arange(len(padded)) < len(ids)).long()
            where = self.clip.text_projection.weight.device
            found = self.clip.text_model(
                input_ids=padded.view(pieces, longest).to(where), attention_mask=mask.view(pieces, longest).to(where)
            )
            return self.clip.text_projection(found.pooler_output)
