"""`flashprune calibrate`: the prior against eager attention weights, runs that stop and go on, and what is refused.

Every expected map is worked out from the weights that eager attention returns and from grids that are known from the
images' sizes; nothing of the calibration is used for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from examples import tiny_models
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import flashprune as fp
from flashprune.cli import app, models
from flashprune.cli import calibrate as command
from flashprune.cli.console import InputError
from flashprune.cli.photos import load_photo
from flashprune.integrations.transformers import Prior, prune
from flashprune.integrations.transformers.calibration import AttentionReader

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
PROMPT = "Describe the image."
TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}  # float32 attention, two ways


class Killed(BaseException):
    """An end that leaves no time for anything."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models as folders."""
    root = tmp_path_factory.mktemp("models")
    for family in tiny_models.FAMILIES:
        tiny_models.save(family, root / family)
    return {family: root / family for family in tiny_models.FAMILIES}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven photographs, in two folders."""
    sizes = [(120, 90), (90, 150), (112, 112), (160, 60), (70, 140), (140, 70), (100, 101)]
    return write_photos(tmp_path / "photos", sizes)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


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


# What is measured


@pytest.mark.parametrize("layer", [0, 2])
def test_mean_of_eager_attention(folders: dict[str, Path], photos: Path, tmp_path: Path, layer: int) -> None:
    out = tmp_path / "prior.safetensors"
    said = succeeds(
        folders["llava"], "--images", photos, "--out", out, "--layer", layer, "--prompt", "What is it?", "--batch", 1
    )
    expected = [eager(folders["llava"], image, layer, "What is it?")[0] for image in images_of(photos)]
    assert_prior(out, torch.stack(expected).mean(0).reshape(1, 8, 8))
    assert f"Prior of llava-4x64, layer {layer}, from 7 images" in said
    assert Prior.load(out).metadata == {
        "model": "llava-4x64",
        "layer": layer,
        "grid": [8, 8],
        "images": 7,
        "skipped": 0,
        "prompt": "What is it?",
        "version": fp.__version__,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "prior.safetensors"]


@pytest.mark.parametrize(("option", "grid"), [([], (24, 24)), (["--grid", "6x9"], (6, 9))])
def test_images_of_any_size_are_resized(
    folders: dict[str, Path], photos: Path, tmp_path: Path, option: list[str], grid: tuple[int, int]
) -> None:
    out = tmp_path / "prior.safetensors"
    succeeds(folders["qwen2_5_vl"], "--images", photos, "--out", out, *option)
    _, processor = models.load(str(folders["qwen2_5_vl"]))
    maps = []
    for image in images_of(photos):
        _, h, w = processor.image_processor([image], return_tensors="pt")["image_grid_thw"][0].tolist()
        attention = eager(folders["qwen2_5_vl"], image)[0]
        maps.append(bilinear(attention.reshape(h // 2, w // 2), grid))
    assert len({one.shape for one in maps}) == 1
    assert_prior(out, torch.stack(maps).mean(0)[None])


def test_base_image_and_tiles_have_maps_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    # 140 x 70 fills two tiles beside each other, 70 x 140 two above each other: nothing is cut off.
    photos = write_photos(tmp_path / "photos", [(140, 70), (70, 140)])
    out = tmp_path / "prior.safetensors"
    succeeds(folders["llava_next"], "--images", photos, "--out", out)
    base, tiles = [], []
    for image, (h, w) in zip(images_of(photos), [(5, 10), (10, 5)], strict=True):
        attention = eager(folders["llava_next"], image)[0]
        assert attention.numel() == 25 + h * (w + 1)  # a newline after each row
        base.append(attention[:25].reshape(5, 5))
        tiles.append(bilinear(attention[25:].reshape(h, w + 1)[:, :w], (5, 5)))
    assert_prior(out, torch.stack([torch.stack(base).mean(0), torch.stack(tiles).mean(0)]))


def test_tiles_of_internvl_share_a_map(folders: dict[str, Path], tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", [(112, 112), (224, 112)])
    out = tmp_path / "prior.safetensors"
    succeeds(folders["internvl"], "--images", photos, "--out", out)
    tiles = torch.cat([eager(folders["internvl"], image)[0].reshape(-1, 4, 4) for image in images_of(photos)])
    assert len(tiles) == 1 + 3  # one tile; two, and a thumbnail
    assert_prior(out, tiles.mean(0)[None])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_every_family(folders: dict[str, Path], photos: Path, tmp_path: Path, family: str) -> None:
    """By the total, which no resizing hides: planes of the model's own grid."""
    out = tmp_path / "prior.safetensors"
    succeeds(folders[family], "--images", photos, "--out", out, "--limit", 1)
    attention = eager(folders[family], images_of(photos)[0])[0]
    if family == "llava_onevision":
        torch.testing.assert_close(Prior.load(out).maps[0].flatten(), attention[:25].float(), **TOLERANCE)
    else:
        assert float(Prior.load(out).maps.sum()) == pytest.approx(float(attention.sum()), rel=0.05)


