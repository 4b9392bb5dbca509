"""Everything after a pruned prefill: decoding by hand, further turns, sampling, beams, prompt lookup, other dtypes."""

import copy
import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import FAMILIES, QWEN_VL, TOLERANCE

from flashprune.integrations.transformers import prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

METHODS = ("divprune", "d2pruner")  # one before the LLM, one inside
both = pytest.mark.parametrize("method", METHODS)
families = pytest.mark.parametrize("family", FAMILIES)


def pruned(model: Any, method: str, **more: Any) -> Any:
    return prune(model, method, 0.3, **vlm.settings(method), **more)


def generate(model: Any, batch: Any, tokens: int = 8, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens} | options
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def close(found: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, right, atol=tolerance, rtol=0)


@both
@families
@pytest.mark.parametrize("prompts", ["alone", "three"])
@torch.no_grad()
def test_decoding_by_hand_without_position_ids(family: str, method: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = getattr(vlm, prompts)(family)
    given, mask = vlm.whole(model, batch, by_column=True), batch["attention_mask"]
    replies: list[list[int]] = [[] for _ in mask]
    with pruned(model, method) as handle:
        output = model(**batch)
        steps = [output.logits[:, -1]]
        for _ in range(6):
            token = steps[-1].argmax(-1, keepdim=True)
            for reply, one in zip(replies, token.flatten().tolist(), strict=True):
                reply.append(one)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            padding: dict[str, Any] = {"attention_mask": mask} if prompts == "three" else {}
            if padding and family in QWEN_VL:  # which number all that the mask holds, pruned or not
                now = mask.sum(1, keepdim=True) - 1 + torch.tensor(given.deltas)[:, None]
                padding["position_ids"] = now.expand(3, -1, -1)
            output = model(input_ids=token, past_key_values=output.past_key_values, **padding)
            steps.append(output.logits[:, -1])
        assert output.past_key_values.get_seq_length() == mask.shape[1]
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(mask))]
    for row, reply in enumerate(replies):
        right = vlm.logits(given, row, kept[row], vlm.first_pruned(method), reply)
        close(torch.stack(steps, dim=1)[row], right)


@both
@families
@pytest.mark.parametrize("prompts", ["alone", "three"])
def test_a_second_turn_on_the_same_cache(family: str, method: str, prompts: str) -> None:
    model, processor = vlm.built(family)
    batch = getattr(vlm, prompts)(family)
    given = vlm.whole(model, batch)
    more = processor.tokenizer(" And the colour?", return_tensors="pt")["input_ids"]
    with pruned(model, method) as handle:
        first = generate(model, batch)
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
        ids = torch.cat([first.sequences, more.expand(len(given.ids), -1)], dim=1)
        new = ids.shape[1] - given.ids.shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), new, dtype=torch.int64)], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        second = generate(model, turn)
    for row in range(len(given.ids)):
        reply = second.sequences[row, given.ids.shape[1] :].tolist()
        right = vlm.logits(given, row, kept[row], vlm.first_pruned(method), reply[:-1])
        close(torch.stack(second.logits, dim=1)[row], right[-8:])


