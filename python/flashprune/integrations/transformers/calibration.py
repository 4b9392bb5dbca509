"""Measure D2Pruner's positional prior: the mean attention that a prompt's last token pays each place of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import family_of
from .prefill import Prefill
from .prior import resized
from .prune import _ACTIVE, _layer
from .pruner import Pruner
from .running import Decoding
from .selection import Plan
from .tokens import Item

PROMPT = "Describe the image."


class AttentionReader(Pruner):
    """Reads the attention that each prompt's last token pays its visual tokens in one layer of the LLM.

    A forward pass of the model ends after that layer, in an exception of `read`'s own; until `remove()` the model is
    for reading only.

    - `model`: of a supported family; `layer`: of the LLM, 0-based, not the last, as `prune` takes it.

    Raises TypeError or ValueError for an unsupported model, one that is pruned, and a layer that it does not have.
    """

    def __init__(self, model: Any, layer: int) -> None:
        family = family_of(model)
        if getattr(model.base_model, _ACTIVE, None) is not None:
            raise ValueError("model is pruned: call remove() on its handle first")
        plan = _Everything("fastv", keep=1, rule="round", scope="image", backend="auto", options={})
        family.check(model.base_model)
        language_model = family.language_model(model.base_model)
        super().__init__(model, family, plan, _layer(plan, layer, language_model), None)
        self._model = model

    def read(self, inputs: Mapping[str, Any]) -> list[tuple[Item, Tensor]]:
        """Every image and video of `inputs`, the arguments of one forward pass, and its attention.

        Returns them prompt by prompt, each with float64 `[n]` on the CPU: mean over the heads, softmax over the whole
        prompt. Raises ValueError if there is none.
        """
        try:
            with torch.no_grad():
                self._model(**inputs, use_cache=False)
        except _Read as found:
            return found.items
        raise ValueError("inputs hold no image and no video")

    def _shorten_hidden(self, decoding: Decoding, prefill: Prefill, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attention = torch.cat(decoding.attention).double().cpu()
        items = [one.item for one in prefill.placed]
        raise _Read(list(zip(items, attention.split([len(item) for item in items]), strict=True)))


class _Read(Exception):
    def __init__(self, items: list[tuple[Item, Tensor]]) -> None:
        super().__init__("the layer was reached")
        self.items = items


class _Everything(Plan):
    def budgets(self, lengths: list[int]) -> list[int]:
        """Fewer than there are, whatever there is: no pass is left alone."""
        return [0] * len(lengths)


@dataclass(frozen=True)
class Sums:
    """Attention of many images, added up place by place.

    `total`: float64 `[P, h, w]`, for each plane that the model makes of an image, the last for all further ones;
    `planes`: int64 `[P]`, how many were added to each.
    """

    total: Tensor
    planes: Tensor

    @classmethod
    def empty(cls, model: Any, grid: tuple[int, int]) -> Sums:
        """Nothing yet. The tiles of a family that joins them share one map: what a tile shows is chance."""
        planes = 1 if family_of(model).join_adjacent else 2
        return cls(torch.zeros(planes, *grid, dtype=torch.float64), torch.zeros(planes, dtype=torch.int64))

    def plus(self, item: Item, attention: Tensor) -> Sums:
        """The sums with one image more; `attention`: float64 `[n]` of its tokens, of which newlines have no place."""
        total, planes = self.total.clone(), self.planes.clone()
        t, y, x = item.positions.long().unbind(1)
        for plane, (h, w) in enumerate(item.planes):
            here = (t == plane) & (x < w)
            map_ = attention.new_zeros(h * w)
            map_[y[here] * w + x[here]] = attention[here]
            index = min(plane, len(total) - 1)
            total[index] += resized(map_.reshape(h, w), (total.shape[1], total.shape[2]))
            planes[index] += 1
        return Sums(total, planes)

    def mean(self) -> Tensor:
        """float32 `[P, h, w]`: the maps of a `Prior`, without planes that no image had."""
        seen = self.planes > 0
        return (self.total[seen] / self.planes[seen, None, None]).float()
