"""Pruned Transformers models compute what a run by hand on the kept tokens computes; off, they are as before."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

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


@pytest.mark.parametrize("method", ["divprune", "topk", "d2pruner"])
@pytest.mark.parametrize("order", [(vlm.alone, vlm.video), (vlm.video, vlm.alone)], ids=["image first", "video first"])
@pytest.mark.parametrize("family", [family for family in WITH_VIDEO if family != "internvl"])
def test_an_image_and_a_video_in_one_prompt(family: str, order: Any, method: str) -> None:
    model, _ = vlm.built(family)
    parts = [make(family) for make in order]
    given = vlm.joined([vlm.whole(model, part) for part in parts], parts)
    batch = {name: value for part in parts for name, value in part.items()}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in batch:
            batch[name] = torch.cat([part[name] for part in parts], dim=1)
    with prune(model, method, 0.3, scope="image", **vlm.settings(method)) as handle:
        output = model(**batch)
        found = greedy(model, batch, 6)
    kept = vlm.kept_columns(handle.last, 0)
    kinds = [item.kind for items in handle.last.items for item in items]
    assert kinds == ["image" if make is vlm.alone else "video" for make in order]
    right = vlm.logits(given, 0, kept, vlm.first_pruned(method))[0]
    torch.testing.assert_close(output.logits[0, -1], right, atol=TOLERANCE, rtol=0)
    check_reply(given, 0, kept, vlm.first_pruned(method), found)


@pytest.mark.parametrize("method", ["divprune", "topk", "d2pruner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_given_as_embeddings(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    places = {"position_ids": given.positions} if family in vlm.QWEN_VL else {}
    embedded = {name: value for name, value in batch.items() if name not in ("input_ids", "mm_token_type_ids")}
    embedded |= {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), **places}
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        right, kept = model(**batch, **places).logits, [one.tolist() for one in handle.last.positions]
        found = model(**embedded).logits
    assert [one.tolist() for one in handle.last.positions] == kept
    torch.testing.assert_close(found, right, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["divprune", "topk", "d2pruner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    columns = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in batch:
            padding = (columns - vlm.three(family)["attention_mask"].sum(1)).tolist()
            batch[name] = torch.stack([row.roll(-n) for row, n in zip(batch[name], padding, strict=True)])
    given = vlm.whole(model, batch, by_column=True)
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        output, last_prefill = model(**batch), handle.last
        model(**vlm.three(family))
    for row in range(3):
        kept = vlm.kept_columns(last_prefill, row)
        assert kept == [column - padding[row] for column in vlm.kept_columns(handle.last, row)]
        right = vlm.logits(given, row, kept, vlm.first_pruned(method))[0]
        last = output.logits.shape[1] - padding[row] - 1
        torch.testing.assert_close(output.logits[row, last], right, atol=TOLERANCE, rtol=0)


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


def test_what_another_has_put_on_the_model_stays() -> None:
    model, _ = vlm.built("llava")
    base, batch = model.base_model, vlm.alone("llava")
    encode, calls = base.get_image_features, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(*args, **kwargs)

    base.get_image_features = counting
    try:
        with prune(model, "divprune", 0.3):
            model(**batch)
        assert calls == [1] and base.get_image_features is counting
    finally:
        del base.get_image_features
