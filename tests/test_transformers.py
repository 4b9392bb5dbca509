"""Pruned Transformers models compute what a run by hand on the kept tokens computes; off, they are as before."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests import vlm
from tests.vlm import BEFORE, FAMILIES, INSIDE, TOLERANCE, WITH_VIDEO

from flashprune.integrations.transformers import prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

TOKENS = 16
PROMPTS = {"alone": vlm.alone, "three": vlm.three, "video": vlm.video}
CASES = [(family, prompts) for family in FAMILIES for prompts in PROMPTS if prompts != "video" or family in WITH_VIDEO]


def greedy(model: Any, batch: Any, tokens: int = TOKENS, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens} | options
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def check_reply(given: vlm.Whole, row: int, kept: list[int] | None, first_layer: int, found: Any) -> None:
    """Every step's logits, and that its token is the best one."""
    reply = found.sequences[row, given.ids.shape[1] :].tolist()
    right = vlm.logits(given, row, kept, first_layer, reply[:-1])
    steps = torch.stack(found.logits, dim=1)[row]
    torch.testing.assert_close(steps, right, atol=TOLERANCE, rtol=0)
    assert steps.argmax(-1).tolist() == reply


@pytest.mark.parametrize(("family", "prompts"), CASES)
def test_the_oracle_without_pruning_is_the_model(family: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    given, found = vlm.whole(model, batch), greedy(model, batch)
    last = model(**batch).logits[:, -1]
    for row in range(len(last)):
        torch.testing.assert_close(last[row], vlm.logits(given, row, None)[0], atol=TOLERANCE, rtol=0)
        check_reply(given, row, None, 0, found)


@pytest.mark.parametrize("method", BEFORE + INSIDE)
@pytest.mark.parametrize(("family", "prompts"), CASES)
def test_a_pruned_model_computes_what_the_kept_tokens_give_by_hand(family: str, prompts: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    given, first_layer = vlm.whole(model, batch), vlm.first_pruned(method)
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        output = model(**batch)
        prefill = handle.last
        found = greedy(model, batch)
    columns = given.ids.shape[1]
    longest = 0
    for row in range(len(given.ids)):
        kept = vlm.kept_columns(prefill, row)
        assert kept == vlm.kept_columns(handle.last, row)
        visual = given.visual_columns(row)
        assert set(kept) <= set(visual)
        assert len(kept) == round(0.3 * len(visual))
        longest = max(longest, len(given.columns(row)) - len(visual) + len(kept))
        right = vlm.logits(given, row, kept, first_layer)[0]
        torch.testing.assert_close(output.logits[row, -1], right, atol=TOLERANCE, rtol=0)
        assert (right - vlm.logits(given, row, None)[0]).abs().max() > 0.01 or not visual  # the cut shows
        check_reply(given, row, kept, first_layer, found)
    assert prefill.length == (columns, longest)
    assert output.logits.shape[1] == longest


@pytest.mark.parametrize("method", BEFORE + INSIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    before, reply = model(**batch).logits, greedy(model, batch, 6)
    for keep in (1.0, 10_000):
        with prune(model, method, keep, **vlm.settings(method)) as handle:
            assert torch.equal(model(**batch).logits, before)
            found = greedy(model, batch, 6)
            assert handle.last.backend == "none"
            assert handle.last.tokens == handle.last.tokens_kept == int(vlm.whole(model, batch).visual.sum())
        assert torch.equal(found.sequences, reply.sequences)
        assert all(map(torch.equal, found.logits, reply.logits))


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_left_as_it_is(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    batch = vlm.tiny_models.inputs(processor, [[], []], ["Hello, who are you?", "What is next to the sign?"])
    before, reply = model(**batch).logits, greedy(model, batch, 6)
    with prune(model, method, 0.3) as handle:
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(greedy(model, batch, 6).sequences, reply.sequences)
        assert handle.last is None


@pytest.mark.parametrize("method", ["topk", "d2pruner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_pruning_leaves_nothing_behind(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    before, reply = model(**batch).logits, greedy(model, batch, 6)
    footprint = vlm.footprint(model)

    handle = prune(model, method, 0.3, **vlm.settings(method))
    assert vlm.footprint(model) != footprint
    pruned = model(**batch).logits
    greedy(model, batch, 3)
    handle.remove()
    handle.remove()
    assert pruned.shape[1] < before.shape[1]
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, before)
    assert torch.equal(greedy(model, batch, 6).sequences, reply.sequences)

    with pytest.raises(ZeroDivisionError), prune(model, method, 0.3, **vlm.settings(method)):
        model(**batch)
        raise ZeroDivisionError
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("method", ["topk", "d2pruner"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["encoder", "layer"])
def test_a_forward_that_fails_leaves_no_trace_for_the_next(family: str, method: str, where: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.alone(family)
    base = model.base_model
    if where == "layer":
        fails = base.language_model.layers[2].mlp
    else:
        fails = base.visual if family in vlm.QWEN_VL else base.vision_tower
    before, footprint = model(**batch).logits, vlm.footprint(model)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with prune(model, method, 0.3, **vlm.settings(method)):
        pruned = model(**batch).logits
        hook = fails.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
        text = {"input_ids": batch["input_ids"][:, -5:], "attention_mask": batch["attention_mask"][:, -5:]}
        assert model(**text).logits.shape[1] == 5
        assert torch.equal(model(**batch).logits, pruned)
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, before)
