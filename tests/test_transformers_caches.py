"""A pruned cache on its own: rolled back, copied, stored, its rows moved, and kept from models that do not prune."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import TOLERANCE
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from flashprune.integrations.transformers import caches, prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

both = pytest.mark.parametrize("method", ["divprune", "d2pruner"])  # one before the LLM, one inside
families = pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
TOKENS = [[11, 7, 30, 4], [9, 21, 5, 2]]  # what is said after a prompt


def pruned(model: Any, method: str) -> Any:
    return prune(model, method, 0.3, **vlm.settings(method))


def prompts(family: str, which: str) -> Any:
    return {"one": lambda: vlm.row(family, 0), "three": lambda: vlm.three(family)}[which]()


def first(given: vlm.Whole, seen: int) -> vlm.Whole:
    """The first tokens of the prompts; what follows counts on from the highest of their positions."""
    attended, positions = given.attended[:, :seen], given.positions[..., :seen]
    after = positions.amax(0).masked_fill(~attended, -1).amax(1) + 1
    return replace(
        given,
        ids=given.ids[:, :seen],
        embeds=given.embeds[:, :seen],
        positions=positions,
        attended=attended,
        visual=given.visual[:, :seen],
        deepstack=[features[:, :seen] for features in given.deepstack],
        deltas=(after - attended.sum(1)).tolist(),
    )


def rows_of(given: vlm.Whole, rows: list[int]) -> vlm.Whole:
    """These prompts."""
    names = ("ids", "embeds", "attended", "visual")
    parts: dict[str, Any] = {name: getattr(given, name)[rows] for name in names}
    deepstack = [features[rows] for features in given.deepstack]
    deltas = [given.deltas[row] for row in rows]
    return replace(given, **parts, positions=given.positions[:, rows], deepstack=deepstack, deltas=deltas)


@torch.no_grad()
def say(model: Any, cache: Any, given: vlm.Whole, tokens: list[int]) -> torch.Tensor:
    """`[B, 1 + tokens, V]` but for the first: the logits after each of these tokens, said to a cache of the prompts."""
    ids = torch.tensor(tokens).expand(len(given.ids), -1)
    mask = torch.cat([given.attended.long(), torch.ones_like(ids)], dim=1)
    starts = torch.tensor([len(given.columns(row)) + given.deltas[row] for row in range(len(ids))])[:, None]
    places = (starts + torch.arange(len(tokens))).expand(len(given.positions), -1, -1)
    if len(places) == 1:
        places = places[0]
    return model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits


def reply(model: Any, batch: Any, tokens: int, **more: Any) -> Any:
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return model.generate(**batch, **more, **lengths, do_sample=False, return_dict_in_generate=True, output_logits=True)


def check(found: torch.Tensor, given: vlm.Whole, kept: list[list[int]], method: str, tokens: list[int]) -> None:
    """The logits after each token are those of the kept tokens alone."""
    for row, own in enumerate(kept):
        if given.attended[row].any():  # not padding alone
            right = vlm.logits(given, row, own, vlm.first_pruned(method), tokens)
            torch.testing.assert_close(found[row], right[1:], atol=TOLERANCE, rtol=0)


def images(given: vlm.Whole) -> list[tuple[int, int, int]]:
    """Row, first column and that after the last of each image: placeholders that adjoin."""
    found = []
    for row in range(len(given.ids)):
        columns = given.visual_columns(row)
        starts = [c for c in columns if c - 1 not in columns]
        ends = [c + 1 for c in columns if c + 1 not in columns]
        found += [(row, start, end) for start, end in zip(starts, ends, strict=True)]
    return found


@both
@families
@pytest.mark.parametrize("which", ["one", "three"])
@torch.no_grad()
def test_a_turn_is_rolled_back_and_another_asked(family: str, method: str, which: str) -> None:
    model, _ = vlm.built(family)
    batch = prompts(family, which)
    given = vlm.whole(model, batch, by_column=True)
    n = given.ids.shape[1]
    with pruned(model, method) as handle:
        cache = model(**batch).past_key_values
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
        held = [caches.length(cache, layer) for layer in range(4)]
        for tokens, crop in [
            (TOKENS[0], lambda: n - cache.get_seq_length()),
            (TOKENS[1], lambda: n),
            (TOKENS[0], lambda: 0),
        ]:
            check(say(model, cache, given, tokens), given, kept, method, tokens)
            assert cache.get_seq_length() == n + len(tokens)
            cache.crop(crop())
        assert cache.get_seq_length() == n + len(tokens)  # 0 takes nothing back
        cache.crop(10_000)
        cache.crop(-len(tokens))
    assert [caches.length(cache, layer) for layer in range(4)] == held


@both
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_question_is_asked_again_by_generate(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch)
    questions = [processor.tokenizer(text, return_tensors="pt")["input_ids"] for text in (" And the colour?", " Why")]
    with pruned(model, method) as handle:
        first = reply(model, batch, 3)
        kept = [vlm.kept_columns(handle.last, row) for row in range(3)]
        cache, seen = first.past_key_values, first.past_key_values.get_seq_length()
        for question in questions:
            ids = torch.cat([first.sequences, question.expand(3, -1)], dim=1)
            mask = torch.ones_like(ids)
            mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]
            found = reply(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, 4)
            for row in range(3):
                said = found.sequences[row, given.ids.shape[1] :].tolist()
                right = vlm.logits(given, row, kept[row], vlm.first_pruned(method), said[:-1])[-4:]
                torch.testing.assert_close(torch.stack(found.logits, 1)[row], right, atol=TOLERANCE, rtol=0)
            cache.crop(seen - cache.get_seq_length())


def test_windows_that_kept_what_a_crop_needs() -> None:
    model, _ = vlm.built("gemma3")
    batch = vlm.alone("gemma3")
    with pruned(model, "divprune"):
        first = reply(model, batch, 3)
        cache, seen = first.past_key_values, first.past_key_values.get_seq_length()
        with pytest.raises(RuntimeError, match="Call `activate_past_recording` before"):
            cache.crop(-1)
        cache.activate_past_recording()
        ids = torch.cat([first.sequences, torch.tensor([[7, 9]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        replies = []
        for _ in range(2):
            replies.append(torch.stack(reply(model, turn, 4, past_key_values=cache).logits))
            cache.crop(seen - cache.get_seq_length())
    assert torch.equal(*replies)


@both
@families
@pytest.mark.parametrize("which", ["one", "three"])
@torch.no_grad()
def test_a_crop_anywhere_in_the_prompt(family: str, method: str, which: str) -> None:
    """Between images, before them, in the text around them, with prompts of unlike length: exact, or refused."""
    model, _ = vlm.built(family)
    batch = prompts(family, which)
    given = vlm.whole(model, batch, by_column=True)
    n = given.ids.shape[1]
    inside = {column for _, start, end in images(given) for column in range(start + 1, end)}
    edges = {column for _, start, end in images(given) for column in (start - 1, start, end, end + 1)}
    with pruned(model, method) as handle:
        whole = model(**batch).past_key_values
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
        cut = 0
        for seen in sorted(edges | set(range(0, n, 13)) | {1, n - 1}):
            cache = copy.deepcopy(whole)
            if seen in inside:
                cut += 1
                with pytest.raises(ValueError, match=f"crop to {seen} tokens would end amid the image or video of pro"):
                    cache.crop(seen - n)
                assert cache.get_seq_length() == n
                assert [caches.length(cache, i) for i in range(4)] == [caches.length(whole, i) for i in range(4)]
                continue
            cache.crop(seen - n)
            assert cache.get_seq_length() == seen
            assert seen or which == "three" or type(cache) is DynamicCache
            if seen:
                shorter = first(given, seen)
                own = [[column for column in columns if column < seen] for columns in kept]
                check(say(model, cache, shorter, TOKENS[0]), shorter, own, method, TOKENS[0])
    assert cut > 3


def test_a_crop_that_is_refused_says_where_it_may_end() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.row("llava", 0)
    (_, start, end), _ = images(vlm.whole(model, batch))
    with pruned(model, "divprune"):
        cache = model(**batch).past_key_values
    message = f"crop to {start + 3} tokens .* prompt 0 at {start} to {end - 1}, .*: crop to {start} .*, or to {end} or"
    with pytest.raises(ValueError, match=message):
        cache.crop(start + 3)
    cache.crop(start)


@both
@torch.no_grad()
def test_a_crop_before_the_image_gives_the_cache_back_to_any_model(method: str) -> None:
    model, _ = vlm.built("qwen2_5_vl")
    batch = vlm.alone("qwen2_5_vl")
    given = vlm.whole(model, batch, by_column=True)
    ((_, start, _),) = images(given)
    with pruned(model, method):
        cache = model(**batch).past_key_values
    cache.crop(start)
    assert type(cache) is DynamicCache
    text = first(given, start)
    check(say(model, cache, text, TOKENS[0]), text, [[]], method, TOKENS[0])


@both
@torch.no_grad()
def test_a_prefix_is_used_for_one_image_after_another(method: str) -> None:
    """Computed by the unpruned model, it is the same after each."""
    model, processor = vlm.built("llava")
    text = processor.tokenizer("You are a helpful assistant. Answer briefly.", return_tensors="pt")["input_ids"]
    cache = model(input_ids=text).past_key_values
    n, before = text.shape[1], [layer.keys.clone() for layer in cache.layers]
    for photo in ("astronaut.png", "coffee.png"):
        batch = vlm.tiny_models.inputs(processor, [[vlm.photo(photo, 112, 84)]], ["What?"])
        ids = torch.cat([text, batch["input_ids"]], dim=1)
        whole = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pruned(model, method) as handle:
            right = model(**whole)
            kept = [column - n for column in vlm.kept_columns(handle.last, 0)]
            found = model(**{**batch, "attention_mask": whole["attention_mask"]}, past_key_values=cache)
            assert vlm.kept_columns(handle.last, 0) == kept
        torch.testing.assert_close(found.logits[:, -1], right.logits[:, -1], atol=TOLERANCE, rtol=0)
        assert cache.get_seq_length() == ids.shape[1]
        cache.crop(n - cache.get_seq_length())
        assert type(cache) is DynamicCache
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@both
@families
@torch.no_grad()
def test_a_second_image_is_rolled_back(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    photos = [vlm.photo("astronaut.png", 112, 84), vlm.photo("coffee.png", 150, 150)]
    turns = [vlm.tiny_models.inputs(processor, [[one]], [text]) for one, text in zip(photos, "ab", strict=True)]
    given = vlm.joined([vlm.whole(model, turn) for turn in turns], turns)
    n = turns[0]["input_ids"].shape[1]
    numbers = given.positions if family in vlm.QWEN_VL else given.positions[0]
    with pruned(model, method) as handle:
        cache, kept, places = None, [], []
        for turn, columns in zip(turns, (slice(n), slice(n, None)), strict=True):
            where = {"attention_mask": given.attended[:, : columns.stop].long(), "position_ids": numbers[..., columns]}
            cache = model(**{**turn, **where}, past_key_values=cache).past_key_values
            kept += [column + len(places) * n for column in vlm.kept_columns(handle.last, 0)]
            places.append(columns)
        _, (_, start, end) = images(given)
        with pytest.raises(ValueError, match=f"at {start} to {end - 1}"):
            cache.crop(start + 1)
        for seen in (given.ids.shape[1] - 1, end, start, n, images(given)[0][2]):
            cache.crop(seen)
            shorter, own = first(given, seen), [column for column in kept if column < seen]
            check(say(model, cache, shorter, TOKENS[0]), shorter, [own], method, TOKENS[0])
            cache.crop(-len(TOKENS[0]))


@both
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_rows_are_moved(family: str, method: str) -> None:
    """Beams, a batch cut to some prompts, prompts said several times: then a turn, a roll-back, another turn."""
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    given = vlm.whole(model, batch, by_column=True)
    n = given.ids.shape[1]
    ways = {
        "reorder": ([1, 0, 1], lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1]))),
        "select": ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
        "mask": ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
        "repeat": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    }
    with pruned(model, method) as handle:
        whole = model(**batch).past_key_values
        kept = [vlm.kept_columns(handle.last, row) for row in range(3)]
        for rows, move in ways.values():
            cache = copy.deepcopy(whole)
            move(cache)
            own = rows_of(given, rows)
            for tokens in TOKENS:
                check(say(model, cache, own, tokens), own, [kept[row] for row in rows], method, tokens)
                cache.crop(n)
            start = min(begin for row, begin, _ in images(own))
            cache.crop(start)
            shorter = first(own, start)
            check(say(model, cache, shorter, TOKENS[0]), shorter, [[]] * len(rows), method, TOKENS[0])


@both
@pytest.mark.parametrize("which", ["one", "three"])
@torch.no_grad()
def test_a_model_that_does_not_prune_refuses_a_pruned_cache(method: str, which: str) -> None:
    model, _ = vlm.built("llava")
    other, _ = vlm.tiny_models.build("llava")
    batch = prompts("llava", which)
    given = vlm.whole(model, batch, by_column=True)
    with pruned(model, method) as handle:
        cache = model(**batch).past_key_values
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
    held = [caches.length(cache, layer) for layer in range(4)]
    message = (
        f"the cache was pruned from layer {vlm.first_pruned(method)} on: only a model pruned from there can continue"
    )
    for unpruned in (model, other):
        for tokens in (TOKENS[0], TOKENS[0][:1]):
            with pytest.raises(ValueError, match=message):
                say(unpruned, cache, given, tokens)
        ids = torch.cat([batch["input_ids"], torch.tensor([[5]]).expand(len(given.ids), 1)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), 1, dtype=torch.int64)], dim=1)
        with pytest.raises(ValueError, match=message):
            unpruned.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    assert [caches.length(cache, layer) for layer in range(4)] == held
    with pruned(model, method):
        check(say(model, cache, given, TOKENS[0]), given, kept, method, TOKENS[0])
    ids = torch.tensor([TOKENS[0]]).expand(len(given.ids), -1)
    broken = [
        ({"position_ids": torch.zeros(7, 7, 7)}, RuntimeError, "must match"),  # in the decoder
        ({"pixel_values": batch["pixel_values"]}, ValueError, "do not match"),  # before it
    ]
    for arguments, error, words in broken:  # whatever ends a forward ends the loan
        with pruned(model, method), pytest.raises(error, match=words):
            model(input_ids=ids, past_key_values=cache, **arguments)
        with pytest.raises(ValueError, match="only a model pruned from there can continue it"):
            say(model, cache, given, TOKENS[0])


@pytest.mark.parametrize(("before", "after"), [("divprune", "fastv"), ("fastv", "divprune")])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_model_pruned_elsewhere_refuses_the_cache(before: str, after: str, tokens: int) -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    with pruned(model, before):
        cache = model(**batch).past_key_values
    own, others = vlm.first_pruned(before), vlm.first_pruned(after)
    with pruned(model, after), pytest.raises(ValueError, match=f"was pruned from layer {own} on, not from {others}"):
        model(input_ids=torch.tensor([TOKENS[0][:tokens]]), past_key_values=cache)


@both
@torch.no_grad()
def test_a_cache_is_copied_and_stored(method: str, tmp_path: Path) -> None:
    model, _ = vlm.built("qwen2_5_vl")
    batch = vlm.three("qwen2_5_vl")
    given = vlm.whole(model, batch, by_column=True)
    n = given.ids.shape[1]
    with pruned(model, method):
        cache = model(**batch).past_key_values
        torch.save(cache, tmp_path / "cache.pt")
        copies = [
            copy.deepcopy(cache),
            pickle.loads(pickle.dumps(cache)),
            torch.load(tmp_path / "cache.pt", weights_only=False),
            pickle.loads(pickle.dumps(copy.copy(cache))),
        ]
        right = say(model, cache, given, TOKENS[0])
        for one in copies:
            assert type(one) is type(cache)
            assert one.get_seq_length() == n
            assert torch.equal(say(model, one, given, TOKENS[0]), right)
            one.crop(n)
            assert torch.equal(say(model, one, given, TOKENS[0]), right)
    with pytest.raises(ValueError, match="only a model pruned from there can continue it"):
        say(model, copies[0], given, TOKENS[0])


FRESH = """
import sys, torch
cache = torch.load(sys.argv[1], weights_only=False)
print(type(cache).__name__, cache.get_seq_length(), cache.pruned.removed)
cache.crop(-2)
torch.save(cache, sys.argv[1])
"""


@torch.no_grad()
def test_a_stored_cache_is_loaded_by_another_process(tmp_path: Path) -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    given = vlm.whole(model, batch, by_column=True)
    file = tmp_path / "cache.pt"
    with pruned(model, "divprune") as handle:
        cache = model(**batch).past_key_values
        say(model, cache, given, TOKENS[1][:2])
        torch.save(cache, file)
        told = subprocess.run([sys.executable, "-c", FRESH, str(file)], check=True, capture_output=True, text=True)
        removed = sum(n - k for n, k in handle.last.counts)
        assert told.stdout.split() == ["PrunedDynamicCache", str(given.ids.shape[1] + 2), str(removed)]
        found = say(model, torch.load(file, weights_only=False), given, TOKENS[0])
        check(found, given, [vlm.kept_columns(handle.last, 0)], "divprune", TOKENS[0])


@torch.no_grad()
def test_a_cache_that_is_reset_is_like_new() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    right = model(**batch).logits
    with pruned(model, "divprune"):
        cache = model(**batch).past_key_values
    cache.reset()
    assert type(cache) is DynamicCache
    assert torch.equal(model(**batch, past_key_values=cache).logits, right)


def pruned_by_hand(layers: list[Any], removed: int, seen: int) -> Any:
    """A cache of one row that holds all but `removed` tokens, from the second on, of those seen."""
    cache = Cache(layers=layers)
    columns = torch.tensor([[0, *range(removed + 1, seen)]])
    inner = torch.zeros(1, seen, dtype=torch.bool)
    caches.record(cache, caches.Pruned(0, columns, False, inner, removed + 1))
    for index, layer in enumerate(layers):
        if hasattr(layer, "get_seq_length"):
            cache.update(torch.zeros(1, 1, seen - removed, 2), torch.zeros(1, 1, seen - removed, 2), index)
    return cache


def test_a_layer_that_cannot_crop_leaves_the_others_whole() -> None:
    cache = pruned_by_hand([DynamicLayer(), DynamicSlidingWindowLayer(4)], removed=3, seen=12)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)
    assert cache.get_seq_length() == 12
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9]


def test_layers_without_columns_are_passed_over() -> None:
    """Linear attention keeps a state, not columns: what is seen and held is told by the next layer that has some."""
    cache = pruned_by_hand([LinearAttentionLayer(), DynamicLayer()], removed=3, seen=12)
    assert cache.get_seq_length() == 12
    assert cache.get_query_offset() == caches.length(cache, 0) == 9
    assert caches.columns(cache, 0, None, 1, torch.device("cpu")).tolist() == [[0, *range(4, 12)]]
