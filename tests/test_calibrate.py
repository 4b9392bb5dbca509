"""`flashprune calibrate`: the prior against eager attention weights.

Every expected map is worked out from the weights that eager attention returns and from grids that are known from the
images' sizes; nothing of the calibration is used for it.
"""

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.19")

import torch
from examples import tiny_models
from PIL import Image
from tests.calibration import (
    PROMPT,
    TOLERANCE,
    assert_prior,
    bilinear,
    eager,
    images_of,
    photo,
    succeeds,
    write_photos,
)

import flashprune as fp
from flashprune.cli import models
from flashprune.integrations.transformers import Prior, prune
from flashprune.integrations.transformers.calibration import AttentionReader

pytestmark = pytest.mark.usefixtures("one_process")


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
