"""What pruning must know of a model, and how most models answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..capture import attention_modules
from ..encoders import Calls
from ..prefill import Cut
from ..tokens import KINDS, Item


class Family:
    """What pruning must know of a model.

    `base` is the model without its head: it has the language model and the encoders, functions that make an image's or
    a video's features. `arguments` are those of such a call, by name, and `output` what it returned.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    text_model: ClassVar[str] = "language_model"  # the decoder, an attribute of the base model
    tower: ClassVar[str] = "vision_tower"  # the encoder, likewise
    windows_cut_blocks: ClassVar[bool] = False  # whether the tokens of a block (`blocks`) see no further than a window
    join_adjacent: ClassVar[bool] = False  # whether items without text between them are tiles of one image

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        """The images or videos of one call of the encoder, in the order of their placeholders."""
        raise self._lacks("items")

    def delivered(self, kind: str, items: Sequence[Item], arguments: Mapping[str, Any]) -> Sequence[Item]:
        """What of `items` enters the LLM; `arguments` are those of the base model's forward."""
        return items

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """`[n]` for each of `items`, from the attention of the encoder's layer that `calls` saw.

        Only `importance="received_attention"` asks for it.
        """
        raise self._lacks("scores")

    def packed(self, base: Any, arguments: Mapping[str, Any], tiles: Tensor) -> list[Tensor]:
        """`[tiles, n, C]`, something of each of a tower's tokens, as `[n, C]` for each of `items`; newlines get 0.

        Only `CLIPRelevance` asks for it.
        """
        raise self._lacks("packed")

    def _lacks(self, name: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} defines no {name}(): see the families of flashprune")

    def kinds(self, base: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """int8 `[B, L]`: -1 for text, -2 for audio, else the index of the placeholder's kind in `KINDS`."""
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("the model was given neither input_ids nor inputs_embeds")
        kinds = torch.full(tokens.shape[:2], -1, dtype=torch.int8, device=tokens.device)
        for index, kind in [*enumerate(KINDS), (-2, "audio")]:
            token = getattr(base.config, f"{kind}_token_id", None)
            if token is not None:
                if input_ids is None:  # as Transformers does it: a placeholder's embedding is like no other
                    placeholder = base.get_input_embeddings()(torch.tensor(token, device=tokens.device))
                    found = (tokens == placeholder.to(tokens.device)).all(-1)
                else:
                    found = tokens == token
                kinds[found] = index
        return kinds

    def language_model(self, base: Any) -> Any:
        """The decoder: takes embeddings, has `layers`, each with `self_attn`."""
        return self._module(base, "text_model")

    def encoders(self, base: Any) -> dict[str, str]:
        """The base model's functions that make features, by the kind of `KINDS` that they encode."""
        return {kind: name for kind in KINDS if hasattr(base, name := f"get_{kind}_features")}

    def check(self, base: Any) -> None:
        """ValueError for a model without what the hooks need."""
        name, model, decoder = type(self).__name__, type(base).__name__, f"{type(base).__name__}.{self.text_model}"
        if type(self).items is Family.items:
            raise ValueError(f"{name} defines no items(): it must say which images and videos a call encodes")
        layers = getattr(self.language_model(base), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"{decoder} has no list of layers: {name}.text_model must name the decoder")
        missing = [function for function in self.encoders(base).values() if not hasattr(base, function)]
        if missing or not self.encoders(base):
            wanted = ", ".join(missing) or " or ".join(f"get_{kind}_features" for kind in KINDS)
            raise ValueError(f"{model} has no {wanted}: {name}.encoders() must name the functions that make features")

    def _module(self, base: Any, role: str) -> Any:
        """The module that the attribute `role` of this class names."""
        path = getattr(self, role)
        try:
            return base.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(base).__name__} has no {path}: {type(self).__name__}.{role} must name it"
            ) from None

    def attention_modules(self, base: Any) -> list[nn.Module]:
        """The self-attention of each of the encoder's layers."""
        return attention_modules(self._module(base, "tower"))

    def default_layer(self, base: Any) -> int:
        """The encoder's layer whose attention is the importance: the last one whose output becomes features."""
        config = base.config  # ViP-LLaVA's says layers in older versions of Transformers
        selected = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
        layers = selected if isinstance(selected, list | tuple) else [selected]
        count = len(self.attention_modules(base))
        return max(layer + count if layer < 0 else layer - 1 for layer in layers)

    def blocks(self, base: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Of a prefill, by kind of the LLM's layers: int `[B, L]`, tokens with one number see one another both ways.

        -1 for tokens that only look back. `arguments` are those of the base model's forward. Nothing where all do.
        """
        return {}

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        """Shorten what else the language model is given, if anything."""
