"""The families beyond those of test_transformers.py, each on a few forms: what pruning them gives by hand."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import MORE, TOLERANCE, TOLERANCES

from flashprune.integrations.transformers import prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

TOKENS = 5
PROMPTS = {"alone": vlm.alone, "three": vlm.three, "video": vlm.video}
METHODS = [("idpruner", "alone"), ("idpruner", "three"), ("topk", "three"), ("fastv", "alone"), ("d2pruner", "three")]
ALL = [
    (family, prompts) for family in MORE for prompts in PROMPTS if prompts != "video" or family in vlm.tiny_models.VIDEO
]
FULL_ATTENTION = [family for family in MORE if vlm.full_attention(family)]
CASES = [
    (family, method, prompts)
    for family in MORE
    for method, prompts in [*METHODS, ("divprune", "video"), ("fastv", "video")]
    if (prompts != "video" or family in vlm.tiny_models.VIDEO) and (method in vlm.BEFORE or family in FULL_ATTENTION)
    if method != "topk" or family not in vlm.UNWATCHED
]


def greedy(model: Any, batch: Any, tokens: int = TOKENS, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens} | options
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def check_reply(given: vlm.Whole, row: int, kept: list[int] | None, first_layer: int, found: Any, atol: float) -> None:
    """Every step's logits, and that its token is the best one."""
    reply = found.sequences[row, given.ids.shape[1] :].tolist()
    right = vlm.logits(given, row, kept, first_layer, reply[:-1])
    steps = torch.stack(found.logits, dim=1)[row]
    torch.testing.assert_close(steps, right, atol=atol, rtol=0)
    assert steps.argmax(-1).tolist() == reply


@pytest.mark.parametrize(("family", "prompts"), ALL)
def test_the_oracle_without_pruning_is_the_model(family: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    given, found, atol = vlm.whole(model, batch), greedy(model, batch), TOLERANCES.get(family, TOLERANCE)
    for row in range(len(given.ids)):
        check_reply(given, row, None, 0, found, atol)


@pytest.mark.parametrize(("family", "method", "prompts"), CASES)
def test_a_pruned_model_computes_what_the_kept_tokens_give_by_hand(family: str, method: str, prompts: str) -> None:
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    given, first_layer, atol = vlm.whole(model, batch), vlm.first_pruned(method), TOLERANCES.get(family, TOLERANCE)
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        output = model(**batch)
        prefill = handle.last
        found = greedy(model, batch)
    for row in range(len(given.ids)):
        kept = vlm.kept_columns(prefill, row)
        assert kept == vlm.kept_columns(handle.last, row)
        visual = given.visual_columns(row)
        assert set(kept) <= set(visual)
        assert len(kept) == round(0.3 * len(visual))
        right = vlm.logits(given, row, kept, first_layer)[0]
        torch.testing.assert_close(output.logits[row, -1], right, atol=atol, rtol=0)
        assert (right - vlm.logits(given, row, None)[0]).abs().max() > 0.01 or not visual  # the cut shows
        check_reply(given, row, kept, first_layer, found, atol)


@pytest.mark.parametrize("family", MORE)
def test_keeping_everything_and_removing_change_no_bit(family: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    before, reply, footprint = model(**batch).logits, greedy(model, batch), vlm.footprint(model)
    for keep in (1.0, 0.3):
        with prune(model, "divprune", keep):
            assert torch.equal(model(**batch).logits, before) == (keep == 1.0)
            assert torch.equal(torch.stack(greedy(model, batch).logits), torch.stack(reply.logits)) == (keep == 1.0)
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, before)
    assert torch.equal(greedy(model, batch).sequences, reply.sequences)


@pytest.mark.parametrize("family", [family for family in MORE if family not in FULL_ATTENTION])
def test_methods_inside_the_llm_need_full_attention(family: str) -> None:
    model, _ = vlm.built(family)
    with pytest.raises(ValueError, match="needs full attention in every layer of the LLM"):
        prune(model, "fastv")


@pytest.mark.parametrize("family", [family for family in vlm.UNWATCHED if family in MORE])
def test_an_encoder_whose_attention_is_out_of_sight(family: str) -> None:
    with pytest.raises(ValueError, match=r"received_attention' needs GotOcr2\.scores\(\), which this family does not"):
        prune(vlm.built(family)[0], "topk", importance="received_attention")
