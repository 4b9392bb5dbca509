"""One small class a family of models: where its visual tokens are, what grid they form, which modules to look into.

To add a family, derive from `Family`, and pass the class to `register_family`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .capture import attention_modules
from .encoders import Calls
from .prefill import Cut
from .tokens import KINDS, Item


class Family:
    """What pruning must know of a model.

    `base` is the model without its head: it has `language_model`, and `get_image_features` and `get_video_features` as
    far as it takes them. `arguments` are those of such a call, by name, and `output` what it returned.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    tower: ClassVar[str] = "vision_tower"  # the encoder, an attribute of the base model
    join_adjacent: ClassVar[bool] = False  # whether items without text between them are tiles of one image

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        """The images or videos of one call of the encoder, in the order of their placeholders."""
        raise self._lacks("items")

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
        """int8 `[B, L]`: -1 for text, else the index of the placeholder's kind in `KINDS`."""
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("the model was given neither input_ids nor inputs_embeds")
        kinds = torch.full(tokens.shape[:2], -1, dtype=torch.int8, device=tokens.device)
        for index, kind in enumerate(KINDS):
            token = getattr(base.config, f"{kind}_token_id", None)
            if token is not None:
                if input_ids is None:  # as Transformers does it: a placeholder's embedding is like no other
                    placeholder = base.get_input_embeddings()(torch.tensor(token, device=tokens.device))
                    found = (tokens == placeholder).all(-1)
                else:
                    found = tokens == token
                kinds[found] = index
        return kinds

    def attention_modules(self, base: Any) -> list[nn.Module]:
        """The self-attention of each of the encoder's layers."""
        return attention_modules(getattr(base, self.tower))

    def default_layer(self, base: Any) -> int:
        """The encoder's layer whose attention is the importance: the one whose output becomes the features."""
        selected = getattr(base.config, "vision_feature_layer", -1)
        selected = selected[-1] if isinstance(selected, list | tuple) else selected
        return selected + len(self.attention_modules(base)) if selected < 0 else selected - 1

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        """Shorten what else the language model is given, if anything."""


