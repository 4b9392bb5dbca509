"""D2Pruner's positional prior: the attention that a position receives whatever the image, on file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...importance import resize_prior
from ...outputs import write_whole
from .tokens import Item

_METADATA = ("model", "layer", "grid", "images", "skipped", "prompt", "version")


@dataclass(frozen=True)
class Prior:
    """Mean attention of calibration images, as maps.

    `maps`: float32 `[P, h, w]`, one for each plane that the model makes of an image (a scale of LLaVA-NeXT), the last
    for all further ones; `metadata`: `model`, `layer`, `grid`, `images`, `skipped`, `prompt` and flashprune's
    `version`, as far as known.
    """

    maps: Tensor
    metadata: dict[str, Any]

    def of(self, items: Iterable[Item]) -> Tensor:
        """float32 `[T]`: the prior of each token, the maps resized to the items' grids."""
        return torch.cat([self._of(item) for item in items])

    def _of(self, item: Item) -> Tensor:
        planes = [resized(self.maps[min(t, len(self.maps) - 1)], grid) for t, grid in enumerate(item.planes)]
        starts = torch.tensor([0, *(plane.numel() for plane in planes)]).cumsum(0)
        widths = torch.tensor([width for _, width in item.planes])
        t, y, x = item.positions.long().unbind(1)
        x = torch.minimum(x, widths[t] - 1)  # a newline's neighbour
        return torch.cat([plane.flatten() for plane in planes])[starts[t] + y * widths[t] + x]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        write_whole(path, self.packed())

    def packed(self) -> bytes:
        """What `save` writes."""
        from safetensors.torch import save

        text = {name: json.dumps(value) for name, value in self.metadata.items()}
        return save({"prior": self.maps.contiguous()}, metadata=text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """Read what `save` wrote. OSError if the file cannot be read; ValueError if it is not such a file."""
        from safetensors import SafetensorError, safe_open

        with open(path, "rb"):  # a missing or unreadable file is an OSError that names it
            pass
        try:
            with safe_open(path, framework="pt") as file:
                if "prior" not in file.keys():  # noqa: SIM118 (not a mapping)
                    raise ValueError(f"{os.fspath(path)} holds no tensor 'prior': write one with flashprune calibrate")
                maps, text = file.get_tensor("prior"), file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
        if maps.dim() != 3 or maps.numel() == 0 or not maps.is_floating_point():
            raise ValueError(
                f"prior in {os.fspath(path)} must be floating [P, h, w], got {maps.dtype} {list(maps.shape)}"
            )
        try:
            return cls(_attention(maps), {name: json.loads(text[name]) for name in _METADATA if name in text})
        except json.JSONDecodeError as error:
            raise ValueError(
                f"metadata of {os.fspath(path)} must be JSON, as flashprune calibrate writes it"
            ) from error

    @classmethod
    def of_tensor(cls, prior: Tensor) -> Prior:
        """From `[h, w]` or `[P, h, w]` maps; TypeError or ValueError if it is something else."""
        if not prior.is_floating_point():
            raise TypeError(f"prior must be floating point, got {prior.dtype}")
        if prior.dim() not in (2, 3) or prior.numel() == 0:
            raise ValueError(f"prior must be [h, w] or [P, h, w] maps, got {list(prior.shape)}")
        return cls(_attention(prior.detach().cpu().reshape(-1, *prior.shape[-2:])), {})

    def check(self, model: Any, layer: int) -> None:
        """ValueError if it was measured on another model or layer; a warning if on another grid than the model has."""
        for name, wanted in (("model", model_name(model)), ("layer", layer)):
            found = self.metadata.get(name, wanted)
            if found != wanted:
                raise ValueError(
                    f"prior was measured with {name}={found!r}, this is {name}={wanted!r}: "
                    "measure one with flashprune calibrate"
                )
        grid, (h, w) = fixed_grid(model), self.maps.shape[1:]
        if grid is not None and grid != (h, w):
            warnings.warn(
                f"the prior's {h}x{w} map is resized to the {grid[0]}x{grid[1]} tokens of the model's images: "
                "measure one with flashprune calibrate",
                UserWarning,
                stacklevel=4,
            )


def resized(plane: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map `[h, w]` of attention on another grid, bilinearly, float32 or float64.

    What all its tokens receive together stays about what it was, however many they are.
    """
    h, w = plane.shape
    new_h, new_w = grid
    return (resize_prior(plane.flatten(), (h, w), grid) * (h * w / (new_h * new_w))).reshape(grid)


def fixed_grid(model: Any) -> tuple[int, int] | None:
    """`(h, w)` of the tokens of a model's image, or of its first scale or tile; None where the image's size says."""
    vision = model.config.vision_config
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if size is None or vision.model_type == "pixtral":
        return None
    ratio = getattr(model.config, "downsample_ratio", 1)
    (height, width), (rows, columns) = (
        sides if isinstance(sides, list | tuple) else (sides, sides) for sides in (size, patch)
    )
    return int(height // rows * ratio), int(width // columns * ratio)


def model_name(model: Any) -> str:
    """What tells a model's priors from another's: type, layers and width, the same from a folder and from the hub."""
    text = model.config.get_text_config()
    return f"{model.config.model_type}-{text.num_hidden_layers}x{text.hidden_size}"


def read_prior(prior: Any) -> Prior:
    """A prior from a file's name, a tensor of maps, or a `Prior`."""
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, Tensor):
        return Prior.of_tensor(prior)
    if isinstance(prior, str | os.PathLike):
        return Prior.load(prior)
    raise TypeError(f"prior must be a file's name, a tensor of maps or a Prior, got {type(prior).__name__}")


def _attention(maps: Tensor) -> Tensor:
    if not bool((maps.isfinite() & (maps >= 0)).all()):
        raise ValueError("prior must be attention: finite and not negative everywhere")
    return maps.float()
