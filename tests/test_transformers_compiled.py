"""Models that were compiled, before or after `prune`: pruned, or an error, never whole in silence."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm

from flashprune.integrations.transformers import prune


@pytest.fixture
def model() -> Any:
    """Of few layers: Dynamo takes long."""
    torch.compiler.reset()
    model = copy.deepcopy(vlm.built("llava")[0])
    language_model = vlm.decoder(model)
    language_model.layers = language_model.layers[:3]
    language_model.config.num_hidden_layers = 3
    return model


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@torch.no_grad()
def test_a_decoder_compiled_before(model: Any, method: str) -> None:
    batch, settings = vlm.alone("llava"), vlm.settings(method)
    with prune(model, method, 0.3, **settings):
        right = model(**batch).logits
    vlm.decoder(model).compile(backend="eager")
    whole = model(**batch).logits
    with prune(model, method, 0.3, **settings) as handle:
        torch.testing.assert_close(model(**batch).logits, right, atol=vlm.TOLERANCE, rtol=0)
        assert handle.last is not None
    torch.testing.assert_close(model(**batch).logits, whole, atol=vlm.TOLERANCE, rtol=0)


@pytest.mark.parametrize(("method", "past"), [("divprune", "base"), ("divprune", "decoder"), ("fastv", "layer")])
@torch.no_grad()
def test_what_runs_past_the_hooks_is_an_error(model: Any, method: str, past: str) -> None:
    batch = vlm.alone("llava")
    parent, name = {
        "base": (model, "model"),
        "decoder": (model.base_model, "language_model"),
        "layer": (vlm.decoder(model).layers, "2"),
    }[past]
    module = getattr(parent, name)
    with prune(model, method, 0.3):
        right = model(**batch).logits
        hooks, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
        with pytest.raises(RuntimeError, match=r"nothing was pruned: .* ran without the hooks of prune"):
            model(**batch)
        module._forward_pre_hooks = hooks
        assert torch.equal(model(**batch).logits, right)


@torch.no_grad()
def test_a_step_on_a_pruned_cache_is_one_graph(model: Any) -> None:
    """A prefill with images is not: pruned or not, Transformers takes a lock there, and kept columns are read."""
    batch = vlm.alone("llava")
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with prune(model, "divprune", 0.3):
        output = model(**batch)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        right = model(input_ids=token, past_key_values=copy.deepcopy(output.past_key_values)).logits
        found = whole(input_ids=token, past_key_values=output.past_key_values).logits
    torch.testing.assert_close(found, right, atol=vlm.TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_whole_model_compiled_before() -> None:
    torch.compiler.reset()
    model = copy.deepcopy(vlm.built("qwen2_5_vl")[0])
    batch = vlm.alone("qwen2_5_vl")
    with prune(model, "divprune", 0.3):
        right = model(**batch).logits
    compiled = torch.compile(model, backend="eager")
    assert compiled(**batch).logits.shape[1] > right.shape[1]
    with prune(model, "divprune", 0.3) as handle:
        torch.testing.assert_close(compiled(**batch).logits, right, atol=vlm.TOLERANCE, rtol=0)
        assert handle.last is not None
