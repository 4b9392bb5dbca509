"""A loss and chosen logits of a pruned model: labels and positions of the prompts as given, results of what is kept."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import TOLERANCE

from flashprune.integrations.transformers import prune
from flashprune.integrations.transformers.outputs import Asked
from flashprune.integrations.transformers.prefill import Cut

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

both = pytest.mark.parametrize("method", ["divprune", "d2pruner"])  # one before the LLM, one inside
families = pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])


def pruned(model: Any, method: str, keep: float = 0.3) -> Any:
    return prune(model, method, keep, **vlm.settings(method))


def text_labels(given: vlm.Whole) -> Tensor:
    """Every token of text is wanted."""
    return given.ids.masked_fill(given.visual | ~given.attended, -100)


@torch.no_grad()
def logits(given: vlm.Whole, row: int, kept: list[int], method: str) -> dict[int, Tensor]:
    """By column of a prompt, those of the kept tokens alone."""
    hidden, columns = vlm.states(given, row, kept, vlm.first_pruned(method))
    head = given.model.get_output_embeddings()
    found = head(given.model.base_model.language_model.norm(hidden[0]))
    return dict(zip(columns, found, strict=True))


def right_loss(given: vlm.Whole, kept: list[list[int]], labels: Tensor, method: str) -> Tensor:
    """The mean over what the labels want, each predicted by the token before it."""
    losses = []
    for row, own in enumerate(kept):
        found = logits(given, row, own, method)
        columns = list(found)
        for before, column in itertools.pairwise(columns):
            if labels[row, column] != -100:
                losses.append(-found[before].log_softmax(-1)[labels[row, column]])
    return torch.stack(losses).mean()


@both
@families
@pytest.mark.parametrize("prompts", ["alone", "three"])
def test_a_loss_is_that_of_the_kept_tokens(family: str, method: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = getattr(vlm, prompts)(family)
    given = vlm.whole(model, batch, by_column=True)
    labels = text_labels(given)
    with pruned(model, method) as handle:
        output = model(**batch, labels=labels)
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
        parts = model(**batch, labels=labels, num_items_in_batch=10).loss
        as_tuple = model(**batch, labels=labels, return_dict=False)
    right = right_loss(given, kept, labels, method)
    torch.testing.assert_close(output.loss, right, atol=1e-5, rtol=0)
    wanted = sum(int((labels[row, given.columns(row)[1:]] != -100).sum()) for row in range(len(labels)))
    torch.testing.assert_close(parts, right * wanted / 10, atol=1e-4, rtol=0)
    assert torch.equal(as_tuple[0], output.loss)
    assert output.logits.shape[1] == handle.last.length[1] < labels.shape[1]
    output.loss.backward()
    weight = model.base_model.language_model.layers[0].mlp.down_proj.weight
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0
    model.zero_grad()


@both
def test_a_batch_padded_on_the_right_has_the_loss_of_its_prompts(method: str) -> None:
    """As for training; text before the images is wanted too."""
    model, processor = vlm.built("llava")
    rows = [vlm.row("llava", index) for index in range(3)]
    width = max(row["input_ids"].shape[1] for row in rows)
    with pruned(model, method):
        sums, counts, padded = [], [], []
        for row in rows:
            more = width - row["input_ids"].shape[1]
            labels = text_labels(vlm.whole(model, row))
            counts.append(int((labels[:, 1:] != -100).sum()))
            sums.append(model(**row, labels=labels).loss * counts[-1])
            ids = pad(row["input_ids"], (0, more), value=processor.tokenizer.pad_token_id)
            padded.append((ids, pad(row["attention_mask"], (0, more)), pad(labels, (0, more), value=-100)))
        ids, mask, labels = (torch.cat(parts) for parts in zip(*padded, strict=True))
        pixels = vlm.three("llava")["pixel_values"]
        found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(found, sum(sums) / sum(counts), atol=1e-5, rtol=0)


@both
@families
def test_where_nothing_shortens_the_loss_is_the_unpruned_models(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    for batch, keep in [(vlm.row(family, 2), 0.3), (vlm.three(family), 1.0), (vlm.alone(family), 10_000)]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        asked = {"labels": labels}
        here = {"logits_to_keep": torch.tensor([0, 5, -1])}
        with torch.no_grad():
            right, some = model(**batch, **asked), model(**batch, **here)
            with pruned(model, method, keep):
                found, chosen = model(**batch, **asked), model(**batch, **here)
        assert torch.equal(found.loss, right.loss)
        assert torch.equal(found.logits, right.logits)
        assert torch.equal(chosen.logits, some.logits)


@both
@families
@torch.no_grad()
def test_logits_of_chosen_positions(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.row(family, 0)  # text between two images
    given = vlm.whole(model, batch)
    n = given.ids.shape[1]
    text = [column for column in range(n) if not given.visual[0, column]]
    with pruned(model, method) as handle:
        model(**batch)
        kept = vlm.kept_columns(handle.last, 0)
        right = logits(given, 0, kept, method)
        columns = torch.tensor(sorted([*text, kept[0], kept[-1]]))
        mask = torch.zeros(n, dtype=torch.bool).index_fill(0, columns, True)
        for asked in (columns, columns - n, mask, columns[None], mask[None]):
            found = model(**batch, logits_to_keep=asked).logits
            wanted = torch.stack([right[column] for column in columns.tolist()])
            assert found.dim() == (2 if asked.dtype == torch.bool and asked.dim() == 2 else 3)
            torch.testing.assert_close(found.reshape(wanted.shape), wanted, atol=TOLERANCE, rtol=0)
        backwards = model(**batch, logits_to_keep=columns.flip(0)).logits
        torch.testing.assert_close(backwards[0], wanted.flip(0), atol=TOLERANCE, rtol=0)


@both
@torch.no_grad()
def test_logits_of_chosen_positions_of_a_batch(method: str) -> None:
    """Each prompt's own columns, which lie elsewhere in each; and those of padding, which mean nothing, do no harm."""
    model, _ = vlm.built("qwen2_5_vl")
    batch = vlm.three("qwen2_5_vl")
    given = vlm.whole(model, batch)
    wanted = [given.columns(0)[0], *[c for c in given.columns(0) if not given.visual[0, c]][-12:-1]]
    others = [[c for c in given.columns(row) if not given.visual[row, c]][-12:] for row in (1, 2)]
    asked = torch.tensor([wanted, *others])
    with pruned(model, method) as handle:
        found = model(**batch, logits_to_keep=asked).logits
        kept = [vlm.kept_columns(handle.last, row) for row in range(3)]
        last = model(**batch, logits_to_keep=torch.tensor([0, -1])).logits[:, 1]
    for row in range(3):
        right = logits(given, row, kept[row], method)
        columns = torch.stack([right[column] for column in asked[row].tolist()])
        torch.testing.assert_close(found[row], columns, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(last[row], right[given.ids.shape[1] - 1], atol=TOLERANCE, rtol=0)


@both
@torch.no_grad()
def test_labels_of_the_last_columns(method: str) -> None:
    model, _ = vlm.built("llava")
    batch = vlm.three("llava")
    labels = text_labels(vlm.whole(model, batch)).clone()
    labels[:, :-5] = -100
    with pruned(model, method):
        right = model(**batch, labels=labels).loss
        ends = [6, torch.arange(-6, 0)]
        for end in ends:
            found = model(**batch, labels=labels[:, -6:], logits_to_keep=end)
            assert found.logits.shape[1] == 6
            torch.testing.assert_close(found.loss, right, atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_labels_of_what_follows_on_a_pruned_cache(family: str, method: str) -> None:
    """Another image with text, then text alone: labels are those of the new columns."""
    model, processor = vlm.built(family)
    photos = [vlm.photo("astronaut.png", 112, 84), vlm.photo("coffee.png", 150, 150)]
    turns = [vlm.tiny_models.inputs(processor, [[one]], [text]) for one, text in zip(photos, "ab", strict=True)]
    given = vlm.joined([vlm.whole(model, turn) for turn in turns], turns)
    numbers = given.positions if family in vlm.QWEN_VL else given.positions[0]
    n, end = turns[0]["input_ids"].shape[1], given.ids.shape[1]
    labels, reply = text_labels(given), torch.tensor([[5, 9, 21, 7]])
    kept: list[int] = []
    cache = None
    with pruned(model, method) as handle:
        for turn, start, stop in ((turns[0], 0, n), (turns[1], n, end)):
            where = {"attention_mask": given.attended[:, :stop].long(), "position_ids": numbers[..., start:stop]}
            output = model(**{**turn, **where}, past_key_values=cache, labels=labels[:, start:stop])
            cache = output.past_key_values
            kept += [start + column for column in vlm.kept_columns(handle.last, 0)]
        after = (numbers.max() + 1 + torch.arange(4)).expand(*numbers.shape[:-1], -1)
        said = model(input_ids=reply, position_ids=after, past_key_values=cache, labels=reply)
    wanted = labels.clone()
    wanted[:, : n + 1] = -100  # the first column of a call has nothing before it there
    torch.testing.assert_close(output.loss, right_loss(given, [kept], wanted, method), atol=1e-5, rtol=0)
    right = vlm.logits(given, 0, kept, vlm.first_pruned(method), reply[0].tolist())
    expected = torch.nn.functional.cross_entropy(right[1:-1], reply[0, 1:])
    torch.testing.assert_close(said.loss, expected, atol=1e-5, rtol=0)


@both
def test_what_was_dropped_cannot_be_asked_for(method: str) -> None:
    model, _ = vlm.built("llava")
    batch = vlm.three("llava")
    given = vlm.whole(model, batch)
    n = given.ids.shape[1]
    labels = text_labels(given)
    with pruned(model, method) as handle:
        right = model(**batch).logits
        kept = vlm.kept_columns(handle.last, 1)
        dropped = next(column for column in given.visual_columns(1) if column not in kept)
        place = f"has column {dropped} of prompt 1, which was dropped"
        column = torch.tensor([n - 1, dropped])
        rows = torch.arange(3)[:, None]
        wrong = labels.clone()
        wrong[1, dropped] = 7
        end = int(given.visual.nonzero()[:, 1].max()) + 1
        calls = [
            ({"labels": wrong}, f"labels {place}.*: give -100 there"),
            (
                {"labels": labels.masked_fill(~given.attended, 3)},
                "labels has column 0 of prompt 1, .* is padding",
            ),
            ({"labels": labels[:, 1:]}, rf"labels must be \[3, {n}\], as the prompts are, got \[3, {n - 1}\]"),
            ({"labels": labels, "shift_labels": labels}, "shift_labels do not fit a pruned sequence"),
            ({"logits_to_keep": column}, f"logits_to_keep {place}"),
            ({"logits_to_keep": column - n}, f"logits_to_keep {place}"),
            ({"logits_to_keep": torch.where(rows == 1, column, n - 1)}, f"logits_to_keep {place}"),
            ({"logits_to_keep": (rows == 1) & (torch.arange(n) == dropped)}, f"logits_to_keep {place}"),
            (
                {"logits_to_keep": n - end + 1},
                rf"={n - end + 1} reaches the image .* at \d+ to {end - 1}",
            ),
            ({"logits_to_keep": n + 5}, "reaches the image or video of prompt 0 .*, or 0 for all that is left"),
        ]
        for arguments, message in calls:
            with pytest.raises(ValueError, match=message):
                model(**batch, **arguments)
        wrong = labels.clone()
        wrong[1, kept[0]] = 7  # a kept one can be predicted
        assert model(**batch, labels=wrong).loss.isfinite()
        assert torch.equal(model(**batch, logits_to_keep=n - end).logits, right[:, end - n :])


def test_the_models_own_loss_is_used_and_given_back() -> None:
    model, _ = vlm.tiny_models.build("llava")
    batch = vlm.alone("llava")
    labels = text_labels(vlm.whole(model, batch))
    seen = []

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        seen.append((logits.shape[1], labels.shape[1]))
        return logits.sum()

    with pruned(model, "divprune"):
        model(**batch, labels=labels)
    assert "_loss_function" not in vars(model)
    model.loss_function = own
    with pruned(model, "divprune") as handle:
        output = model(**batch, labels=labels)
        assert torch.equal(output.loss, output.logits.sum())
    assert seen == [(handle.last.length[1],) * 2]
    assert model.loss_function is own
    with pruned(model, "divprune"):
        model.loss_function = len  # what is set meanwhile stays
    assert model.loss_function is len


class OneDevice(TorchDispatchMode):
    """Operators take tensors of one device, as on a GPU: the meta device would let others pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()]
        assert len({one.device for one in given}) < 2, func
        return func(*args, **(kwargs or {}))


def test_a_head_on_another_device() -> None:
    """As accelerate may place it."""
    goes_on = torch.tensor([[True, False, True, True]])
    index = torch.tensor([[0, 2, 3]])
    cut = Cut(index, torch.ones_like(index, dtype=torch.bool), goes_on, ~goes_on, torch.tensor([0]), False)
    asked = Asked(vlm.built("llava")[0], {"logits_to_keep": torch.tensor([0, -1])})
    asked.prefill = SimpleNamespace(cut=cut)  # type: ignore[assignment]
    with OneDevice():
        assert asked.states(torch.zeros(1, 3, 8, device="meta")).shape == (1, 2, 8)


def test_a_head_that_is_not_called_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = vlm.tiny_models.build("llava")
    batch = vlm.alone("llava")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(1, 1))
    with pruned(model, "divprune"):
        model(**batch)
        with pytest.raises(RuntimeError, match="logits_to_keep was not served"):
            model(**batch, logits_to_keep=torch.tensor([-1]))


def test_the_balancing_loss_of_experts() -> None:
    """It counts the tokens that are left; a mask of the prompts as given does not fit these."""
    model, _ = vlm.built("qwen3_vl_moe")
    batch = vlm.alone("qwen3_vl_moe")
    labels = text_labels(vlm.whole(model, batch))
    loose = {name: one for name, one in batch.items() if name != "attention_mask"}
    asked = {"labels": labels, "output_router_logits": True}
    with pruned(model, "divprune") as handle:
        output = model(**loose, **asked)
        assert {len(one) for one in output.router_logits} == {handle.last.length[1]}
        plain = model(**loose, labels=labels).loss
        share = model.config.text_config.router_aux_loss_coef * output.aux_loss
        torch.testing.assert_close(output.loss, plain + share)
        with pytest.raises(ValueError, match="output_router_logits with attention_mask does not fit"):
            model(**batch, **asked)
        text = vlm.row("qwen3_vl_moe", 2)
        assert model(**text, output_router_logits=True).aux_loss.isfinite()


DOCS = Path(__file__).parent.parent / "docs" / "transformers.md"


@pytest.mark.parametrize("method", ["divprune", "d2pruner", "fastv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_answers_are_scored_as_the_documentation_does(family: str, method: str) -> None:
    model, processor = vlm.built(family)
    inputs = vlm.alone(family)
    given = vlm.whole(model, inputs)
    answers = [" a red cat", " two astronauts", " no"]
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "crop" in b]
    names = {"model": model, "processor": processor, "inputs": inputs, "answers": answers, "torch": torch}
    with pruned(model, method) as handle:
        exec(compile(block, str(DOCS), "exec"), names)
        kept = vlm.kept_columns(handle.last, 0)
    scores: Any = names["scores"]
    assert len(scores) == 3
    for answer, score in zip(answers, scores, strict=True):
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        right = vlm.logits(given, 0, kept, vlm.first_pruned(method), ids[:-1]).log_softmax(-1)
        assert score == pytest.approx(float(right.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-3)


@torch.no_grad()
def test_one_pass_over_prompt_and_answer_chooses_by_the_answer() -> None:
    """What the documentation warns of: a method inside the LLM takes the attention of the last token."""
    model, processor = vlm.built("llava")
    batch = vlm.alone("llava")
    answer = processor.tokenizer(" two astronauts", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([batch["input_ids"], answer], dim=1)
    longer = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept = {}
    for method in ("fastv", "divprune"):
        with pruned(model, method) as handle:
            for name, one in (("prompt", batch), ("answer", longer)):
                model(**one)
                kept[method, name] = vlm.kept_columns(handle.last, 0)
        attention = vlm.llm_attention("llava", longer, vlm.LAYER)[0]
        if method == "fastv":
            visual = vlm.whole(model, longer).visual_columns(0)
            best = attention.topk(len(kept[method, "answer"])).indices.tolist()
            assert kept[method, "answer"] == sorted(visual[index] for index in best)
    assert kept["fastv", "prompt"] != kept["fastv", "answer"]
    assert kept["divprune", "prompt"] == kept["divprune", "answer"]
