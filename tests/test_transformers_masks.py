"""Decoders whose layers do not all see everything before: windows, images seen both ways, states, on caches too."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm

from flashprune.integrations.transformers import masks, prune

MIXED = [family for family in ("gemma3", "gemma4", "qwen3_5", "aya_vision") if family in vlm.MORE]


def close(found: Any, right: Any, family: str = "") -> None:
    torch.testing.assert_close(found, right, atol=vlm.TOLERANCES.get(family, 1e-4), rtol=0)


def more_text(given: vlm.Whole, batch: Any, turn: torch.Tensor, after: int = 0) -> dict[str, Any]:
    """What the model takes of further tokens `[B, n]` for every prompt, `after` that many others."""
    rows, count = turn.shape
    more = {"input_ids": turn, "attention_mask": functional.pad(batch["attention_mask"], (0, after + count), value=1)}
    if len(given.positions) == 3:  # such models number all that the mask holds, pruned or not
        first = torch.tensor([len(given.columns(row)) + given.deltas[row] for row in range(rows)]) + after
        more["position_ids"] = (first[:, None] + torch.arange(count)).expand(3, rows, count)
    return more


@torch.no_grad()
def check_goes_on(model: Any, batch: Any, family: str) -> None:
    """More text than the window holds, then one token more."""
    given, generator = vlm.whole(model, batch), torch.Generator().manual_seed(0)
    turn = torch.randint(0, 256, (len(given.ids), 26), generator=generator)
    with prune(model, "divprune", 0.3) as handle:
        first = model(**batch)
        cache = first.past_key_values
        second = model(**more_text(given, batch, turn[:, :25]), past_key_values=cache)
        third = model(**more_text(given, batch, turn[:, 25:], 25), past_key_values=cache)
    for row in range(len(given.ids)):
        right = vlm.logits(given, row, vlm.kept_columns(handle.last, row), 0, turn[row].tolist())
        close(first.logits[row, -1], right[0], family)
        close(second.logits[row], right[1:-1], family)
        close(third.logits[row, -1], right[-1], family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MIXED)
def test_a_conversation_goes_on_past_the_window(family: str, attention: str) -> None:
    model, _ = vlm.built(family, attention)
    check_goes_on(model, vlm.three(family), family)


def test_a_decoder_with_one_window_for_all_layers() -> None:
    model, _ = vlm.tiny_models.build("llava_next")
    vlm.decoder(model).config.sliding_window = 24
    check_goes_on(model, vlm.three("llava_next"), "llava_next")
    with pytest.raises(ValueError, match="needs full attention in every layer of the LLM"):
        prune(model, "fastv")


@pytest.mark.parametrize("family", [family for family in ("gemma3", "aya_vision") if family in vlm.MORE])
@torch.no_grad()
def test_a_conversation_goes_on_with_another_image(family: str) -> None:
    model, _ = vlm.built(family)
    batches = [vlm.alone(family), vlm.row(family, 1)]
    parts = [vlm.whole(model, batch) for batch in batches]
    given = vlm.joined(parts, batches)
    given.both_ways = parts[0].both_ways
    mask = torch.cat([batch["attention_mask"] for batch in batches], dim=1)
    with prune(model, "divprune", 0.3) as handle:
        first = model(**batches[0])
        kept = vlm.kept_columns(handle.last, 0)
        later = {**batches[1], "attention_mask": mask, "past_key_values": first.past_key_values}
        found = model(**later).logits[0, -1]
        kept += [column + parts[0].ids.shape[1] for column in vlm.kept_columns(handle.last, 0)]
    close(found, vlm.logits(given, 0, kept)[0])


def test_flash_attention_would_count_the_window_otherwise() -> None:
    config = SimpleNamespace(
        layer_types=["sliding_attention"], sliding_window=4, _attn_implementation="flash_attention_2"
    )
    columns = torch.tensor([[0, 1, 5, 6]])
    with pytest.raises(ValueError, match="more than 4 tokens, the window of this model, needs attn_implementation"):
        masks.prepare(config, torch.zeros(1, 4, 8), columns, False, 7, None, {})


def test_layers_of_an_unknown_kind() -> None:
    config = SimpleNamespace(layer_types=["sliding_attention", "chunked_attention"], sliding_window=4)
    with pytest.raises(ValueError, match="layers of kind chunked_attention cannot be pruned"):
        masks.prepare(config, torch.zeros(1, 4, 8), torch.arange(4)[None], False, 4, None, {})