def test_batches_are_only_faster(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    succeeds(folders["qwen2_5_vl"], "--images", photos, "--out", one)
    succeeds(folders["qwen2_5_vl"], "--images", photos, "--out", many, "--batch", 3)
    assert_prior(many, Prior.load(one).maps)


def test_limit_takes_the_first(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    succeeds(folders["llava"], "--images", photos, "--out", out, "--limit", 2)
    expected = [eager(folders["llava"], image)[0] for image in images_of(photos)[:2]]
    assert_prior(out, torch.stack(expected).mean(0).reshape(1, 8, 8))
    assert Prior.load(out).metadata["images"] == 2


@pytest.mark.parametrize("batch", [1, 3])
def test_what_cannot_be_used_is_skipped(folders: dict[str, Path], photos: Path, tmp_path: Path, batch: int) -> None:
    clean, out = tmp_path / "clean.safetensors", tmp_path / "prior.safetensors"
    succeeds(folders["qwen2_5_vl"], "--images", photos, "--out", clean, "--batch", batch)
    whole = (photos / "0.png").read_bytes()
    (photos / "0cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").touch()
    (photos / "text.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(whole)
    Image.new("RGB", (2000, 3)).save(photos / "narrow.png")  # Qwen's processor refuses it
    said = succeeds(folders["qwen2_5_vl"], "--images", photos, "--out", out, "--batch", batch)
    assert "unusable images 3, other files 1" in " ".join(said.split())
    assert Prior.load(out).metadata["images"] == 7
    assert Prior.load(out).metadata["skipped"] == 4
    assert_prior(out, Prior.load(clean).maps)


# Runs that stop


def stopped_after(monkeypatch: pytest.MonkeyPatch, images: int, error: BaseException) -> None:
    """The model is interrupted when it is given one image more."""
    read, count = AttentionReader.read, iter(range(images))

    def interrupted(self: AttentionReader, inputs: Any) -> Any:
        if next(count, None) is None:
            raise error
        return read(self, inputs)

    monkeypatch.setattr(AttentionReader, "read", interrupted)


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read, calls = AttentionReader.read, [0]

    def counted(self: AttentionReader, inputs: Any) -> Any:
        calls[0] += 1
        return read(self, inputs)

    monkeypatch.setattr(AttentionReader, "read", counted)
    return calls


def test_interrupted_run_goes_on(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "prior.safetensors"
    arguments = (folders["llava_next"], "--images", photos, "--out")
    (photos / "0cut.png").write_bytes(b"no image")
    succeeds(*arguments, whole)
    with monkeypatch.context() as patched:
        stopped_after(patched, 4, KeyboardInterrupt())
        result = run(*arguments, out)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["stopped after 5 of 8 images; run it again to go on"]
    assert not out.exists() and Path(f"{out}.partial").exists()
    calls = counting_reads(monkeypatch)
    succeeds(*arguments, out)
    assert calls == [3]
    assert_same(out, whole)
    assert not Path(f"{out}.partial").exists()


def test_killed_run_goes_on_from_the_last_sums_kept(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "prior.safetensors"
    arguments = (folders["llava"], "--images", photos, "--out")
    succeeds(*arguments, whole)
    script = f"""
import os, sys
from flashprune.cli import calibrate, main
from flashprune.integrations.transformers.calibration import AttentionReader
read, left = AttentionReader.read, iter(range(5))
AttentionReader.read = lambda self, inputs: os._exit(9) if next(left, None) is None else read(self, inputs)
calibrate.SAVE_EVERY = 2
sys.argv = ["flashprune", "calibrate", {str(folders["llava"])!r}, "--images", {str(photos)!r}, "--out", {str(out)!r}]
main()
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    calls = counting_reads(monkeypatch)
    succeeds(*arguments, out)
    assert calls == [3]  # of 7: 4 were kept, the fifth was lost
    assert_same(out, whole)


def test_termination_keeps_the_sums(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    script = f"""
import os, signal, sys
from flashprune.cli import main
from flashprune.integrations.transformers.calibration import AttentionReader
read, left = AttentionReader.read, iter(range(2))
def terminated(self, inputs):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGTERM)
    return read(self, inputs)
AttentionReader.read = terminated
sys.argv = ["flashprune", "calibrate", {str(folders["llava"])!r}, "--images", {str(photos)!r}, "--out", {str(out)!r}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert "stopped after 2 of 7 images" in ended.stderr
    with safe_open(f"{out}.partial", framework="pt") as archive:
        assert json.loads(archive.metadata()["counts"]) == {"files": 2, "images": 2, "skipped": 0}


def test_failure_of_the_model_names_the_image_and_keeps_the_sums(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "prior.safetensors"
    stopped_after(monkeypatch, 3, torch.OutOfMemoryError("the GPU is full"))
    line = fails(folders["llava"], "--images", photos, "--out", out)
    assert line.endswith(f"the model fails on {photos / '4.png'}: the GPU is full")
    assert Path(f"{out}.partial").exists()


@pytest.fixture
def stopped(folders: dict[str, Path], photos: Path, tmp_path: Path) -> Iterator[Path]:
    """The --out of a run of LLaVA that was stopped."""
    out = tmp_path / "prior.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        stopped_after(patched, 2, KeyboardInterrupt())
        assert run(folders["llava"], "--images", photos, "--out", out).exit_code == 130
    yield out


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (["--layer", 2], "layer 1, not 2"),
        (["--prompt", "Hello"], "prompt Describe the image., not Hello"),
        (["--grid", "4x4"], "grid [8, 8], not [4, 4]"),
        (["--batch", 2], "batch 1, not 2"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
        (["--limit", 6], "other images"),
    ],
)
def test_sums_of_other_settings_are_refused(
    folders: dict[str, Path], photos: Path, stopped: Path, changed: list[Any], complaint: str
) -> None:
    arguments = (folders["llava"], "--images", photos, "--out", stopped, *changed)
    line = fails(*arguments)
    assert f"{stopped}.partial is of a run with {complaint}" in line and "--restart" in line
    assert not stopped.exists()
    succeeds(*arguments, "--restart")
    assert stopped.exists() and not Path(f"{stopped}.partial").exists()


def test_sums_of_another_model_or_folder_are_refused(folders: dict[str, Path], photos: Path, stopped: Path) -> None:
    line = fails(folders["llava_next"], "--images", photos, "--out", stopped)
    assert "model llava-4x64, not llava_next-4x64" in line
    photo(0, (50, 60)).save(photos / "new.png")
    assert "other images" in fails(folders["llava"], "--images", photos, "--out", stopped)


def test_damaged_sums_are_refused(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    Path(f"{out}.partial").write_bytes(b"rubbish")
    assert "holds no sums of a stopped run" in fails(folders["llava"], "--images", photos, "--out", out)


def test_sums_of_another_number_of_processes_are_refused(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "prior.safetensors", tmp_path / "prior.safetensors.2-of-4.partial"
    other.touch()
    arguments = (folders["llava"], "--images", photos, "--out", out)
    assert f"{other} is of a run with another number of processes" in fails(*arguments)
    succeeds(*arguments, "--restart")
    assert out.exists() and not other.exists()


# Several processes


def test_two_processes_measure_what_one_does(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    (photos / "0cut.png").write_bytes(b"no image")
    arguments = [str(folders["llava_next"]), "--images", str(photos), "--out"]
    succeeds(*arguments, one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [*launch, "-m", "flashprune.cli", "calibrate", *arguments, str(two)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count(f"wrote {two}") == 1
    assert Prior.load(two).metadata == Prior.load(one).metadata
    # Float64 sums in another order, rounded to float32 once.
    torch.testing.assert_close(Prior.load(two).maps, Prior.load(one).maps, rtol=2**-23, atol=0)
    assert not list(tmp_path.glob("*.partial"))


# What is done with it


def test_prior_file_round_trip(tmp_path: Path) -> None:
    prior = Prior(torch.rand(2, 3, 4), {"model": "llava-4x64", "layer": 1, "grid": [3, 4], "images": 5})
    prior.save(tmp_path / "prior.safetensors")
    found = Prior.load(tmp_path / "prior.safetensors")
    assert torch.equal(found.maps, prior.maps) and found.metadata == prior.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["prior.safetensors"]


def test_pruning_uses_the_prior(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    succeeds(folders["llava"], "--images", photos, "--out", out)
    model, processor = models.load(str(folders["llava"]))
    image = photo(1, (200, 112))
    with prune(model, "d2pruner", 12, prior=out) as handle, torch.no_grad():
        model(**tiny_models.inputs(processor, [[image]], [PROMPT]))
    attention, hidden = eager(folders["llava"], image)
    prior = load_file(out)["prior"].flatten()
    expected = fp.d2pruner(hidden, attention.float(), 12, prior=prior, backend="reference")
    assert handle.last is not None and torch.equal(handle.last.kept[0], expected)
    assert not torch.equal(expected, fp.d2pruner(hidden, attention.float(), 12, backend="reference"))


def test_prior_of_another_model_or_layer_is_refused(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    succeeds(folders["llava"], "--images", photos, "--out", out, "--limit", 1)
    llava, llava_next = (models.load(str(folders[family]))[0] for family in ("llava", "llava_next"))
    with pytest.raises(ValueError, match="layer=1, this is layer=2"):
        prune(llava, "d2pruner", prior=out, layer=2)
    with pytest.raises(ValueError, match="model='llava-4x64', this is model='llava_next-4x64'"):
        prune(llava_next, "d2pruner", prior=out)


def test_other_grid_is_told_of_where_the_model_has_one(
    folders: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    loaded = {family: models.load(str(folders[family]))[0] for family in ("llava", "internvl", "qwen2_5_vl")}
    recwarn.clear()
    for model, shape in [(loaded["llava"], (8, 8)), (loaded["internvl"], (4, 4)), (loaded["qwen2_5_vl"], (7, 5))]:
        prune(model, "d2pruner", prior=torch.rand(shape)).remove()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the prior's 4x6 map is resized to the 8x8 tokens") as told:
        prune(loaded["llava"], "d2pruner", prior=torch.rand(4, 6)).remove()
    assert told[0].filename == __file__


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_maps_must_be_attention(value: float, tmp_path: Path) -> None:
    maps = torch.ones(1, 2, 2)
    maps[0, 1, 1] = value
    save_file({"prior": maps}, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match="finite and not negative"):
        Prior.of_tensor(maps)
    with pytest.raises(ValueError, match="finite and not negative"):
        Prior.load(tmp_path / "prior.safetensors")


def test_file_of_another_writer_is_a_prior(tmp_path: Path) -> None:
    save_file({"prior": torch.ones(1, 2, 2)}, tmp_path / "prior.safetensors", metadata={"format": "pt"})
    assert Prior.load(tmp_path / "prior.safetensors").metadata == {}


def test_files_that_hold_no_prior(tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    with pytest.raises(FileNotFoundError, match=r"prior\.safetensors"):
        Prior.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Prior.load(path)
    for tensors, metadata, complaint in [
        ({"weights": torch.ones(2)}, None, "holds no tensor 'prior'"),
        ({"prior": torch.ones(2, 2)}, None, r"must be floating \[P, h, w\]"),
        ({"prior": torch.ones(1, 2, 2, dtype=torch.int64)}, None, r"must be floating \[P, h, w\]"),
        ({"prior": torch.ones(1, 2, 2)}, {"layer": "one"}, "must be JSON"),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=complaint):
            Prior.load(path)


# Reading attention


def test_reading_leaves_the_model_as_it_was() -> None:
    model, processor = tiny_models.build("qwen3_vl")
    inputs = tiny_models.inputs(processor, [[photo(0, (90, 60))]], [PROMPT])
    seen: list[int] = []
    for index, layer in enumerate(model.base_model.language_model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: seen.append(index))
    with torch.no_grad():
        before = model(**inputs).logits
        seen.clear()
        reader = AttentionReader(model, 1)
        [(item, attention)] = reader.read(inputs)
        assert seen == [0, 1]  # no later layer was run
        with pytest.raises(ValueError, match="no image"):
            reader.read({"input_ids": torch.tensor([[1, 2, 3]])})
        reader.remove()
        assert torch.equal(model(**inputs).logits, before)
    assert len(item) == len(attention) and attention.dtype == torch.float64
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks) and "get_image_features" not in vars(model.base_model)


def test_reader_refuses_a_pruned_model() -> None:
    model, _ = tiny_models.build("llava")
    with prune(model, "fastv"), pytest.raises(ValueError, match="pruned"):
        AttentionReader(model, 1)


# What is refused


def test_wrong_arguments(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    llava, out = folders["llava"], tmp_path / "prior.safetensors"
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    assert "there is no /nowhere" in fails(llava, "--images", "/nowhere", "--out", out)
    assert "must be a folder" in fails(llava, "--images", photos / "0.png", "--out", out)
    assert "no image in" in fails(llava, "--images", tmp_path / "none", "--out", out)
    assert "none of the 1 images" in fails(llava, "--images", tmp_path / "bad", "--out", out)
    assert "must end in .safetensors" in fails(llava, "--images", photos, "--out", tmp_path / "prior.bin")
    assert "there is no folder" in fails(llava, "--images", photos, "--out", tmp_path / "no" / "prior.safetensors")
    assert "--grid must be" in fails(llava, "--images", photos, "--out", out, "--grid", "24")
    assert "layer=3 leaves no layer after it" in fails(llava, "--images", photos, "--out", out, "--layer", 3)
    assert "--dtype must be one of" in fails(llava, "--images", photos, "--out", out, "--dtype", "int8")
    assert "--device must be" in fails(llava, "--images", photos, "--out", out, "--device", "abacus")
    assert not out.exists()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_load(folders: dict[str, Path], family: str) -> None:
    model, processor = models.load(str(folders[family]), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    images = [photo(0, (90, 60)), photo(1, (60, 90))]
    inputs = models.prompt_inputs(processor, images, PROMPT)
    expected = tiny_models.inputs(processor, [images], [PROMPT])
    assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert processor.get_attributes()[:2] == ["image_processor", "tokenizer"]


def test_prompt_without_a_template(folders: dict[str, Path]) -> None:
    _, processor = models.load(str(folders["llava"]))
    processor.chat_template = None
    ids = models.prompt_inputs(processor, [photo(0, (90, 60))], "What is it?")["input_ids"][0]
    assert processor.tokenizer.decode(ids).replace("<image>", "") == "\nWhat is it?"
    assert int((ids == processor.image_token_id).sum()) == 64


def copy(folder: Path, target: Path, leave_out: str = "") -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if not (leave_out and path.name.startswith(leave_out)):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_is_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    llava = folders["llava"]
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "no such"}')
    cut = copy(llava, tmp_path / "cut", "model.safetensors")
    (cut / "model.safetensors").write_bytes((llava / "model.safetensors").read_bytes()[:1000])
    fewer = copy(llava, tmp_path / "fewer", "model.safetensors")
    tensors = load_file(llava / "model.safetensors")
    lost = next(name for name in tensors if "q_proj" in name)
    save_file({name: tensors[name] for name in tensors if name != lost}, fewer / "model.safetensors", {"format": "pt"})
    for name, complaint in {
        tmp_path / "nowhere": "there is no folder",
        tmp_path / "empty": "holds no config.json",
        llava / "config.json": "is a file",
        other: "of type gpt2; supported are internvl, llava",
        unknown: "is not a model that Transformers knows",
        cut: "cannot load the weights",
        fewer: "lacks weights",
        copy(llava, tmp_path / "plain", "processor_config"): "cannot load the processor",
        copy(llava, tmp_path / "mute", "tokenizer"): "cannot load the processor",
    }.items():
        with pytest.raises(InputError, match=complaint):
            models.load(str(name))


def test_gpu_that_is_not_there(folders: dict[str, Path]) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(InputError, match="GPUs here"):
        models.load(str(folders["llava"]), device)


def test_images_are_found_in_one_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.webp", "b.jpeg", "c/.x/3.png", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, others = command.find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.webp", "b.jpeg", "b/2.PNG"]
    assert others == 1
