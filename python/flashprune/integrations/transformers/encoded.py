"""An encoder's output and the images and videos in it: they go together wherever the output goes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from transformers.utils import ModelOutput

from .tokens import Item

_FIELD = "flashprune_items"


def add_items(output: ModelOutput, items: Sequence[Item]) -> None:
    """Note them as a field of the output, which what rebuilds it (accelerate's moves, copies, pickles) carries over."""
    if not hasattr(output, _FIELD):
        output.__class__ = _with_field(type(output))
    setattr(output, _FIELD, tuple(items))


def items_of(output: Any) -> tuple[Item, ...] | None:
    """What `add_items` noted; None if nothing, or if only a part of the output was taken over."""
    return getattr(output, _FIELD, None)


@functools.cache
def _with_field(kind: type[ModelOutput]) -> type[ModelOutput]:
    field = (_FIELD, Any, dataclasses.field(default=None, repr=False))
    return dataclasses.make_dataclass(
        f"Pruned{kind.__name__}", [field], bases=(kind,), namespace={"__reduce__": _parts}
    )


def _parts(output: Any) -> Any:
    """Its class is made where it is needed: a pickle names the one that it was made from."""
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return _put_together, (type(output).__bases__[0], values)


def _put_together(kind: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _with_field(kind)(**values)
