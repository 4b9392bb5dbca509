"""importance="text_relevance": of visual tokens to the text of their prompt, by the embeddings that enter the LLM."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm

import flashprune as fp
from flashprune.integrations.transformers import VisualTokens, prune
from flashprune.integrations.transformers.relevance import prompt_relevance

FAMILY = "qwen2_5_vl"


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def by_hand(given: vlm.Whole, row: int, columns: list[int]) -> Tensor:
    """Minus the mean cosine to the prompt's text tokens, scaled to 1e-6 and above."""
    text = given.attended[row] & ~given.visual[row]
    found = -(unit(given.embeds[row, columns]) @ unit(given.embeds[row, text]).T).mean(1)
    return (found - found.min() + 1e-6) / (found.max() - found.min())


@pytest.mark.parametrize("scope", ["request", "image"])
@pytest.mark.parametrize("family", [FAMILY, "llava_onevision"])
def test_cdpruner_keeps_what_its_definition_keeps(family: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    with prune(model, "cdpruner", 0.3, importance="text_relevance", scope=scope) as handle:
        output, last = model(**batch), handle.last
    rest = [given.visual_columns(row) for row in range(3)]
    kept: list[list[int]] = [[], [], []]
    for row, (total, budget) in zip(last.rows, last.counts, strict=True):
        columns, rest[row] = rest[row][:total], rest[row][total:]
        picks = fp.cdpruner(given.embeds[row, columns], by_hand(given, row, columns), budget)
        kept[row] += [columns[pick] for pick in picks.tolist()]
    assert not any(rest) and len(last.rows) == (2 if scope == "request" else 3)
    for row in range(3):
        assert vlm.kept_columns(last, row) == kept[row]
        right = vlm.logits(given, row, kept[row])[0]
        torch.testing.assert_close(output.logits[row, -1], right, atol=vlm.TOLERANCE, rtol=0)


def test_it_follows_the_prompt() -> None:
    model, processor = vlm.built(FAMILY)
    kept = []
    for prompt in ("What is this?", "Read the text on the sign."):
        batch = vlm.tiny_models.inputs(processor, [[vlm.photo("astronaut.png", 200, 112)]], [prompt])
        with prune(model, "topk", 0.3, importance="text_relevance") as handle:
            model(**batch)
        kept.append(vlm.kept_columns(handle.last, 0))
    assert kept[0] != kept[1]


@pytest.mark.skipif("qwen2_5_omni_thinker" not in vlm.MORE, reason="not in this version of Transformers")
def test_audio_is_no_text() -> None:
    model, _ = vlm.built("qwen2_5_omni_thinker")
    batch = vlm.alone("qwen2_5_omni_thinker")
    seen: list[VisualTokens] = []

    def importance(tokens: VisualTokens) -> Tensor:
        seen.append(tokens)
        return prompt_relevance(tokens)

    with prune(model, "topk", 0.3, importance=importance):
        model(**batch)
        text = seen[0].text.clone()
        batch["input_ids"][0, -1] = model.config.audio_token_id
        model(**batch)
    assert text[0, -1] and not seen[1].text[0, -1]
    assert torch.equal(seen[1].text[0, :-1], text[0, :-1])


def test_a_prompt_without_text() -> None:
    model, _ = vlm.built(FAMILY)
    batch: Any = vlm.alone(FAMILY)
    visual = batch["input_ids"] == model.config.image_token_id
    batch = {name: one[visual][None] if one.shape == visual.shape else one for name, one in batch.items()}
    with (
        prune(model, "cdpruner", 0.3, importance="text_relevance"),
        pytest.raises(ValueError, match="needs text beside the images: prompt 0 has none"),
    ):
        model(**batch)
