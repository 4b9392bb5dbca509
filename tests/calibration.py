"""What the tests of priors and their calibration share: models, photographs, the command, and eager attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.19")

import torch
from examples import tiny_models
from PIL import Image
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from flashprune.cli import app, models
from flashprune.cli.photos import load_photo
from flashprune.integrations.transformers import Prior

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
PROMPT = "Describe the image."
TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}  # float32 attention, two ways


class Killed(BaseException):
    """An end that leaves no time for anything."""


def photo(index: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(load_photo(PHOTOS[index % len(PHOTOS)])).resize(size)


def write_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    (folder / "more").mkdir(parents=True)
    for i, size in enumerate(sizes):
        photo(i, size).save(folder / ("more" if i % 3 == 2 else ".") / f"{i}.png")
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["calibrate", *(str(argument) for argument in arguments)])


def succeeds(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The one line that a wrong input leaves on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flashprune: error: ")
    return lines[0]


@torch.no_grad()
def eager(folder: Path, image: Image.Image, layer: int = 1, prompt: str = PROMPT) -> tuple[Tensor, Tensor]:
    """float64 `[n]`, what the last token pays each visual token in a layer, and `[n, D]`, what enters the next one."""
    model, processor = models.load(str(folder))
    model.set_attn_implementation("eager")
    inputs = tiny_models.inputs(processor, [[image]], [prompt])
    token = processor.tokenizer.convert_tokens_to_ids(tiny_models.IMAGE[folder.name])
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    visual = inputs["input_ids"][0] == token
    return output.attentions[layer][0, :, -1, visual].double().mean(0), output.hidden_states[layer + 1][0, visual]


def images_of(folder: Path) -> list[Image.Image]:
    """In the order of their paths."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    return [Image.open(path).convert("RGB") for path in paths]


def bilinear(plane: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resized with the mean that it has, so that all of it together stays about the same."""
    new = functional.interpolate(plane[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]
    return new * plane.numel() / new.numel()


def assert_prior(path: Path, expected: Tensor) -> None:
    found = Prior.load(path).maps
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.float(), **TOLERANCE)


def assert_same(path: Path, other: Path) -> None:
    """To the last bit."""
    found, expected = Prior.load(path), Prior.load(other)
    assert torch.equal(found.maps, expected.maps) and found.metadata == expected.metadata
