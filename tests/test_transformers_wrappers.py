"""Models in wrappers, and inputs that hide their images."""

import copy
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from torch import nn
from transformers import ImageTextToTextPipeline

from flashprune.integrations.transformers import prune, unprune


def in_peft(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def in_a_pipeline(model: Any) -> Any:
    return ImageTextToTextPipeline(model=model, processor=vlm.built("llava")[1])


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [in_peft, in_a_pipeline, compiled, lambda model: compiled(in_peft(model))])
@torch.no_grad()
def test_the_model_inside_is_pruned(wrap: Any) -> None:
    model = copy.deepcopy(vlm.built("llava")[0])
    batch = vlm.alone("llava")
    wrapper = wrap(model)
    whole, footprint = model(**batch).logits, vlm.footprint(model)
    with prune(wrapper, "divprune", 0.3) as handle:
        right = model(**batch).logits
        assert handle.last is not None and right.shape[1] < whole.shape[1]
        with pytest.raises(ValueError, match="model is pruned already"):
            prune(wrapper, "divprune", 0.3)
        unprune(wrapper)
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, whole)


@torch.no_grad()
def test_a_peft_model_answers_pruned_with_labels_and_chosen_logits() -> None:
    model = in_peft(copy.deepcopy(vlm.built("llava")[0]))
    batch, inner = vlm.alone("llava"), model.get_base_model()
    columns = batch["input_ids"].shape[1]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    asked = {"labels": labels, "logits_to_keep": torch.tensor([columns - 2, columns - 1])}
    with prune(model, "divprune", 0.3):
        for name, value in asked.items():
            found, right = model(**batch, **{name: value}), inner(**batch, **{name: value})
            assert torch.equal(found.logits, right.logits)
            assert name == "logits_to_keep" or torch.equal(found.loss, right.loss)


def test_an_object_that_holds_a_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vlm = vlm.built("llava")[0]

    with pytest.raises(TypeError, match="must be a Transformers model, got Wrapper: pass its attribute vlm"):
        prune(Wrapper(), "divprune", 0.3)
    with pytest.raises(TypeError, match=r"must be a Transformers model, got int$"):
        prune(3, "divprune", 0.3)


@torch.no_grad()
def test_merged_embeddings_warn_once() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    merged = {"inputs_embeds": vlm.whole(model, batch).embeds, "attention_mask": batch["attention_mask"]}
    with prune(model, "divprune", 0.3) as handle:
        with pytest.warns(UserWarning, match="inputs_embeds came without images.*Pass input_ids"):
            model.generate(**merged, max_new_tokens=2)
        assert handle.last is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**merged)
            model(**batch)
            model.generate(**batch, max_new_tokens=2)