class Llava(Family):
    """LLaVA-1.5: the patches of a CLIP tower in raster order. Pixtral towers deliver one grid an image."""

    model_types = ("llava",)

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        if self._one_sequence(base):
            sizes, patch = torch.as_tensor(arguments["image_sizes"]).tolist(), base.config.vision_config.patch_size
            return [Item.of_planes(kind, [(h // patch, w // patch)]) for h, w in sizes]
        return [self._square(kind, len(tokens)) for tokens in output.pooler_output]

    def _one_sequence(self, base: Any) -> bool:
        return base.config.vision_config.model_type == "pixtral"

    def _square(self, kind: str, count: int) -> Item:
        side = math.isqrt(count)
        if side * side == count:
            return Item.of_planes(kind, [(side, side)])
        side = math.isqrt(count - 1)
        return Item.of_planes(kind, [(1, 1), (side, side)])  # the CLS token first

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        if self._one_sequence(base):
            lengths = [len(item) for item in self.items(base, kind, arguments, output)]
            return list(calls.received(lengths).split(lengths))
        tiles = self._tiles(base, calls).unsqueeze(-1)
        return [one.flatten() for one in self.packed(base, arguments, tiles)]

    def packed(self, base: Any, arguments: Mapping[str, Any], tiles: Tensor) -> list[Tensor]:
        return list(tiles)

    def _tiles(self, base: Any, calls: Calls) -> Tensor:
        """`[tiles, n]`: a score for each token that the tower's selected layer delivers."""
        config = base.config.vision_config
        return calls.tiles(
            patches=(config.image_size // config.patch_size) ** 2,
            drop_cls=base.config.vision_feature_select_strategy == "default",
        )


class LlavaNext(Llava):
    """LLaVA-NeXT: a base image, then its tiles put together, cut to the image, a newline token after each row."""

    model_types = ("llava_next",)

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        """The grid is read off the model's own packing, done on ones with newlines of zero."""
        side = base.config.vision_config.image_size // base.config.vision_config.patch_size
        tiles = torch.ones(sum(self._tiles_of_images(base, arguments)), side * side, 1)
        marks = self.packed(base, arguments, tiles)
        return [self._item(kind, side, mark.flatten().round().tolist()) for mark in marks]

    def _item(self, kind: str, side: int, marks: list[float]) -> Item:
        if len(marks) == side * side + 1:
            return Item.of_planes(kind, [(side, side)]).with_last_newline()
        rest = marks[side * side :]
        width, rows = rest.index(0.0), rest.count(0.0)
        return Item.of_planes(kind, [(side, side), (rows, width)], newlines=[1])

    def packed(self, base: Any, arguments: Mapping[str, Any], tiles: Tensor) -> list[Tensor]:
        """By the model's own packing. A newline stands for no patch and has received no attention: 0."""
        packing = inspect.signature(base.pack_image_features).parameters
        names = ("vision_feature_select_strategy", "vision_aspect_ratio")
        options = {
            name: getattr(base.config, name) if arguments.get(name) is None else arguments[name]
            for name in names
            if name in packing
        }
        images = tiles.split(self._tiles_of_images(base, arguments))
        newline = tiles.new_zeros(tiles.shape[-1])
        return base.pack_image_features(images, arguments["image_sizes"], image_newline=newline, **options)[0]

    def _tiles_of_images(self, base: Any, arguments: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        grids, side = base.config.image_grid_pinpoints, base.config.vision_config.image_size
        return [image_size_to_num_patches(size, grids, side) for size in arguments["image_sizes"]]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: images as LLaVA-NeXT's, one tile each where a prompt has several; frames pooled 2 x 2."""

    model_types = ("llava_onevision",)

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        if kind == "image":
            return super().items(base, kind, arguments, output)
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        side = math.ceil(base.config.vision_config.image_size // base.config.vision_config.patch_size / 2)
        return [Item.of_planes(kind, [(side, side)] * frames).with_last_newline()] * videos

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        if kind == "image":
            return super().scores(base, kind, arguments, output, calls)
        pooled = base.apply_pooling(self._tiles(base, calls).unsqueeze(-1))
        videos = pooled.reshape(arguments["pixel_values_videos"].shape[0], -1)
        return list(torch.cat([videos, videos.new_zeros(len(videos), 1)], dim=1))

    def _tiles_of_images(self, base: Any, arguments: Mapping[str, Any]) -> list[int]:
        tiles, together = super()._tiles_of_images(base, arguments), arguments.get("batch_num_images")
        if together is None:
            return tiles
        counts = [count for count in torch.as_tensor(together).tolist() for _ in range(count)]
        return [found if count == 1 else 1 for found, count in zip(tiles, counts, strict=True)]


class InternVL(Llava):
    """InternVL: tiles of one size, each with 2 x 2 of its patches in a token; the tiles of an image adjoin."""

    model_types = ("internvl",)
    join_adjacent = True

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        return [self._square(kind, len(tokens)) for tokens in output.pooler_output]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """What the patches of a token have received, together."""
        (height, width), (patch_height, patch_width) = (
            base.config.vision_config.image_size,
            base.config.vision_config.patch_size,
        )
        rows, columns = height // patch_height, width // patch_width
        tiles = calls.tiles(
            patches=rows * columns, drop_cls=base.config.vision_feature_select_strategy == "default"
        ).reshape(-1, rows, columns, 1)
        merged = base.pixel_shuffle(tiles, scale_factor=base.config.downsample_ratio).sum(-1)
        return list(merged.flatten(1))


class Qwen2VL(Family):
    """Qwen2-VL: each image at its own size, 2 x 2 patches merged, three-dimensional positions."""

    model_types = ("qwen2_vl",)
    tower = "visual"

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        merge = base.config.vision_config.spatial_merge_size
        grids = torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist()
        return [Item.of_planes(kind, [(h // merge, w // merge)] * t) for t, h, w in grids]

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        lengths = [len(item) for item in self.items(base, kind, arguments, output)]
        scores = calls.received(pool=base.config.vision_config.spatial_merge_size**2)
        return list(self._in_order(base, kind, arguments, scores).split(lengths))

    def _in_order(self, base: Any, kind: str, arguments: Mapping[str, Any], scores: Tensor) -> Tensor:
        return scores


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: most layers of the encoder attend in windows, for which the tokens are permuted."""

    model_types = ("qwen2_5_vl",)

    def default_layer(self, base: Any) -> int:
        return base.config.vision_config.fullatt_block_indexes[-1]

    def _in_order(self, base: Any, kind: str, arguments: Mapping[str, Any], scores: Tensor) -> Tensor:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        visual = base.visual
        window_index, _ = get_vision_window_index(
            arguments[f"{kind}_grid_thw"],
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
            kwargs={},
        )
        return scores[torch.argsort(window_index.to(scores.device))]


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of earlier encoder layers are added to the visual tokens after the first layers of the LLM."""

    model_types = ("qwen3_vl",)

    def keep_extras(self, kwargs: dict[str, Any], cut: Cut) -> None:
        if kwargs.get("deepstack_visual_embeds") is not None:
            masks = kwargs["visual_pos_masks"]
            kwargs["visual_pos_masks"] = cut.take(masks) & cut.valid.to(masks.device)
            kwargs["deepstack_visual_embeds"] = [
                embeds.index_select(0, cut.kept.to(embeds.device)) for embeds in kwargs["deepstack_visual_embeds"]
            ]


_families: list[type[Family]] = [Llava, LlavaNext, LlavaOnevision, InternVL, Qwen2VL, Qwen25VL, Qwen3VL]


def register_family(family: type[Family]) -> None:
    """Support the models whose `config.model_type` is among `family.model_types`; the latest registered is asked first.

    Raises TypeError if it is not a class derived from `Family`; ValueError if it names no model type.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"family must be a class derived from Family, got {family!r}")
    if not family.model_types:
        raise ValueError(f"{family.__name__}.model_types is empty: it must name the config.model_type it is for")
    _families.insert(0, family)


def supported() -> list[str]:
    """The model types that can be pruned."""
    return sorted(set(itertools.chain.from_iterable(family.model_types for family in _families)))


def family_of(model: Any) -> Family:
    """The adapter of a model; TypeError or ValueError if there is none."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a Transformers model, got {type(model).__name__}")
    for family in _families:
        if model.config.model_type in family.model_types:
            return family()
    raise ValueError(
        f"model type {model.config.model_type!r} is not supported; supported are {', '.join(supported())}. To add one, "
        "derive a class from flashprune.integrations.transformers.Family that says where its visual tokens are, and "
        "pass it to register_family"
    )
