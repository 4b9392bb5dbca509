"""LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..encoders import Calls
from ..tokens import Item
from .base import Family


class Llava(Family):
    """LLaVA-1.5: the patches of a CLIP tower in raster order. Pixtral towers deliver one grid an image."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

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

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)

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


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT's; frames pooled."""

    model_types = ("llava_next_video",)

    def items(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any) -> list[Item]:
        if kind == "image":
            return super().items(base, kind, arguments, output)
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        vision = base.config.vision_config
        side = vision.image_size // vision.patch_size // base.config.spatial_pool_stride
        return [Item.of_planes(kind, [(side, side)] * frames)] * videos

    def scores(self, base: Any, kind: str, arguments: Mapping[str, Any], output: Any, calls: Calls) -> list[Tensor]:
        """A video's: the mean of the patches that are pooled, in whatever way the model pools their features."""
        if kind == "image":
            return super().scores(base, kind, arguments, output, calls)
        frames = self._tiles(base, calls)
        side = math.isqrt(frames.shape[1])
        pooled = functional.avg_pool2d(frames.unflatten(1, (1, side, side)), base.config.spatial_pool_stride)
        return list(pooled.reshape(len(arguments["pixel_values_videos"]), -1))

    def packed(self, base: Any, arguments: Mapping[str, Any], tiles: Tensor) -> list[Tensor]:
        if "pixel_values_videos" not in arguments:
            return super().packed(base, arguments, tiles)
        return list(tiles.unflatten(0, (len(arguments["pixel_values_videos"]), -1)).flatten(1, 2))


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: images as LLaVA-NeXT's, one tile each where a prompt has several; frames pooled 2 x 2."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

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
