"""`CLIPRelevance`: CDPruner's importance from a model's own CLIP tower."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

import flashprune as fp
from flashprune.integrations.transformers import CLIPRelevance, VisualTokens, prune
from flashprune.integrations.transformers.families import family_of

PROMPTS = ["What is this?", "Compare the two in a sentence that is longer than the text encoder takes at once."]


def clip_of(model: Any) -> CLIPModel:
    """A whole CLIP around a tower of the model's size: its text encoder, which takes 16 tokens, and its projections."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=3,
    )
    vision = model.config.vision_config.to_dict()
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=24)).eval()


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = torch.rand(3, size[1] // 10, size[0] // 10, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).resize(size)


def text_embeds(clip: CLIPModel, tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text).input_ids
    rows = []
    for start in range(0, len(ids), 16):
        piece = ids[start : start + 16]
        padded = torch.tensor([piece + [0] * (16 - len(piece))])
        mask = torch.tensor([[1] * len(piece) + [0] * (16 - len(piece))])
        rows.append(clip.text_projection(clip.text_model(input_ids=padded, attention_mask=mask).pooler_output))
    return torch.cat(rows)


@torch.no_grad()
def test_picks_are_the_reference_on_the_clips_own_relevance() -> None:
    model, processor = tiny_models.build("llava")
    clip = clip_of(model)
    images = [[photo((100, 180), 1)], [photo((90, 60), 2), photo((200, 60), 3)]]
    inputs = tiny_models.inputs(processor, images, PROMPTS)
    relevance = CLIPRelevance(clip, processor.tokenizer, PROMPTS)
    with prune(model, "cdpruner", 0.3, importance=relevance, scope="image") as handle:
        model(**inputs)
    tower = model.base_model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = clip.visual_projection(clip.vision_model.post_layernorm(tower))
    features = model.base_model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    for kept, row, image, tokens in zip(handle.last.kept, [0, 1, 1], embeds, features, strict=True):
        weights = fp.text_relevance(image, text_embeds(clip, processor.tokenizer, PROMPTS[row]))
        assert kept.tolist() == fp.reference.dpp_select(tokens, weights, len(kept)).tolist()
    assert handle.last.counts == [(64, 19)] * 3


@torch.no_grad()
def test_beams_and_the_packing_of_tiles() -> None:
    model, processor = tiny_models.build("llava_next")
    inputs = tiny_models.inputs(processor, [[photo((300, 180), 1)], [photo((90, 300), 2)]], PROMPTS)
    seen: list[VisualTokens] = []

    class Seeing(CLIPRelevance):
        def __call__(self, tokens: VisualTokens) -> Tensor:
            seen.append(tokens)
            return super().__call__(tokens)

    asked: list[int] = []

    def prompts(tokens: VisualTokens) -> list[str]:
        asked.append(0 if tokens.input_ids is None else len(tokens.input_ids))
        return PROMPTS

    importance = Seeing(clip_of(model), processor.tokenizer, prompts)
    with prune(model, "cdpruner", 20, importance=importance) as handle:
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert asked == [4] and [k for _, k in handle.last.counts] == [20] * 4
    assert handle.last.kept[0].tolist() == handle.last.kept[1].tolist() != handle.last.kept[2].tolist()
    for item in seen[0].items:
        newline = item.positions[:, 2] == torch.tensor([w for _, w in item.planes])[item.positions[:, 0].long()]
        assert item.embeds is not None and newline.any()
        assert torch.equal((item.embeds == 0).all(-1), newline)


def test_the_order_of_a_towers_tiles_is_the_features() -> None:
    """Features packed by the adapter are those that the model packs itself."""
    model, processor = tiny_models.build("llava_next")
    inputs = tiny_models.inputs(processor, [[photo((300, 180), 1)], [photo((90, 300), 2)]], PROMPTS)
    base, seen = model.base_model, []
    hook = base.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        found = base.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    hook.remove()
    packed = family_of(model).packed(base, {"image_sizes": inputs["image_sizes"]}, seen[0])
    for ours, theirs in zip(packed, found, strict=True):
        patches = (ours != 0).any(-1)
        assert torch.equal(ours[patches], theirs[patches]) and not patches.all()


def test_wrong_use_leaves_the_model_as_it_was() -> None:
    llava, processor = tiny_models.build("llava")
    qwen, _ = tiny_models.build("qwen2_vl")
    clip = clip_of(llava)
    with pytest.raises(TypeError, match="clip must be a CLIPModel, got LlavaForConditionalGeneration"):
        CLIPRelevance(llava, processor.tokenizer, "hello")
    relevance = CLIPRelevance(clip, processor.tokenizer, "hello")
    with pytest.raises(ValueError, match="needs a CLIP vision tower, got 'qwen2_vl"):
        prune(qwen, "cdpruner", importance=relevance)
    clip.config.vision_config.hidden_size = 48
    with pytest.raises(ValueError, match="clip has width 48, the model's vision tower 32"):
        prune(llava, "cdpruner", importance=relevance)
    clip.config.vision_config.hidden_size = 32
    inputs = tiny_models.inputs(processor, [[photo((100, 180), 1)]], ["hello"])
    with torch.no_grad():
        before = llava(**inputs).logits
        relevance.prompt = ["one", "two"]
        with (
            prune(llava, "cdpruner", importance=relevance),
            pytest.raises(ValueError, match="one for each of the 1 prompts, got 2"),
        ):
            llava(**inputs)
        assert torch.equal(llava(**inputs).logits, before)


@torch.no_grad()
def test_frames_that_the_model_pools() -> None:
    model, processor = tiny_models.build("llava_next_video")
    clip, base = clip_of(model), model.base_model
    frames = [photo((100, 80), seed) for seed in range(3)]
    inputs = tiny_models.video_inputs("llava_next_video", model, processor, frames, PROMPTS[0])
    with prune(model, "cdpruner", 0.3, importance=CLIPRelevance(clip, processor.tokenizer, PROMPTS[0])) as handle:
        model(**inputs)
    tower = base.vision_tower(inputs["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = clip.visual_projection(clip.vision_model.post_layernorm(base.vision_resampler(tower)))
    tokens = base.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output[0].flatten(0, -2)
    weights = fp.text_relevance(embeds.flatten(0, 1), text_embeds(clip, processor.tokenizer, PROMPTS[0]))
    assert handle.last.kept[0].tolist() == fp.reference.dpp_select(tokens, weights, 4).tolist()


def test_a_family_that_cannot_say_which_token_is_which_of_the_tower() -> None:
    model, processor = tiny_models.build("vipllava")
    with pytest.raises(ValueError, match=r"CLIPRelevance needs VipLlava\.packed\(\), which this family"):
        prune(model, "cdpruner", importance=CLIPRelevance(clip_of(model), processor.tokenizer, "What?"))
