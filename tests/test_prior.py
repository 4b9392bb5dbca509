"""Priors as files, and what pruning does with them."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.19")

import torch
from examples import tiny_models
from safetensors.torch import load_file, save_file
from tests.calibration import PROMPT, eager, photo, succeeds

import flashprune as fp
from flashprune.cli import models
from flashprune.integrations.transformers import Prior, prune

pytestmark = pytest.mark.usefixtures("one_process")


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
