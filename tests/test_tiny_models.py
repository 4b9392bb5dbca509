"""The models of examples/tiny_models.py load and run as models of the hub do."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models
from examples.tiny_models import FAMILIES, TABLE, internvl, llava, pixtral, squares, video_llama
from transformers import AutoModelForImageTextToText, AutoProcessor

from flashprune.cli.photos import load_photo

# Those whose processors take everything: text alone, several images, an image of any shape.
FEWER = (squares.Squares, pixtral.LightOnOcr, llava.LlavaNextVideo, internvl.QianfanOcr, video_llama.VideoLlama3)
PLAIN = tuple(name for name, family in TABLE.items() if not isinstance(family, FEWER))
build = cache(tiny_models.build)


@cache
def photo(file: str, *box: int) -> Image.Image:
    image = Image.fromarray(load_photo(file))
    return image.crop(box) if box else image


def photos() -> list[Image.Image]:
    """A square, a landscape, a tall, a wide and a small one."""
    square, landscape = photo("astronaut.png"), photo("coffee.png")
    tall, wide = photo("coffee.png", 0, 0, 130, 400), photo("chelsea.png", 0, 0, 451, 110)
    return [square, landscape, tall, wide, square.resize((40, 30))]


def three(processor: Any) -> Any:
    """A batch of one image, of two of other sizes, and of none."""
    square, landscape, tall, *_ = photos()
    prompts = ["What is in the picture?", "Compare.", "Say a word, any word: which one is it going to be?"]
    return tiny_models.inputs(processor, [[square], [landscape, tall], []], prompts)


def placeholders(processor: Any, batch: Any) -> list[int]:
    token = getattr(processor.tokenizer, "image_token_id", processor.image_token_id)
    return (batch["input_ids"] == token).sum(1).tolist()


@torch.no_grad()
def greedy(model: Any, batch: Any, tokens: int) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=tokens, do_sample=False)[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_with_the_auto_classes(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    model, processor = build(family)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    parts = json.loads((tmp_path / "processor_config.json").read_text())
    needs_video = TABLE[family].video_processor is not None  # without it, the folder would not load with torchvision
    assert ("video_processor" in parts) == needs_video
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    batch, same = three(processor), three(again)
    assert batch.keys() == same.keys()
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    assert torch.equal(greedy(model, batch, 2), greedy(loaded, same, 2))


@pytest.mark.parametrize("family", PLAIN)
def test_every_shape_of_image_gives_16_to_150_tokens(family: str) -> None:
    model, processor = build(family)
    for image in photos():
        batch = tiny_models.inputs(processor, [[image]], ["Describe the image."])
        (tokens,) = placeholders(processor, batch)
        assert 16 <= tokens <= 150
        with torch.no_grad():
            logits = model(**batch).logits  # raises where placeholders and features differ in number
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", PLAIN)
def test_a_padded_batch_says_what_its_prompts_say_alone(family: str) -> None:
    model, processor = build(family)
    batch = three(processor)
    one, two, none = placeholders(processor, batch)
    assert one > 0 and two > 0 and none == 0
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()
    together = greedy(model, batch, 4)
    assert together.shape == (3, 4)
    square, landscape, tall, *_ = photos()
    pairs = [([square], "What is in the picture?"), ([landscape, tall], "Compare.")]
    for row, (images, prompt) in enumerate(pairs):
        alone = greedy(model, tiny_models.inputs(processor, [images], [prompt]), 4)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("family", PLAIN)
def test_the_answer_depends_on_image_and_prompt_and_does_not_end_early(family: str) -> None:
    model, processor = build(family)
    square, landscape, *_ = photos()
    images, prompts = [[square], [landscape], [square]], ["What is this?", "What is this?", "Read the text."]
    answers = [
        greedy(model, tiny_models.inputs(processor, [own], [prompt]), 16)[0]
        for own, prompt in zip(images, prompts, strict=True)
    ]
    assert all(len(answer) == 16 for answer in answers)
    assert len({tuple(answer.tolist()) for answer in answers}) == 3
    special = set(processor.tokenizer.added_tokens_decoder)
    assert not special & set(torch.cat(answers).tolist())
    assert isinstance(processor.batch_decode(torch.stack(answers))[0], str)


@pytest.mark.parametrize("family", PLAIN)
def test_text_alone(family: str) -> None:
    model, processor = build(family)
    batch = tiny_models.inputs(processor, [[], []], ["Hello", "Answer the question with a single word."])
    assert placeholders(processor, batch) == [0, 0]
    assert "pixel_values" not in batch
    assert greedy(model, batch, 3).shape == (2, 3)


@pytest.mark.parametrize("family", PLAIN)
def test_the_tokenizer_gives_any_text_back(family: str) -> None:
    _, processor = build(family)
    text = "Ünïcode, 漢字 🙂,  two  spaces,\n\ttabs & <tags> don't change."
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("family", PLAIN)
def test_the_chat_template_takes_images_and_text(family: str) -> None:
    _, processor = build(family)
    content = [{"type": "image", "image": photos()[0]}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A flag."}]
    turns.append({"role": "user", "content": "Which?"})
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.count(tiny_models.TABLE[family].written or tiny_models.IMAGE[family]) == 1
    assert text.index("What?") < text.index("A flag.") < text.index("Which?")
    batch = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert placeholders(processor, batch)[0] >= 16


@pytest.mark.parametrize("family", [family for family in PLAIN if TABLE[family].video])
@pytest.mark.parametrize("frames", [2, 5])
def test_video(family: str, frames: int) -> None:
    model, processor = build(family)
    shown = [photos()[1].resize((200, 150)).rotate(20 * i) for i in range(frames)]
    batch = tiny_models.video_inputs(family, model, processor, shown, "What happens?")
    with torch.no_grad():
        logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert greedy(model, batch, 3).shape == (1, 3)
    other = tiny_models.video_inputs(family, model, processor, shown[::-1], "What happens?")
    with torch.no_grad():
        assert not torch.equal(logits, model(**other).logits)


def test_a_still_video_has_the_patches_of_its_image() -> None:
    _, processor = build("qwen2_vl")
    image = photos()[1]
    still = processor.image_processor([image], return_tensors="pt")
    patches, grid = tiny_models.patches_over_time(processor.image_processor, [image] * 3, shared=False)
    assert grid.tolist() == [[2, *still["image_grid_thw"][0, 1:].tolist()]]
    assert torch.equal(patches, still["pixel_values"].repeat(2, 1))


def test_qwen3_vl_stamps_the_frames_of_a_video() -> None:
    model, processor = build("qwen3_vl")
    batch = tiny_models.video_inputs("qwen3_vl", model, processor, photos()[:1] * 4, "What?")
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.index("<0.2 seconds><|vision_start|>") < text.index("<1.2 seconds><|vision_start|>")


def test_qwen2_5_vl_splits_an_image_into_windows() -> None:
    model, processor = build("qwen2_5_vl")
    batch = tiny_models.inputs(processor, [[photos()[0]]], ["What?"])
    assert batch["image_grid_thw"].tolist() == [[1, 20, 20]]
    vision = model.config.vision_config
    side = vision.window_size // vision.patch_size
    assert 1 < side < 20 and 20 % side  # several windows, those at the border smaller
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth


@pytest.mark.parametrize(("family", "parameters"), [("llava", 7_063_427_072), ("qwen2_5_vl", 8_292_166_656)])
def test_the_real_widths_have_the_published_number_of_parameters(family: str, parameters: int) -> None:
    model, processor = tiny_models.build(family, "real", dtype=torch.bfloat16, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tokens = placeholders(processor, tiny_models.inputs(processor, [[photos()[0]]], ["What?"]))
    assert tokens == ([576] if family == "llava" else [324])  # 512 x 512 pixels are 18 x 18 tokens of 28 x 28


def test_the_seed_decides_the_weights_and_leaves_the_global_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (tiny_models.build("llava", seed=seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"family must be one of llava, .* got 'blip'"):
        tiny_models.build("blip")
    with pytest.raises(ValueError, match="width must be tiny or real, got 'huge'"):
        tiny_models.build("llava", "huge")
    with pytest.raises(ValueError, match="width='real' is there for llava and qwen2_5_vl, got 'internvl'"):
        tiny_models.build("internvl", "real")
    model, processor = build("llava")
    with pytest.raises(ValueError, match="images must hold one list for each prompt, got 1 for 2"):
        tiny_models.inputs(processor, [[]], ["a", "b"])
    with pytest.raises(ValueError, match=r"family must be one with video, .* got 'llava'"):
        tiny_models.video_inputs("llava", model, processor, photos()[:1], "a")
    model, processor = build("internvl")
    with pytest.raises(ValueError, match="frames must hold at least one image, got none"):
        tiny_models.video_inputs("internvl", model, processor, [], "a")
