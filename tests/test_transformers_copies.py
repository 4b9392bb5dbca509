"""A pruned model copied, pickled, saved: pruned in its own right, and unpruned by `unprune`."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm

from flashprune.integrations.transformers import prune, unprune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

METHODS = ("idpruner", "topk", "d2pruner")  # with a scorer, taps in the encoder, and hooks inside the LLM


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_a_copy_is_pruned_in_its_own_right(family: str, method: str, copied: Any) -> None:
    if method in vlm.INSIDE and not vlm.full_attention(family):
        pytest.skip("its sliding layers are refused inside the LLM")
    model, _ = vlm.tiny_models.build(family)  # anew: Transformers' own hooks, put on by a first call, cannot be pickled
    batch = vlm.alone(family)
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        other = copied(model)
        right = model(**batch).logits
        last = handle.last
        assert torch.equal(other(**batch).logits, right)
        assert handle.last is last  # the copy's hooks tell the copy's own handle
        with torch.no_grad():
            other.get_output_embeddings().weight.zero_()
        assert torch.equal(model(**batch).logits, right)
        handle.remove()
        assert other(**batch).logits.shape == right.shape  # still pruned
    unprune(other)
    assert other(**batch).logits.shape == model(**batch).logits.shape != right.shape
    assert [entry[:-1] for entry in vlm.footprint(other)] == [entry[:-1] for entry in vlm.footprint(model)]


def test_a_lost_handle() -> None:
    model, _ = vlm.built("llava")
    footprint = vlm.footprint(model)
    unprune(model)
    prune(model, "divprune", 0.3)
    with pytest.raises(ValueError, match=r"call remove\(\) on its handle, or unprune\(model\), first"):
        prune(model, "divprune", 0.3)
    unprune(model)
    assert vlm.footprint(model) == footprint
    handle = prune(model, "fastv", 0.3)
    unprune(model.base_model)
    assert vlm.footprint(model) == footprint
    handle.remove()
    with pytest.raises(TypeError, match="model must be a Transformers model"):
        unprune(torch.nn.Linear(2, 2))
