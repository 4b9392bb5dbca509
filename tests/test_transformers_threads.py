"""One pruned model in several threads, and calls of it amid others: each answers as if it were alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import BEFORE, FAMILIES, INSIDE

from flashprune.integrations.transformers import VisualTokens, prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

THREADS = 4
TOKENS = 4
FAMILY = "qwen3_vl"  # the most hooks: features of the encoder are added inside the LLM
PROMPTS = ("alone", "row 0", "row 1", "row 2")
METHODS = [(method, FAMILY) for method in BEFORE + INSIDE] + [("fastv", name) for name in FAMILIES if name != FAMILY]


def prompt(family: str, name: str) -> Any:
    return vlm.alone(family) if name == "alone" else vlm.row(family, int(name[-1]))


def answer(model: Any, batch: Any) -> list[int]:
    return model.generate(**batch, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)[0].tolist()


@pytest.mark.parametrize(("method", "family"), METHODS)
def test_threads_answer_as_one_after_another(method: str, family: str) -> None:
    model, _ = vlm.built(family)
    batches = [prompt(family, name) for name in PROMPTS]
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[tuple[list[int], Any]]:
        start.wait()
        found: list[Any] = []
        for index in range(len(batches)):
            batch = batches[(thread + index) % len(batches)]
            reply = answer(model, batch)
            found.append((reply, None if handle.last is None else [one.tolist() for one in handle.last.positions]))
        return found

    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        alone: list[tuple[list[int], Any]] = []
        for batch in batches:
            reply = answer(model, batch)
            assert handle.last is not None
            alone.append((reply, [one.tolist() for one in handle.last.positions]))
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(work, range(THREADS)))
    for thread, own in enumerate(found):
        for index, (reply, kept) in enumerate(own):
            which = (thread + index) % len(batches)
            assert reply == alone[which][0]
            if PROMPTS[which] != "row 2":  # which has no image: the last prefill is one before
                assert kept == alone[which][1]


@pytest.mark.parametrize("family", [FAMILY, "llava"])
def test_an_importance_that_calls_the_model_itself(family: str) -> None:
    model, _ = vlm.built(family)
    batch, other = vlm.alone(family), vlm.row(family, 0)

    def importance(tokens: VisualTokens) -> torch.Tensor:
        if len(tokens.features) != other_tokens:
            model(**other)
        return tokens.features.float().norm(dim=-1)

    other_tokens = int(vlm.whole(model, other).visual.sum())
    with prune(model, "topk", 0.3, importance=lambda tokens: tokens.features.float().norm(dim=-1)) as handle:
        right = model(**batch).logits
    with prune(model, "topk", 0.3, importance=importance) as handle:
        assert torch.equal(model(**batch).logits, right)
        assert handle.last is not None and handle.last.tokens != other_tokens


def test_the_last_prefill_is_that_of_the_thread_that_asks() -> None:
    model, _ = vlm.built("llava")
    with prune(model, "divprune", 0.3) as handle, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**vlm.alone("llava"))).result()
        assert handle.last is not None  # this thread ran none
        elsewhere = handle.last.length
        model(**vlm.row("llava", 0))
        assert handle.last.length != elsewhere
        assert pool.submit(lambda: handle.last.length).result() == elsewhere
    assert handle.last.length != elsewhere
