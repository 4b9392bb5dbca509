"""`flashprune profile`: figures that agree with shapes worked out by hand, what clocks cover, and what is refused."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models

import flashprune as fp
from flashprune.cli import app
from flashprune.cli.models import prompt_inputs
from flashprune.cli.photos import load_photo, photo_path
from flashprune.cli.profile import digits, spread
from flashprune.cli.variants import keep_label, read_keep
from flashprune.integrations.transformers import Prior
from flashprune.integrations.transformers.profiling import Variant, measure, prefill, repeated

PHOTO = photo_path("rocket.jpg")
PROMPT = "Describe the image."
TOKEN_BYTES = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16, float32: one token in one layer of the tiny models
LAYERS = 4
FULL = {"d2pruner": 2, "fastv": 2}  # layers that see every token; none where a method prunes before the LLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    tiny_models.save("qwen2_5_vl", path)
    return path


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Any, Any]]:
    return {family: tiny_models.build(family) for family in ("llava", "llava_next", "internvl", "qwen2_5_vl")}


def inputs_of(processor: Any) -> Any:
    return prompt_inputs(processor, [Image.fromarray(load_photo("rocket.jpg"))], PROMPT)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["profile", *(str(argument) for argument in arguments)])


def test_the_figures_are_those_of_the_shapes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    result = run("--model", folder, "--image", PHOTO, "--runs", 2, "--batch", 2, "--json", path)
    assert result.exit_code == 0, result.output
    assert "differs" not in result.stdout and "…" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1]), result.stdout
    assert result.stderr.count("note: d2pruner without prior") == 1
    found = json.loads(path.read_text())
    assert found["format"] == "flashprune-profile/1" and found["machine"]["torch"] == torch.__version__
    assert found["input"]["image"] == "rocket.jpg, 640x427" and found["input"]["batch"] == 2
    text = found["input"]["tokens"] - 96  # 8 x 12 visual tokens of this photograph
    whole, *pruned = found["variants"]
    assert (whole["method"], whole["tokens"], whole["kept"]) == (None, 192, 192)
    assert whole["cache_bytes"] == 2 * LAYERS * (text + 96) * TOKEN_BYTES
    methods = ("divprune", "d2pruner", "fastv", "topk", "idpruner")
    assert [(one["method"], one["keep"]) for one in pruned] == [(m, k) for m in methods for k in (0.5, 0.25, 0.1)]
    for one in pruned:
        kept, full = fp.budget(96, one["keep"]), FULL.get(one["method"], 0)
        assert (one["tokens"], one["kept"]) == (192, 2 * kept)
        assert one["cache_bytes"] == 2 * TOKEN_BYTES * (LAYERS * (text + kept) + full * (96 - kept))
        assert one["cache_bytes"] < whole["cache_bytes"] and one["backend"] in ("cpu", "reference")
        assert ("importance" in one) == (one["method"] in ("topk", "idpruner"))
    for one in found["variants"]:
        seconds = one["seconds"]
        assert all(len(seconds[name]) == 2 for name in ("prefill", "selection", "forward", "first_token"))
        for part, inside, forward in zip(seconds["selection"], seconds["prefill"], seconds["forward"], strict=True):
            assert 0 <= part < inside < forward
            assert (part > 0) == (one["method"] is not None)


def test_random_pixels_of_any_size(folder: Path) -> None:
    options = ("--random-image", "56x84", "--method", "divprune", "--keep", "100%,4", "--runs", 1)
    result = run("--model", folder, *options)
    assert result.exit_code == 0, result.output
    assert "random pixels, 56x84" in result.stdout
    rows = [line.strip() for line in result.stdout.splitlines()]
    kept = {row.split("  ")[0]: row.split()[2] for row in rows if row.startswith(("100 %", "4 tokens"))}
    assert kept == {"100 %": "20", "4 tokens": "4"}  # enlarged to at least 16 tokens: 5 x 4


def test_a_prior_and_a_scorer_from_files(folder: Path, tmp_path: Path) -> None:
    scorer, prior, path = tmp_path / "scorer.safetensors", tmp_path / "prior.safetensors", tmp_path / "runs.json"
    save_file(fp.VisionSelector(64, 8).state_dict(), scorer)
    Prior(torch.rand(1, 4, 4), {}).save(prior)
    options = ("--scorer", scorer, "--prior", prior, "--method", "visionselector,d2pruner", "--keep", 0.25)
    result = run("--model", folder, "--image", PHOTO, *options, "--runs", 1, "--json", path)
    assert result.exit_code == 0, result.output
    assert "without prior" not in result.stderr
    assert "…" not in result.stdout and "visual" in result.stdout
    _, scored, d2pruner = json.loads(path.read_text())["variants"]
    assert scored["scorer"] == d2pruner["prior"] == "from a file"


def wrong(folder: Path, tmp_path: Path) -> list[tuple[Sequence[object], str]]:
    """Options beside a model that is right, and what the line says of them."""
    narrow, other = tmp_path / "narrow.safetensors", tmp_path / "other.safetensors"
    save_file(fp.VisionSelector(32, 8).state_dict(), narrow)
    Prior(torch.rand(1, 4, 4), {"model": "other-1x8", "layer": 1}).save(other)
    text = tmp_path / "text.txt"
    text.write_text("no image")
    return [
        (("--model", tmp_path / "none"), "none"),
        (("--model", tmp_path), "config.json"),
        (("--image", tmp_path / "none.png"), "there is no file"),
        (("--image", text), "is not an image"),
        (("--image", PHOTO, "--random-image", "64x64"), "--image and --random-image"),
        (("--random-image", "64"), "--random-image must be WIDTHxHEIGHT"),
        (("--random-image", "0x64"), "--random-image must be WIDTHxHEIGHT"),
        (("--random-image", "90000x90000"), "at most"),
        (("--method", "divprune,best"), "--method must be of cdpruner"),
        (("--method", "naive_hybrid"), "--method must be of cdpruner"),
        (("--keep", "0"), "--keep must be"),
        (("--keep", "0.5,1.5"), "--keep must be"),
        (("--keep", "half"), "got half"),
        (("--keep", "nan"), "--keep must be"),
        (("--importance", "magic"), "--importance must be received_attention"),
        (("--importance", "received_attention", "--scorer", narrow), "give one"),
        (("--scorer", narrow), "width 32"),
        (("--scorer", tmp_path / "none.safetensors"), "none.safetensors"),
        (("--scorer", text), "not a safetensors file"),
        (("--method", "divprune", "--scorer", narrow), "--scorer is not used by divprune"),
        (("--method", "fastv", "--importance", "received_attention"), "--importance is not used by fastv"),
        (("--method", "divprune", "--prior", other), "--prior belongs to d2pruner"),
        (("--prior", tmp_path / "none.safetensors"), "none.safetensors"),
        (("--prior", other), "other-1x8"),
        (("--device", "toaster"), "--device"),
        (("--dtype", "int8"), "--dtype"),
        (("--json", tmp_path / "none" / "runs.json"), "--json: there is no folder"),
        (("--image", text, "--json", text), "--json"),
    ]


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    for options, said in wrong(folder, tmp_path):
        result = run("--model", folder, "--json", out, *options)
        assert result.exit_code == 2, (options, result.output)
        *notes, line = result.stderr.splitlines()
        assert all(note.startswith("flashprune: note: ") for note in notes), result.stderr
        assert line.startswith("flashprune: error: ") and said in line, (options, line)
        assert result.stdout == "" and not out.exists()


@pytest.mark.parametrize("options", [("--runs", 0), ("--batch", 0), ("--keep",), ()])
def test_what_cannot_be_read_exits_2(folder: Path, options: Sequence[object]) -> None:
    arguments = ("--model", folder, *options) if options else ()
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl"])
def test_a_repeated_prompt_is_the_prompt_in_every_row(built: dict[str, tuple[Any, Any]], family: str) -> None:
    model, processor = built[family]
    inputs = inputs_of(processor)
    one, three = prefill(model, inputs).logits, prefill(model, repeated(inputs, 3)).logits
    assert one.shape[:2] == (1, 1)
    torch.testing.assert_close(three, one.expand(3, -1, -1), rtol=1e-4, atol=4e-5)


def test_the_model_is_as_it_was(built: dict[str, tuple[Any, Any]]) -> None:
    model, processor = built["llava"]
    inputs = inputs_of(processor)
    before = prefill(model, inputs).logits
    hooks = hooks_of(model)
    measure(model, inputs, [Variant(), Variant("divprune", 0.25)], runs=1)
    assert hooks_of(model) == hooks
    assert torch.equal(prefill(model, inputs).logits, before)
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        measure(model, inputs, [Variant()], runs=0)
    with pytest.raises(ValueError, match="needs one importance"):
        measure(model, inputs, [Variant(), Variant("topk", 0.25)], runs=1)
    assert hooks_of(model) == hooks


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@dataclass(frozen=True)
class Noted(Variant):
    """Notes when it runs."""

    order: list[str] = field(default_factory=list)

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        self.order.append(self.method)
        return super().applied(model)


def test_variants_run_in_turns(built: dict[str, tuple[Any, Any]]) -> None:
    model, processor = built["llava"]
    order: list[str] = []
    done: list[int] = []
    variants = [Noted("", order=order), Noted("divprune", 4, order=order), Noted("fastv", 4, order=order)]
    found = measure(
        model, inputs_of(processor), variants, runs=3, first_token=False, progress=lambda: done.append(len(order))
    )
    assert order == ["", "divprune", "fastv"] * 5  # tried, warmed up, and three times timed
    assert done == list(range(4, 16))
    assert all(len(one.prefill) == len(one.forward) == 3 and one.first_token == [] for one in found)


def test_what_the_clocks_cover(built: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in the encoder is outside the prefill, one in the importance within the selection."""
    model, processor = built["llava"]
    pause = 0.05
    encode = type(model.model).get_image_features

    @functools.wraps(encode)
    def slow_encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(pause)
        return encode(self, *args, **kwargs)

    def slow_importance(tokens: Any) -> Any:
        time.sleep(pause)
        return torch.arange(len(tokens.features)).float()

    monkeypatch.setattr(type(model.model), "get_image_features", slow_encode)
    variants = [Variant("topk", 0.25, {"importance": slow_importance}), Variant()]
    slow, whole = measure(model, inputs_of(processor), variants, runs=2)
    for one in (slow, whole):
        assert all(f - p >= pause for f, p in zip(one.forward, one.prefill, strict=True))
    assert all(p > s >= pause for s, p in zip(slow.selection, slow.prefill, strict=True))
    assert all(seconds >= 2 * pause for seconds in slow.first_token) and whole.selection == [0, 0]


def test_how_keeps_are_read_and_written() -> None:
    assert [read_keep(text) for text in ("64", "0.25", "25%", "1", "1.0", "1e-1")] == [64, 0.25, 0.25, 1, 1.0, 0.1]
    assert isinstance(read_keep("1"), int) and isinstance(read_keep("1.0"), float)
    assert [keep_label(keep) for keep in (64, 1, 0.25, 1.0)] == ["64 tokens", "1 token", "25 %", "100 %"]


def test_how_figures_are_written() -> None:
    assert [digits(value) for value in (0.01234, 12.34, 123.4, 1234.4, 0)] == ["0.0123", "12.3", "123", "1234", "0"]
    assert spread([0.003, 0.001, 0.0123]) == "3 (1–12.3)"
