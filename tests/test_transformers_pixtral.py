"""Pixtral towers: images of any size in one packed sequence, a token of text after each row of tokens."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PreTrainedModel,
)

import flashprune as fp
from flashprune.integrations.transformers import VisualTokens, prune

PATCH, IMAGE, BREAK = 8, 40, 41
SIZES = [(32, 48), (24, 40)]  # pixels, height and width: 4 x 6 and 3 x 5 patches
GRIDS = {"llava": [(4, 6), (3, 5)], "mistral3": [(2, 3), (1, 2)]}  # tokens


@pytest.fixture(scope="module", params=GRIDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.3,
    )
    common = {"vision_config": vision, "text_config": text, "image_token_index": IMAGE, "vision_feature_layer": -1}
    if request.param == "llava":
        config = LlavaConfig(**common, image_token_id=IMAGE, vision_feature_select_strategy="full")
    else:
        config = Mistral3Config(**common, spatial_merge_size=2, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    ids = [1, 2]
    for rows, columns in GRIDS[model.config.model_type]:
        for _ in range(rows):
            ids += [IMAGE] * columns + [BREAK]
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 32, 48)
    return {"input_ids": torch.tensor([[*ids, 3, 4]]), "pixel_values": pixels, "image_sizes": torch.tensor(SIZES)}


@torch.no_grad()
def test_each_image_has_its_grid_and_the_attention_inside_it(model: Any, inputs: dict[str, Tensor]) -> None:
    tower = model.base_model.vision_tower(inputs["pixel_values"], image_sizes=SIZES, output_attentions=True)
    weights = tower.attentions[-1][0].mean(0)  # [39, 39], heads averaged
    grids = GRIDS[model.config.model_type]
    with prune(model, "topk", 0.5, importance="received_attention", scope="image") as handle:
        model(**inputs)
    assert handle.last is not None
    assert handle.last.counts == [(h * w, round(h * w / 2)) for h, w in grids]
    assert [item.planes for part in handle.last.items for item in part] == [(grid,) for grid in grids]
    for part, kept, span, patches, (rows, columns) in zip(
        handle.last.items, handle.last.kept, (slice(0, 24), slice(24, 39)), ((4, 6), (3, 5)), grids, strict=True
    ):
        received = weights[span, span].mean(0).reshape(patches)
        side = patches[1] // columns
        tokens = [
            received[side * y : side * y + side, side * x : side * x + side].sum()
            for y in range(rows)
            for x in range(columns)
        ]
        right = torch.stack(tokens)
        torch.testing.assert_close(part[0].scores, right, atol=1e-6, rtol=1e-4)
        assert kept.tolist() == fp.topk_select(right, len(kept)).tolist()
    image = inputs["input_ids"][0] == IMAGE
    for positions in handle.last.positions:
        assert image[positions].all()


@torch.no_grad()
def test_what_goes_on_is_what_was_kept(model: Any, inputs: dict[str, Tensor]) -> None:
    seen: list[VisualTokens] = []

    def importance(tokens: VisualTokens) -> Tensor:
        seen.append(tokens)
        return tokens.features.norm(dim=-1)

    with prune(model, "idpruner", 0.4, importance=importance) as handle:
        logits = model(**inputs).logits[0, -1]
    assert handle.last is not None
    columns = (inputs["input_ids"][0] != IMAGE).nonzero().flatten().tolist() + handle.last.positions[0].tolist()
    columns.sort()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE] = seen[0].features
    features = model.base_model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    torch.testing.assert_close(torch.cat(list(features.pooler_output)), seen[0].features)
    cut = model.base_model.language_model(
        inputs_embeds=embeds[:, columns],
        position_ids=torch.tensor([columns]),
        attention_mask=torch.ones(1, len(columns), dtype=torch.int64),
    )
    torch.testing.assert_close(logits, model.lm_head(cut.last_hidden_state[0, -1]), atol=4e-5, rtol=0)
    assert handle.last.length == (inputs["input_ids"].shape[1], len(columns))