@both
@families
@pytest.mark.parametrize("first", ["image", "text"])
@torch.no_grad()
def test_a_new_image_on_the_cache_of_a_first_turn(family: str, method: str, first: str) -> None:
    model, processor = vlm.built(family)
    images = [[vlm.photo("astronaut.png", 112, 84)] if first == "image" else [], [vlm.photo("coffee.png", 150, 150)]]
    turns = [
        vlm.tiny_models.inputs(processor, [own], [text]) for own, text in zip(images, ["What?", "And?"], strict=True)
    ]
    given = vlm.joined([vlm.whole(model, turn) for turn in turns], turns)
    numbers = given.positions if family in QWEN_VL else given.positions[0]
    kept, columns, cache = [], 0, None
    with pruned(model, method) as handle:
        for turn, own in zip(turns, images, strict=True):
            end = columns + turn["input_ids"].shape[1]
            places = {"attention_mask": given.attended[:, :end].long(), "position_ids": numbers[..., columns:end]}
            output = model(**{**turn, **places}, past_key_values=cache)
            kept += [columns + column for column in (vlm.kept_columns(handle.last, 0) if own else [])]
            columns, cache = end, output.past_key_values
        found = [output.logits[0, -1]]
        token = found[0].argmax()
        mask = torch.ones(1, columns + 1, dtype=torch.int64)
        after = (numbers.max() + 1).expand(*numbers.shape[:-1], 1)
        text = {"input_ids": token[None, None], "attention_mask": mask, "position_ids": after}
        found.append(model(**text, past_key_values=cache).logits[0, -1])
        if first == "text":  # cached or not, the image is chosen from alike
            model(**{**turns[1], "input_ids": given.ids, "attention_mask": mask[:, :-1], "position_ids": numbers})
            assert vlm.kept_columns(handle.last, 0) == kept
    right = vlm.logits(given, 0, kept, vlm.first_pruned(method), [int(token)])
    close(torch.stack(found), right)


