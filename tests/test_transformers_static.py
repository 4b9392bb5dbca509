"""Static caches: a prefill fills fewer of their columns, and decoding goes on from there, compiled or not."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import TOLERANCE
from transformers import CompileConfig, StaticCache

from flashprune.integrations.transformers import caches, prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

both = pytest.mark.parametrize("method", ["divprune", "d2pruner"])  # one before the LLM, one inside
families = pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])


def pruned(model: Any, method: str, keep: float = 0.3) -> Any:
    return prune(model, method, keep, **vlm.settings(method))


def generate(model: Any, batch: Any, tokens: int = 6, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens} | options
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def static(model: Any, columns: int) -> Any:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=columns)


def check(found: Any, given: vlm.Whole, kept: list[list[int]], method: str, tokens: int = 6) -> None:
    """The last logits of every prompt are those of the kept tokens alone."""
    for row, own in enumerate(kept):
        reply = found.sequences[row, given.ids.shape[1] :].tolist()
        right = vlm.logits(given, row, own, vlm.first_pruned(method), reply[:-1])
        torch.testing.assert_close(torch.stack(found.logits, 1)[row], right[-tokens:], atol=TOLERANCE, rtol=0)


@both
@families
@pytest.mark.parametrize("prompts", ["alone", "three"])
def test_generation(family: str, method: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = getattr(vlm, prompts)(family)
    given = vlm.whole(model, batch)
    n = given.ids.shape[1]
    with pruned(model, method) as handle:
        found = generate(model, batch, cache_implementation="static")
        kept = [vlm.kept_columns(handle.last, row) for row in range(len(given.ids))]
        cache = found.past_key_values
        assert cache.is_compileable and int(cache.get_seq_length()) == n + 5
        assert caches.length(cache, 3) == handle.last.length[1] + 5
    check(found, given, kept, method)


@both
def test_eager_attention_and_beams(method: str) -> None:
    model, _ = vlm.built("llava", "eager")
    batch = vlm.three("llava")
    with pruned(model, method):
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}):
            right = generate(model, batch, **options)
            found = generate(model, batch, cache_implementation="static", **options)
            assert torch.equal(found.sequences, right.sequences)


@both
@pytest.mark.parametrize("prompts", ["alone", "three"])
def test_a_second_turn_with_padding(method: str, prompts: str) -> None:
    """On a cache of one's own; what is said next is padded too, amid the sequence."""
    model, processor = vlm.built("qwen2_5_vl")
    batch = getattr(vlm, prompts)("qwen2_5_vl")
    given = vlm.whole(model, batch)
    rows = len(given.ids)
    more = processor.tokenizer(" And the colour?", return_tensors="pt")["input_ids"].expand(rows, -1)
    new = torch.ones_like(more)
    new[1:, :2] = 0
    with pruned(model, method) as handle:
        for cache in (static(model, 300), None):
            first = generate(model, batch, 3, **({} if cache is None else {"past_key_values": cache}))
            mask = torch.cat([batch["attention_mask"], torch.ones(rows, 3, dtype=torch.int64), new], dim=1)
            ids = torch.cat([first.sequences, more], dim=1)
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            found = generate(model, turn)
            if cache is not None:
                other = found
                kept = [vlm.kept_columns(handle.last, row) for row in range(rows)]
    assert torch.equal(other.sequences, found.sequences)
    torch.testing.assert_close(torch.stack(other.logits), torch.stack(found.logits), atol=TOLERANCE, rtol=0)
    check(other, given, kept[:1], method)


@both
@torch.no_grad()
def test_decoding_by_hand(method: str) -> None:
    model, _ = vlm.built("llava")
    batch = vlm.three("llava")
    n = batch["input_ids"].shape[1]
    tokens = torch.tensor([[5, 9, 20], [3, 7, 1], [8, 8, 30]])
    with pruned(model, method):
        logits = []
        for cache in (static(model, 200), None):
            output = model(**batch, past_key_values=cache)
            steps = [output.logits[:, -1]]
            for step in range(3):
                mask = torch.cat([batch["attention_mask"], torch.ones(3, step + 1, dtype=torch.int64)], dim=1)
                where = torch.full((3, 1), n + step)
                steps.append(
                    model(
                        input_ids=tokens[:, step : step + 1],
                        attention_mask=mask,
                        position_ids=where,
                        past_key_values=output.past_key_values,
                    ).logits[:, -1]
                )
            logits.append(torch.stack(steps))
    torch.testing.assert_close(logits[0], logits[1], atol=TOLERANCE, rtol=0)


@both
def test_where_nothing_is_dropped_the_static_cache_is_the_unpruned_models(method: str) -> None:
    model, _ = vlm.built("qwen2_5_vl")
    for batch, keep in [(vlm.row("qwen2_5_vl", 2), 0.3), (vlm.three("qwen2_5_vl"), 1.0)]:
        right = generate(model, batch, cache_implementation="static")
        with pruned(model, method, keep):
            found = generate(model, batch, cache_implementation="static")
        assert type(found.past_key_values) is StaticCache
        assert torch.equal(found.sequences, right.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(right.logits), atol=TOLERANCE, rtol=0)


@both
def test_compiled_decoding_compiles_once(method: str) -> None:
    """As generate does on a GPU; here traced, and run as it was traced."""
    model, _ = vlm.tiny_models.build("llava")
    batch = vlm.three("llava")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    with pruned(model, method), torch._dynamo.config.patch(error_on_recompile=True):
        right = generate(model, batch, 9)
        found = generate(model, batch, 9, cache_implementation="static", compile_config=config)
    assert torch.equal(found.sequences, right.sequences)
    assert graphs["unique_graphs"] >= 1


def test_an_unpruned_model_refuses_the_cache() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    with pruned(model, "divprune"):
        found = generate(model, batch, 2, past_key_values=static(model, 200))
    ids = torch.cat([found.sequences, torch.tensor([[5, 6]])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": found.past_key_values}
    with pytest.raises(ValueError, match="only a model pruned from there can continue it"):
        generate(model, turn, 2)
    assert "create_masks_for_generate" not in vars(model)


def test_a_static_cache_with_windows_is_refused() -> None:
    model, _ = vlm.built("gemma3")
    batch = vlm.alone("gemma3")
    with pruned(model, "divprune"):
        with pytest.raises(ValueError, match="a static cache with sliding-window layers does not fit a pruned model"):
            generate(model, batch, cache_implementation="static")
        assert generate(model, batch, 2).sequences.shape[1] == batch["input_ids"].shape[1] + 2
