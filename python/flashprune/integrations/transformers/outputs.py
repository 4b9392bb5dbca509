"""What a call asks of the model's head, in the columns of the prompts as given, served from a shorter sequence.

These are the logits of some positions (`logits_to_keep`) and a loss (`labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .prefill import Cut, Prefill

_IGNORED = -100  # Transformers' label of what does not count


def not_pruned(name: str) -> RuntimeError:
    """What to raise where a pass ended and hooks were not called."""
    return RuntimeError(
        f"nothing was pruned: {name} ran without the hooks of prune(), as code that was compiled, exported or captured "
        "before does; call prune() first, then compile"
    )


class Asked:
    """What one call of a model with a head asks for.

    Positions given as a tensor are kept from the model, which would take them for those of the shorter sequence, and
    looked up when its hidden states enter the head; an int counts from the end, where text is.
    """

    def __init__(self, model: Any, call: dict[str, Any]) -> None:
        self.prefill: Prefill | None = None  # of this call, once it was shortened
        self.reached = False  # whether the base model's hooks ran
        self._model, self._call = model, call
        self._logits_to_keep: Any = call.get("logits_to_keep", 0)
        self._whole = not isinstance(self._logits_to_keep, Tensor) and self._logits_to_keep == 0
        if isinstance(self._logits_to_keep, Tensor):
            call["logits_to_keep"] = 0

    @property
    def _cut(self) -> Cut | None:
        return None if self.prefill is None else self.prefill.cut

    def states(self, states: Tensor) -> Tensor:
        """Of `[B, L', D]` on its way into the head, what was asked for."""
        wanted, cut = self._logits_to_keep, self._cut
        if cut is not None:
            self._check_experts()
        if isinstance(wanted, Tensor):
            self._logits_to_keep = 0
            return _at(states, wanted.to(states.device if cut is None else cut.index.device), cut)
        if self.prefill is not None and not self._whole:
            self.prefill.check_tail(wanted)
        return states

    def _check_experts(self) -> None:
        wanted = self._call.get("output_router_logits")
        if wanted is None:
            wanted = getattr(self._model.config.get_text_config(), "output_router_logits", False)
        if wanted and self._call.get("attention_mask") is not None:
            raise ValueError(
                "output_router_logits with attention_mask does not fit a pruned sequence: the experts' balancing loss "
                "takes the mask of the prompts as given; leave out the mask if nothing is padded, or the router logits"
            )

    def check_served(self) -> None:
        """RuntimeError if the model ran past the hooks, or positions were asked for and the head was not seen."""
        if not self.reached:
            raise not_pruned("the model")
        if isinstance(self._logits_to_keep, Tensor):
            raise RuntimeError("logits_to_keep was not served: the model does not call get_output_embeddings()")

    def loss(self, compute: Callable[..., Tensor], logits: Tensor, labels: Tensor, *args: Any, **more: Any) -> Tensor:
        """The model's own loss, with labels as short as the sequence."""
        if self._cut is not None and self._whole:
            if more.get("shift_labels") is not None:
                raise ValueError("shift_labels do not fit a pruned sequence: give labels alone")
            labels = _shorter(labels, self._cut)
        return compute(logits, labels, *args, **more)


def _at(states: Tensor, wanted: Tensor, cut: Cut | None) -> Tensor:
    """Of `[B, L', D]`, what stood at the columns `[n]` or `[B, n]`, or where a mask `[L]` or `[B, L]` is true."""
    if wanted.dtype == torch.bool and wanted.dim() == 2:
        if cut is not None:
            _check("logits_to_keep", wanted & ~cut.goes_on)
            wanted = cut.take(wanted & cut.goes_on)
        return states[wanted.to(states.device)]
    if wanted.dtype == torch.bool:
        wanted = wanted.nonzero().flatten()
    wanted = wanted.expand(len(states), -1)
    columns = states.shape[1] if cut is None else cut.goes_on.shape[1]
    wanted = torch.where(wanted < 0, wanted + columns, wanted)
    if cut is not None:
        asked = torch.zeros_like(cut.goes_on).scatter(1, wanted, True)
        _check("logits_to_keep", asked & cut.dropped)
        wanted = cut.places.gather(1, wanted)
    return torch.take_along_dim(states, wanted.to(states.device).unsqueeze(-1), dim=1)


def _shorter(labels: Tensor, cut: Cut) -> Tensor:
    """Labels of the columns that go on; what has nothing before it to be predicted from does not count."""
    if labels.shape != cut.goes_on.shape:
        raise ValueError(f"labels must be {list(cut.goes_on.shape)}, as the prompts are, got {list(labels.shape)}")
    goes_on = cut.goes_on.to(labels.device)
    _check("labels", (labels != _IGNORED) & ~goes_on, "give -100 there")
    filler = ~cut.take(goes_on)
    filler[:, 1:] |= filler[:, :-1].clone()
    return cut.take(labels).masked_fill(filler, _IGNORED)


def _check(name: str, wrong: Tensor, instead: str = "ask for others") -> None:
    """ValueError that tells the first of the columns `[B, L]` that are wrong."""
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} has column {column} of prompt {row}, which was dropped or is padding: {instead}")