@both
@families
def test_sampling_draws_from_the_right_logits(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    with pruned(model, method) as handle:
        torch.manual_seed(0)
        found = generate(model, batch, do_sample=True, num_return_sequences=2)
        drawn = handle.last
        best = generate(model, batch, do_sample=True, num_return_sequences=2, top_k=1)
        greedy = generate(model, batch)
    for row, sequence in enumerate(found.sequences):
        reply = sequence[given.ids.shape[1] :].tolist()
        kept = vlm.kept_columns(drawn, row)
        right = vlm.logits(given, row // 2, kept, vlm.first_pruned(method), reply[:-1])
        close(torch.stack(found.logits, dim=1)[row], right)
    assert not torch.equal(found.sequences[::2], found.sequences[1::2])
    assert torch.equal(best.sequences, greedy.sequences.repeat_interleave(2, dim=0))


def beam_search(given: vlm.Whole, row: int, kept: list[int], first_layer: int, tokens: int, stop: int) -> Any:
    """The best of three beams of a fixed length, with the sum of its log-probabilities."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens):
        longer = []
        for score, reply in beams:
            steps = vlm.logits(given, row, kept, first_layer, reply)[-1].log_softmax(-1)
            steps[stop] = -math.inf
            values, indices = steps.topk(3)
            longer += [(score + v, [*reply, i]) for v, i in zip(values.tolist(), indices.tolist(), strict=True)]
        beams = sorted(longer, reverse=True)[:3]
    return beams[0]


@both
@families
def test_beams_are_those_of_a_search_by_hand(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    with pruned(model, method) as handle:
        found = generate(model, batch, 5, num_beams=3, length_penalty=0.0, output_scores=True)
        once = generate(model, batch, 1)
        kept = [vlm.kept_columns(handle.last, row) for row in range(3)]
    assert found.sequences.shape[0] == once.sequences.shape[0] == 3
    for row in range(3):
        stop = processor.tokenizer.eos_token_id
        score, reply = beam_search(given, row, kept[row], vlm.first_pruned(method), 5, stop)
        assert found.sequences[row, given.ids.shape[1] :].tolist() == reply
        assert float(found.sequences_scores[row]) == pytest.approx(score, abs=1e-4)


@both
@families
def test_a_padded_batch_gives_each_prompt_what_it_gets_alone(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch, rows = vlm.three(family), [vlm.row(family, index) for index in range(3)]
    columns = batch["input_ids"].shape[1]
    with pruned(model, method) as handle:
        together, last = generate(model, batch), handle.last
        for row, single in enumerate(rows):
            own, length = generate(model, single), single["input_ids"].shape[1]
            assert own.sequences[0, length:].tolist() == together.sequences[row, columns:].tolist()
            close(torch.stack(own.logits, dim=1)[0], torch.stack(together.logits, dim=1)[row], 1e-4)
            if row < 2:
                own_kept = [column + columns - length for column in vlm.kept_columns(handle.last, 0)]
                assert own_kept == vlm.kept_columns(last, row)


@both
@families
def test_without_a_cache(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    with pruned(model, method):
        cached = model(**batch)
        output = model(**batch, use_cache=False)
        assert output.past_key_values is None
        close(output.logits, cached.logits)
        if method in vlm.BEFORE:  # inside, each step's last token chooses anew
            found, greedy = generate(model, batch, 4, use_cache=False), generate(model, batch, 4)
            close(torch.stack(found.logits), torch.stack(greedy.logits))


@both
@families
def test_prompt_lookup_decodes_greedily(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    batch = vlm.alone(family)
    given = vlm.whole(model, batch)
    image = {"suppress_tokens": [processor.tokenizer.convert_tokens_to_ids(vlm.tiny_models.IMAGE[family])]}
    widths = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with pruned(model, method) as handle:
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, **image}
        reply = generate(model, batch, 24, **options).sequences[0, given.ids.shape[1] :].tolist()
        kept = vlm.kept_columns(handle.last, 0)
    hook.remove()
    assert max(widths[1:]) > 1  # some tokens were looked up
    right = vlm.logits(given, 0, kept, vlm.first_pruned(method), reply[:-1])
    right[:, [*image["suppress_tokens"], processor.tokenizer.eos_token_id]] = -math.inf
    assert right.argmax(-1).tolist() == reply


@both
@families
@torch.no_grad()
def test_hidden_states_are_those_of_the_kept_tokens(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.alone(family)
    given = vlm.whole(model, batch)
    with pruned(model, method) as handle:
        found = model(**batch, output_hidden_states=True).hidden_states
        kept = vlm.kept_columns(handle.last, 0)
    assert len(found) == 5
    first_layer = vlm.first_pruned(method)
    for layer, states in enumerate(found[:-1]):  # of a layer: what entered it, before it was cut
        cut = method in vlm.BEFORE or layer > first_layer
        right, columns = vlm.states(given, 0, kept if cut else None, first_layer, last_layer=layer)
        # Transformers notes Qwen3-VL's before it adds the features of the encoder's earlier layers.
        text = [i for i, column in enumerate(columns) if not given.deepstack or column not in given.visual_columns(0)]
        assert states.shape == right.shape
        close(states[:, text], right[:, text])


@both
@families
def test_eager_attention(family: str, method: str) -> None:
    model, _ = vlm.built(family, "eager")
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    with pruned(model, method) as handle:
        found = generate(model, batch)
    for row in range(3):
        reply = found.sequences[row, given.ids.shape[1] :].tolist()
        right = vlm.logits(given, row, vlm.kept_columns(handle.last, row), vlm.first_pruned(method), reply[:-1])
        close(torch.stack(found.logits, dim=1)[row], right)


@both
@families
@torch.no_grad()
def test_bfloat16(family: str, method: str) -> None:
    model = copy.deepcopy(vlm.built(family)[0]).to(torch.bfloat16)
    batch = vlm.three(family)
    batch = {name: one.bfloat16() if one.is_floating_point() else one for name, one in batch.items()}
    given = vlm.whole(model, batch)
    with pruned(model, method) as handle:
        output = model(**batch)
        kept = [vlm.kept_columns(handle.last, row) for row in range(3)]
        found = generate(model, batch)
    assert output.logits.dtype == torch.bfloat16
    assert found.sequences.shape[1] == given.ids.shape[1] + 8
    for row in range(3):
        right = vlm.logits(given, row, kept[row], vlm.first_pruned(method))[0]
        close(output.logits[row, -1], right, 0.25)  # the unpruned model and the oracle differ by up to 0.14
