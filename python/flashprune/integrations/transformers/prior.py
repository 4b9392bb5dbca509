"""D2Pruner's positional prior: the attention that a position receives whatever the image, on file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...importance import resize_prior
from .tokens import Item


@dataclass(frozen=True)
class Prior:
    """Mean attention of calibration images, as maps.

    `maps`: float32 `[P, h, w]`, one for each plane that the model makes of an image (a scale of LLaVA-NeXT), the last
    for all further ones; `metadata`: `model`, `layer`, `grid`, `images`, `prompt`.
    """

    maps: Tensor
    metadata: dict[str, Any]

    def of(self, items: Iterable[Item]) -> Tensor:
        """float32 `[T]`: the prior of each token, the maps resized to the items' grids.

        A resized map keeps its total: that is what an image's tokens receive together, however many they are.
        """
        return torch.cat([self._of(item) for item in items])

    def _of(self, item: Item) -> Tensor:
        planes: list[Tensor] = []
        h, w = self.maps.shape[1:]
        for index, (new_h, new_w) in enumerate(item.planes):
            plane = self.maps[min(index, len(self.maps) - 1)].flatten()
            planes.append(resize_prior(plane, (h, w), (new_h, new_w)) * (h * w / (new_h * new_w)))
        starts = torch.tensor([0, *map(len, planes)]).cumsum(0)
        widths = torch.tensor([width for _, width in item.planes])
        t, y, x = item.positions.long().unbind(1)
        x = torch.minimum(x, widths[t] - 1)  # a newline's neighbour
        return torch.cat(planes)[starts[t] + y * widths[t] + x]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        text = {name: json.dumps(value) for name, value in self.metadata.items()}
        part = Path(f"{os.fspath(path)}.part")
        part.write_bytes(save({"prior": self.maps.contiguous()}, metadata=text))
        part.replace(path)

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
        return cls(maps.float(), {name: json.loads(value) for name, value in text.items()})

    @classmethod
    def of_tensor(cls, prior: Tensor) -> Prior:
        """From `[h, w]` or `[P, h, w]` maps; TypeError or ValueError if it is something else."""
        if not prior.is_floating_point():
            raise TypeError(f"prior must be floating point, got {prior.dtype}")
        if prior.dim() not in (2, 3) or prior.numel() == 0:
            raise ValueError(f"prior must be [h, w] or [P, h, w] maps, got {list(prior.shape)}")
        return cls(prior.detach().float().cpu().reshape(-1, *prior.shape[-2:]), {})

    def check(self, model: str, layer: int) -> None:
        """ValueError if it was measured on another model or layer."""
        for name, wanted in (("model", model), ("layer", layer)):
            found = self.metadata.get(name, wanted)
            if found != wanted:
                raise ValueError(
                    f"prior was measured with {name}={found!r}, this is {name}={wanted!r}: "
                    "measure one with flashprune calibrate"
                )


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
