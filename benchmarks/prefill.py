"""What pruning saves in the LLM: arithmetic, nothing measured.

Flops of a decoder's prefill and bytes of its key-value cache, before pruning and after, where the layers before the
method's see all tokens and the rest the kept ones. As the pruning papers count: a multiply-add is two flops, attention
over all pairs of tokens (no half for the causal mask), neither embedding nor output head, visual tokens alone unless
``text`` is given.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder with grouped-query attention and a gated MLP; the cache in 16 bits."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    def layer_flops(self, tokens: int) -> int:
        """Of one layer on so many tokens."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (2 * wide + 2 * narrow) + 3 * self.hidden * self.mlp
        return 2 * tokens * weights + 4 * tokens * tokens * wide

    def prefill_flops(self, tokens: int) -> int:
        return self.layers * self.layer_flops(tokens)

    def cache_bytes(self, tokens: int, layers: int) -> int:
        return 2 * 2 * layers * self.kv_heads * self.head_dim * tokens


# From the models' published configurations.
VICUNA_7B = Model("Vicuna-7B", 32, 4096, 11008, 32, 32)
INTERNLM2_5_7B = Model("InternLM2.5-7B", 32, 4096, 14336, 32, 8)
QWEN2_5_7B = Model("Qwen2.5-7B", 28, 3584, 18944, 28, 4)

# Layers that see every token: D2Pruner prunes before the layer with index 2, the others before the LLM.
FULL_LAYERS = {"d2pruner": 2}


@dataclass(frozen=True)
class Saving:
    """Flops of the prefill and bytes of the cache, before and after pruning."""

    flops_before: int
    flops_after: int
    cache_before: int
    cache_after: int

    @property
    def flops_share(self) -> float:
        """The share of the flops that is saved."""
        return 1 - self.flops_after / self.flops_before

    @property
    def cache_share(self) -> float:
        return 1 - self.cache_after / self.cache_before


def saving(model: Model, tokens: int, kept: int, full_layers: int, text: int = 0) -> Saving:
    """Of ``tokens`` visual tokens ``kept`` stay after ``full_layers`` layers, beside ``text`` that always stays."""
    before, after, rest = tokens + text, kept + text, model.layers - full_layers
    return Saving(
        model.prefill_flops(before),
        full_layers * model.layer_flops(before) + rest * model.layer_flops(after),
        model.cache_bytes(before, model.layers),
        model.cache_bytes(before, full_layers) + model.cache_bytes(after, rest),
    )
