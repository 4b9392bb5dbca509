"""The hooks that make a model prune: what they watch, and the one prefill that they shorten."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.utils import ModelOutput

from ...importance import query_attention
from . import caches, masks
from .clip import CLIPRelevance
from .encoded import add_items, items_of
from .encoders import Calls, Encoding
from .families import Family
from .hooks import Hooks
from .outputs import Asked, not_pruned
from .prefill import Cut, Prefill
from .report import Last, Stopwatch
from .running import Decoding, Forward, Running, Threads
from .selection import Plan
from .tokens import KINDS, VisualTokens, place, segments


class Pruner:
    """Prunes every prefill of a model until removed.

    Watched: the encoder (what images and videos there are, its attention), the base model's arguments (where their
    placeholders are), the language model's (to shorten them), for methods inside the LLM the layers from `layer + 1`
    on, which see the shorter sequence, and the head, of which a caller may ask for certain logits and a loss. What is
    seen of a call is its thread's: see `Threads`.
    """

    def __init__(self, model: Any, family: Family, plan: Plan, layer: int, encoder_layer: int | None) -> None:
        self.plan, self.family, self.layer = plan, family, layer
        self.base: Any = model.base_model
        self.language_model: Any = family.language_model(self.base)
        self._parameters = tuple(inspect.signature(type(self.base).forward).parameters)[1:]  # but self
        self.last = Last()
        self._warned = False
        self._threads = Threads()
        self._hooks = Hooks()
        try:
            self._install(model, encoder_layer)
        except BaseException:
            self.remove()
            raise

    @property
    def _running(self) -> Running:
        return self._threads.running

    @property
    def _first_layer(self) -> int:
        """The first layer that sees fewer tokens."""
        return self.layer + 1 if self.plan.inside else 0

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hooks.remove()
        self._hooks.forget_compiled()

    def _install(self, model: nn.Module, encoder_layer: int | None) -> None:
        hooks = self._hooks
        hooks.forget_compiled()
        if model is not self.base:
            self._watch_head(model)
        hooks.before(self.base, self._enter)
        hooks.after(self.base, self._leave)
        hooks.before(self.language_model, self._enter_language_model)
        hooks.after(self.language_model, self._leave_language_model)
        for layer in self.language_model.layers[self._first_layer :]:
            hooks.before(layer, self._enter_layer)
        for kind, name in self.family.encoders(self.base).items():
            hooks.replace(self.base, name, functools.partial(self._encode, kind))
        if encoder_layer is not None:
            hooks.tap(self.family.attention_modules(self.base)[encoder_layer], self._observe_encoder)
        if isinstance(self.plan.importance, CLIPRelevance):
            hooks.before(self.base.multi_modal_projector, self._enter_projector)
        if self.plan.inside:
            hooks.tap(self.language_model.layers[self.layer].self_attn, self._observe)
            if hasattr(self.language_model, "_deepstack_process"):
                hooks.replace(self.language_model, "_deepstack_process", self._deepstack)

    def _watch_head(self, model: Any) -> None:
        """What is asked of a model with a head, and where it is served."""
        hooks = self._hooks
        hooks.before(model, self._enter_model)
        hooks.after(model, self._check_served, always=False)
        hooks.after(model, self._leave_model)
        hooks.before(model.get_output_embeddings(), self._enter_head)
        hooks.replace(model, "_loss_function", self._loss, model.loss_function)
        make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        hooks.replace(model, "create_masks_for_generate", self._mask_for_generate, make)

    # What the encoder delivers

    def _encode(self, kind: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the base model's function that makes an image's or a video's features."""
        running = self._running
        if running.encoding is not None:  # Qwen3-VL encodes videos by its function for images
            return encode(*args, **kwargs)
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        running.encoding = encoding = Encoding(Calls(self.plan.backend))
        try:
            output = encode(*args, **kwargs)
        finally:
            running.encoding = None
        self._note_items(kind, bound.arguments, output, encoding)
        return output

    def _observe_encoder(self, query: Tensor, key: Tensor, scale: float, kwargs: dict[str, Any]) -> None:
        if self._running.encoding is not None:
            self._running.encoding.calls.observe(query, key, scale, kwargs)

    def _enter_projector(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running.encoding is not None:
            self._running.encoding.features.append(args[0])

    def _note_items(self, kind: str, arguments: Mapping[str, Any], output: Any, encoding: Encoding) -> None:
        if not isinstance(output, ModelOutput):
            return  # a tuple, asked for by a caller of their own: the model itself never does
        family, base = self.family, self.base
        items = family.items(base, kind, arguments, output)
        if self.plan.encoder_attention:
            scores = family.scores(base, kind, arguments, output, encoding.calls)
            items = [replace(item, scores=one) for item, one in zip(items, scores, strict=True)]
        if isinstance(self.plan.importance, CLIPRelevance):
            embeds = family.packed(base, arguments, self.plan.importance.embed(encoding.features[0]))
            items = [replace(item, embeds=one) for item, one in zip(items, embeds, strict=True)]
        add_items(output, items)
        if self._running.forward is not None:
            self._running.forward.encoded[kind] = items

    # What the model is called with

    def _enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        self._running.asked = Asked(model, kwargs)
        return args, kwargs

    def _enter_head(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = self._running.asked
        return None if asked is None else ((asked.states(args[0]), *args[1:]), kwargs)

    def _loss(self, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        asked = self._running.asked
        if asked is None:
            raise not_pruned("the model")
        return asked.loss(compute, *args, **kwargs)

    def _mask_for_generate(
        self,
        make: Callable[..., Any],
        *,
        attention_mask: Tensor | None,
        is_first_iteration: bool,
        **kwargs: Any,
    ) -> Tensor | None:
        """For static caches generate makes the masks itself: not here, where only the language model can tell them."""
        if attention_mask is None or is_first_iteration:
            return attention_mask
        more = caches.given(kwargs).get_max_length() - attention_mask.shape[1]
        return pad(attention_mask, (0, more), value=1)  # one shape for all steps, for torch.compile

    def _check_served(self, *_: Any) -> None:
        if self._running.asked is not None:
            self._running.asked.check_served()

    def _leave_model(self, *_: Any) -> None:
        self._running.asked = None

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        caches.lend(caches.given(given), self._first_layer)  # some models make their masks here
        if self._running.asked is not None:
            self._running.asked.reached = True
        self._running.forward = forward = Forward(given.get("input_ids"), given.get("inputs_embeds"), given)
        for kind, output in (given.get("mm_encoder_outputs") or {}).items():
            if output is not None and kind in KINDS:
                items = items_of(output)
                if items is None:
                    raise ValueError(
                        f"mm_encoder_outputs[{kind!r}] was encoded before prune(), or cut by prefill_chunk_size: "
                        "a pruned model must encode its images itself and prefill in one piece"
                    )
                forward.encoded[kind] = items

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward, self._running.forward = self._running.forward, None
        if forward is not None:  # it never came to the language model
            caches.take_back(caches.given(forward.arguments))
            if output is not None:
                raise not_pruned(type(self.language_model).__name__)

    def _enter_language_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        running, cache = self._running, caches.given(kwargs)
        forward, running.forward = running.forward, None
        self._forget_decoding()
        caches.lend(cache, self._first_layer)
        prefill = None if forward is None else self._plan_prefill(forward, kwargs)
        running.decoding = decoding = Decoding(caches.given(kwargs), prefill)
        if running.asked is not None:
            running.asked.prefill = prefill
        if prefill is None or forward is None:
            self._continue(decoding, forward, kwargs)
        elif not self.plan.inside:
            self._shorten_inputs(prefill, kwargs)
        return args, kwargs

    def _leave_language_model(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        decoding = self._running.decoding
        self._forget_decoding()
        if (
            output is not None
            and decoding is not None
            and decoding.prefill is not None
            and decoding.prefill.cut is None
        ):
            raise not_pruned(f"a layer of {type(self.language_model).__name__}")

    def _forget_decoding(self) -> None:
        decoding, self._running.decoding = self._running.decoding, None
        if decoding is not None:
            caches.take_back(decoding.cache)

    def _plan_prefill(self, forward: Forward, kwargs: dict[str, Any]) -> Prefill | None:
        """The prefill to prune; None if there is nothing to drop."""
        if not forward.encoded:
            if forward.inputs_embeds is not None and forward.inputs_embeds.shape[1] > 1:
                self._warn_merged()
            return None
        embeds, mask, cache = kwargs["inputs_embeds"], self._mask(forward, kwargs), caches.given(kwargs)
        if cache is None and kwargs.get("use_cache", self.language_model.config.use_cache) is not False:
            cache = kwargs[caches.NAME] = DynamicCache(config=self.language_model.config)
        if cache is not None and cache.is_compileable and any(cache.is_sliding):
            raise ValueError("a static cache with sliding-window layers does not fit a pruned model: use DynamicCache")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must be [B, L] for a pruned model, got {got}")
        kinds = self.family.kinds(self.base, forward.input_ids, forward.inputs_embeds).cpu()
        rows, columns = kinds.shape
        encoded = {
            kind: self.family.delivered(kind, items, forward.arguments) for kind, items in forward.encoded.items()
        }
        placed = place(kinds, encoded, self.family.join_adjacent)
        attended = (
            torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask[:, -columns:].to("cpu", torch.bool)
        )
        text = (kinds == -1) & attended
        tokens = VisualTokens(embeds[:0, 0], segments(placed, self.plan.scope), forward.input_ids, text=text)
        blocks = self.family.blocks(self.base, forward.arguments)
        prefill = Prefill(self.plan, placed, tokens, attended, mask, cache, Stopwatch(), blocks)
        if prefill.budgets == tokens.lengths:
            self.last.note(prefill.selection(embeds))
            return None
        return prefill

    def _warn_merged(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "inputs_embeds came without images: any that are merged into it were not pruned, for nothing tells "
                "where they stand. Pass input_ids, or the embeddings of the placeholders, with pixel_values or "
                "mm_encoder_outputs, and let the model merge them",
                UserWarning,
                stacklevel=2,
            )

    def _mask(self, forward: Forward | None, kwargs: dict[str, Any]) -> Any:
        """The caller's mask: some models make others of it before they call the decoder."""
        return (kwargs if forward is None else forward.arguments).get("attention_mask")

    def _continue(self, decoding: Decoding, forward: Forward | None, kwargs: dict[str, Any]) -> None:
        """Decoding, or more text, on a cache that was pruned: the caller's mask counts what the cache lacks."""
        cache = decoding.cache
        before = caches.pruned(cache)
        if cache is None or before is None:
            return
        embeds, mask = kwargs["inputs_embeds"], self._mask(forward, kwargs)
        columns = caches.columns(cache, before.first_layer, mask, len(embeds), embeds.device, embeds.shape[1])
        padded = caches.padded(cache, mask)
        if before.first_layer == 0:
            kwargs["attention_mask"] = self._masks(
                kwargs, columns, padded, cache.get_seq_length() + embeds.shape[1], cache, {}
            )
        else:
            shorter = columns >= 0 if padded else None
            decoding.shorter = {"attention_mask": self._causal_mask(embeds, shorter, cache, before.first_layer)}

    def _masks(
        self,
        kwargs: dict[str, Any],
        columns: Tensor,
        padded: bool,
        seen: int,
        cache: Any,
        blocks: Mapping[str, Tensor],
    ) -> Any:
        """The decoder's mask: of the columns, where it makes its own of that, else those that it uses."""
        config = self.language_model.config
        if blocks or isinstance(kwargs.get("attention_mask"), dict) or masks.differ(config):
            cut = self.family.windows_cut_blocks
            return masks.prepare(config, kwargs["inputs_embeds"], columns, padded, seen, cache, blocks, cut)
        return columns >= 0 if padded else None

    # Before the LLM

    def _shorten_inputs(self, prefill: Prefill, kwargs: dict[str, Any]) -> None:
        """Everything that the language model is given."""
        embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        cut = self._choose(prefill, embeds)
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + prefill.past
        if positions.dim() == 3:
            # Without the row of text positions that generate puts first: what is not consecutive would count as packed.
            kwargs["position_ids"] = cut.take(positions[-3:].permute(1, 2, 0)).permute(2, 0, 1)
        else:
            kwargs["position_ids"] = cut.take(positions)
        kwargs["inputs_embeds"] = cut.take(embeds)
        seen = prefill.past + embeds.shape[1]
        shorter = prefill.record(cut, self._first_layer)
        assert prefill.columns is not None
        kwargs["attention_mask"] = self._masks(
            kwargs, prefill.columns, shorter is not None, seen, prefill.cache, prefill.shorter_blocks(cut)
        )
        self.family.keep_extras(kwargs, cut)

    # Inside the LLM

    def _observe(self, query: Tensor, key: Tensor, scale: float, kwargs: dict[str, Any]) -> None:
        """Attention of each prompt's last token, from the queries and keys of the layer before the pruning."""
        decoding = self._running.decoding
        prefill = None if decoding is None else decoding.prefill
        if decoding is None or prefill is None:
            return
        columns, past = prefill.attended.shape[1], prefill.past
        key = key[:, :, : past + columns]  # all that a static cache holds yet
        seen = None if prefill.mask is None else prefill.mask[:, :past].to("cpu", torch.bool)
        rows = [one.row for one in prefill.placed]
        with prefill.stopwatch.running(key.device), torch.no_grad():
            for row in dict.fromkeys(rows):
                attended = prefill.attended[row]
                if past:
                    before = torch.ones(past, dtype=torch.bool) if seen is None else seen[row]
                    attended = torch.cat([before, attended])
                visible = attended.nonzero().flatten()
                visual = torch.cat([one.columns for one in prefill.placed if one.row == row]) + past
                decoding.attention.append(
                    query_attention(
                        query[row, :, visible[-1] - past].unsqueeze(0),
                        _take(key[row], visible).transpose(0, 1),
                        scale=scale,
                        visual=torch.searchsorted(visible, visual).to(key.device),
                        backend=self.plan.backend,
                    )
                )

    def _enter_layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        decoding = self._running.decoding
        if decoding is None or (decoding.prefill is None and decoding.shorter is None):
            return None
        if not self.plan.inside:
            kwargs["position_ids"] = None  # not consecutive: FlashAttention would take them for packed sequences
            return args, kwargs
        if decoding.prefill is not None and decoding.shorter is None:
            hidden = self._shorten_hidden(decoding, decoding.prefill, args[0], kwargs)
            args = (hidden, *args[1:])
        assert decoding.shorter is not None
        kwargs.update(decoding.shorter)
        return args, kwargs

    def _shorten_hidden(self, decoding: Decoding, prefill: Prefill, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states, rotary embeddings and mask at the first layer that sees fewer tokens."""
        prefill.tokens.attention = torch.cat(decoding.attention)
        cut = self._choose(prefill, hidden)
        hidden = cut.take(hidden)
        mask = prefill.record(cut, self._first_layer)
        assert prefill.columns is not None
        block = prefill.shorter_blocks(cut).get("full_attention")
        same = None if block is None else masks.same_block(prefill.columns, block)
        decoding.shorter = {
            "attention_mask": self._causal_mask(hidden, mask, prefill.cache, self._first_layer, same),
            "position_embeddings": tuple(cut.take(one) for one in kwargs["position_embeddings"]),
            "position_ids": None,
        }
        return hidden

    def _choose(self, prefill: Prefill, hidden: Tensor) -> Cut:
        with self._running.apart():
            cut = prefill.choose(hidden)
        self.last.note(prefill.selection(hidden))
        return cut

    def _causal_mask(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        cache: Any,
        layer: int,
        same_block: Callable[..., Tensor] | None = None,
    ) -> Any:
        return create_causal_mask(
            config=self.language_model.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            **{caches.NAME: cache},
            or_mask_function=same_block,
            layer_idx=layer,
        )

    def _deepstack(self, process: Callable[..., Tensor], hidden: Tensor, marks: Tensor, embeds: Tensor) -> Tensor:
        """Qwen3-VL adds features of the encoder after its first layers: after the pruning, to fewer tokens."""
        decoding = self._running.decoding
        cut = None if decoding is None or decoding.prefill is None else decoding.prefill.cut
        if cut is not None:
            kwargs: dict[str, Any] = {"visual_pos_masks": marks, "deepstack_visual_embeds": [embeds]}
            self.family.keep_extras(kwargs, cut)
            marks, (embeds,) = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
        return process(hidden, marks, embeds)


def _take(keys: Tensor, visible: Tensor) -> Tensor:
    """The visible columns of `[H, L, d]`, a view if they adjoin."""
    first, last = int(visible[0]), int(visible[-1])
    if last - first + 1 == len(visible):
        return keys[:, first : last + 1]
    return keys[:, visible.to(keys.device)]
