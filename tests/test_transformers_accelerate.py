"""Models that accelerate spreads and moves: pruned, they answer as they do at one place."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")
pytest.importorskip("accelerate")

import accelerate
from safetensors.torch import save_file
from tests import vlm
from torch import nn
from torch.utils._pytree import tree_map

from flashprune.integrations.transformers import prune

ALL = vlm.tiny_models.FAMILIES
TOKENS = 3


def everywhere_hooks(model: Any, folder: Path) -> None:
    """One device, with the hooks that move what every module takes and gives."""
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any, folder: Path) -> None:
    """No weight is there but while its module runs."""
    accelerate.cpu_offload(model, torch.device("cpu"))


def half_on_disk(model: Any, folder: Path) -> None:
    """The layers of the LLM in two halves, of which one is a file."""
    layers = vlm.decoder(model).layers
    half = set(layers[len(layers) // 2 :])
    places: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        inside = set(module.modules())
        if module in half or not inside & half:
            places[name] = "disk" if module in half else "cpu"
            return
        places.update((f"{name}.{own}".lstrip("."), "cpu") for own, _ in module.named_parameters(recurse=False))
        for own, child in module.named_children():
            place(f"{name}.{own}".lstrip("."), child)

    place("", model)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def greedy(model: Any, batch: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def answers(model: Any, batch: Any, method: str) -> list[torch.Tensor]:
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        forward = model(**batch).logits
        kept = [*handle.last.positions]
        found = greedy(model, batch)
    return [forward, *kept, *handle.last.positions, found.sequences, *found.logits]


@pytest.mark.parametrize("spread", [everywhere_hooks, offloaded, half_on_disk])
@pytest.mark.parametrize("family", ALL)
def test_a_spread_model_answers_as_at_one_place(family: str, spread: Any, tmp_path: Path) -> None:
    model, _ = vlm.built(family)
    batch = vlm.three(family)
    before = "divprune" if family in vlm.UNWATCHED else "topk"
    methods = (before, "fastv") if vlm.full_attention(family) else (before,)
    right = [answers(model, batch, method) for method in methods]
    model = copy.deepcopy(model)
    spread(model, tmp_path)
    try:
        greedy(model, batch)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"unpruned it fails too: {error}")
    for method, expected in zip(methods, right, strict=True):
        for one, other in zip(answers(model, batch, method), expected, strict=True):
            torch.testing.assert_close(one, other, atol=vlm.TOLERANCE, rtol=0)


def test_a_scorer_from_a_file_goes_where_the_tokens_are(tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in vlm.scorer().state_dict().items()}
    save_file(weights, tmp_path / "scorer.safetensors")
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    with prune(model, "idpruner", 0.3, scorer=vlm.scorer()):
        right = model(**batch).logits
    model = copy.deepcopy(model)
    offloaded(model, tmp_path)  # its parameters say that they are on no device
    with prune(model, "idpruner", 0.3, scorer=tmp_path / "scorer.safetensors"):
        torch.testing.assert_close(model(**batch).logits, right, atol=vlm.TOLERANCE, rtol=0)


def rebuilt(output: Any) -> Any:
    """As accelerate does it when it moves the output."""
    return type(output)({name: one for name, one in output.items()})


def unflattened(output: Any) -> Any:
    """As torch does it to whatever goes through its functions."""
    return tree_map(lambda one: one.clone() if isinstance(one, torch.Tensor) else one, output)


def pickled(output: Any) -> Any:
    return pickle.loads(pickle.dumps(output))


@pytest.mark.parametrize("carry", [rebuilt, unflattened, pickled, copy.copy, copy.deepcopy, dataclasses.replace])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_what_is_known_of_an_encoders_output_goes_where_it_goes(family: str, carry: Any) -> None:
    model, _ = vlm.built(family)
    batch = vlm.alone(family)
    encode = model.base_model.get_image_features
    with prune(model, "topk", 0.3, **vlm.settings("topk")) as handle:
        right = model(**batch).logits
        kept = [one.tolist() for one in handle.last.positions]
        given = {name: batch[name] for name in inspect.signature(encode).parameters if name in batch}
        output = carry(model.base_model.get_image_features(**given, return_dict=True))
        assert isinstance(output, type(encode(**given, return_dict=True)))
        text = {name: value for name, value in batch.items() if name not in given}
        grid = {name: value for name, value in batch.items() if name == "image_grid_thw"}
        found = model(**text, **grid, mm_encoder_outputs={"image": output}).logits
        assert [one.tolist() for one in handle.last.positions] == kept
    assert torch.equal(found, right)
