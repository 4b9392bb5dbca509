"""What the commands that run a model refuse, and how they load one."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.19")

import torch
from examples import tiny_models
from safetensors.torch import load_file, save_file
from tests.calibration import PROMPT, fails, photo
from tests.vlm import FAMILIES

from flashprune.cli import calibrate as command
from flashprune.cli import models
from flashprune.cli.console import InputError

pytestmark = pytest.mark.usefixtures("one_process")


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


@pytest.mark.parametrize("family", FAMILIES)
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
        other: "of type gpt2; supported are .*internvl, .*llava, llava_next",
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
