"""Wrong use of the Transformers integration: an error that says what was expected, and the model as it was."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

import transformers
from tests import vlm

import flashprune as fp
from flashprune.integrations.transformers import Family, Prior, families, prune, register_family, supported
from flashprune.integrations.transformers.families import Llava

FAMILY = "qwen2_5_vl"


def small_llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


def test_a_model_that_is_not_supported() -> None:
    model = small_llama()
    footprint = vlm.footprint(model)
    with pytest.raises(ValueError, match="model type 'llama' is not supported") as caught:
        prune(model, "divprune")
    message = str(caught.value)
    assert all(name in message for name in vlm.FAMILIES)
    assert "register_family" in message
    assert vlm.footprint(model) == footprint
    with pytest.raises(TypeError, match="model must be a Transformers model, got Linear"):
        prune(torch.nn.Linear(2, 2), "divprune")


WRONG = [
    ({"keep": 0}, ValueError, "keep=0 leaves no visual token"),
    ({"keep": 0.0}, ValueError, "keep=0 leaves no visual token"),
    ({"keep": -1}, ValueError, "keep=-1"),
    ({"keep": 1.5}, ValueError, "keep=1.5 is a ratio and must lie between 0 and 1"),
    ({"keep": float("nan")}, ValueError, "keep=nan is a ratio"),
    ({"keep": "x"}, TypeError, "keep must be an int .* or a float .*, got str"),
    ({"keep": True}, TypeError, "keep must be an int .* or a float .*, got bool"),
    ({"method": "best"}, ValueError, "method must be .*idpruner.*got 'best'"),
    ({"scope": "batch"}, ValueError, "scope must be .*image.*request.*got 'batch'"),
    ({"rule": "evs"}, ValueError, "rule must be .*round.*got 'evs'"),
    ({"backend": "gpu"}, ValueError, "backend must be .*auto.*got 'gpu'"),
    ({"lam": 0.5}, TypeError, "lam is no option of method='divprune', which takes none"),
    ({"method": "fastv", "sort": False}, TypeError, "sort is no option of method='fastv'"),
    (
        {"method": "idpruner", "scorer": vlm.scorer(), "alpha": 0.5},
        TypeError,
        "alpha is no option .*takes lam, per_round",
    ),
    ({"method": "idpruner", "scorer": vlm.scorer(), "lam": 2.0}, ValueError, "lam"),
    ({"method": "naive_hybrid", "importance": "received_attention"}, TypeError, "needs pool_ratio"),
    ({"method": "idpruner"}, ValueError, "method='idpruner' needs one importance: scorer=.*got none"),
    (
        {"method": "idpruner", "scorer": vlm.scorer(), "importance": "received_attention"},
        ValueError,
        "needs one importance.*got scorer and importance",
    ),
    ({"scorer": vlm.scorer()}, ValueError, "scorer is not used by method='divprune'"),
    (
        {"method": "fastv", "importance": len},
        ValueError,
        "importance is not used by method='fastv', which uses the atten",
    ),
    (
        {"method": "topk", "importance": "norm"},
        ValueError,
        "importance must be 'received_attention', 'text_relevance' or a callable",
    ),
    (
        {"method": "topk", "importance": torch.ones(3)},
        ValueError,
        "importance must be 'received_attention', 'text_relevance' or a callable",
    ),
    ({"method": "topk", "scorer": fp.VisionSelector(32, 8)}, ValueError, "width 32, the model's have 64"),
    ({"method": "topk", "scorer": torch.nn.Linear(64, 1)}, TypeError, "scorer must be a VisionSelector .*got Linear"),
    ({"method": "topk", "scorer": "nowhere.safetensors"}, OSError, "nowhere.safetensors"),
    ({"encoder_layer": 1}, ValueError, "encoder_layer belongs to importance='received_attention'"),
    (
        {"method": "topk", "importance": "received_attention", "encoder_layer": 4},
        ValueError,
        "encoder_layer=4 must be below 4",
    ),
    ({"method": "topk", "importance": "received_attention", "encoder_layer": -1}, ValueError, "encoder_layer"),
    ({"method": "fastv", "layer": 3}, ValueError, "layer=3 leaves no layer after it: the LLM has 4"),
    ({"method": "fastv", "layer": -1}, ValueError, "layer"),
    ({"method": "fastv", "layer": 1.0}, TypeError, "layer"),
    ({"prior": vlm.prior()}, ValueError, "prior belongs to method='d2pruner', got method='divprune'"),
    (
        {"method": "d2pruner", "prior": 3},
        TypeError,
        "prior must be a file's name, a tensor of maps or a Prior, got int",
    ),
    (
        {"method": "d2pruner", "prior": torch.ones(3)},
        ValueError,
        r"prior must be \[h, w\] or \[P, h, w\] maps, got \[3\]",
    ),
    ({"method": "d2pruner", "prior": torch.ones(3, 3).int()}, TypeError, "prior must be floating point"),
    ({"method": "d2pruner", "prior": -torch.ones(3, 3)}, ValueError, "prior must be attention"),
    ({"method": "d2pruner", "prior": "nowhere.safetensors"}, OSError, "nowhere.safetensors"),
    ({"method": "d2pruner", "prior": vlm.prior(), "threshold": "x"}, TypeError, "threshold"),
    (
        {"method": "d2pruner", "prior": Prior(vlm.prior(), {"model": "llava-4x64"})},
        ValueError,
        "prior was measured with model='llava-4x64', this is model='qwen2_5_vl-4x64'",
    ),
    (
        {"method": "d2pruner", "prior": Prior(vlm.prior(), {"layer": 2})},
        ValueError,
        "prior was measured with layer=2, this is layer=1",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, _ = vlm.built(FAMILY)
    footprint = vlm.footprint(model)
    with pytest.raises(error, match=message):
        prune(model, **{"method": "divprune", **arguments})
    assert vlm.footprint(model) == footprint
    prune(model, "divprune").remove()


def test_a_backend_that_is_not_ready_raises_when_it_is_called() -> None:
    off = [name for name, status in fp.backends().items() if status != "ready"]
    if not off:
        pytest.skip("every backend is ready")
    model, _ = vlm.built(FAMILY)
    batch = vlm.alone(FAMILY)
    before = model(**batch).logits
    with pytest.raises(Exception, match=off[0]), prune(model, "divprune", backend=off[0]):
        model(**batch)
    assert torch.equal(model(**batch).logits, before)


def test_a_second_pruning_of_the_same_model() -> None:
    model, _ = vlm.built(FAMILY)
    batch = vlm.alone(FAMILY)
    with prune(model, "divprune", 0.3):
        right = model(**batch).logits
        with pytest.raises(ValueError, match="model is pruned already: call remove"):
            prune(model, "fastv", 0.5)
        with pytest.raises(ValueError, match="model is pruned already"):
            prune(model.base_model, "fastv", 0.5)
        assert torch.equal(model(**batch).logits, right)


def test_d2pruner_without_a_prior_warns() -> None:
    model, _ = vlm.built(FAMILY)
    with pytest.warns(UserWarning, match="d2pruner without prior") as caught:
        prune(model, "d2pruner", 0.3).remove()
    assert caught[0].filename == __file__


def test_a_prior_goes_through_a_file(tmp_path: Path) -> None:
    model, _ = vlm.built(FAMILY)
    batch = vlm.alone(FAMILY)
    Prior(vlm.prior(), {"model": "qwen2_5_vl-4x64", "layer": 1}).save(tmp_path / "prior.safetensors")
    kept = []
    for prior in (vlm.prior(), tmp_path / "prior.safetensors", str(tmp_path / "prior.safetensors")):
        with prune(model, "d2pruner", 0.3, prior=prior) as handle:
            model(**batch)
        kept.append(handle.last.positions[0].tolist())
    assert kept[0] == kept[1] == kept[2]
    with prune(model, "d2pruner", 0.3, prior=torch.ones(6, 6)) as handle:
        model(**batch)
    assert handle.last.positions[0].tolist() != kept[0]
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        prune(model, "d2pruner", 0.3, prior=tmp_path / "text")


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (
            lambda tokens: tokens.features,
            ValueError,
            r"importance must give one score a visual token, \[28\], got \[28, 64\]",
        ),
        (lambda tokens: tokens.features[1:, 0], ValueError, r"one score a visual token, \[28\], got \[27\]"),
        (lambda tokens: [1.0] * 28, TypeError, r"importance must give a tensor \[T\].*, got list"),
    ],
)
def test_an_importance_that_does_not_fit(importance: Any, error: type[Exception], message: str) -> None:
    model, _ = vlm.built(FAMILY)
    batch = vlm.alone(FAMILY)
    before, footprint = model(**batch).logits, vlm.footprint(model)
    with pytest.raises(error, match=message), prune(model, "topk", 0.3, importance=importance):
        model(**batch)
    assert vlm.footprint(model) == footprint
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_a_four_dimensional_mask(method: str) -> None:
    model, _ = vlm.built(FAMILY)
    batch = vlm.alone(FAMILY)
    n = batch["input_ids"].shape[1]
    square = torch.ones(1, 1, n, n, dtype=torch.bool)
    positions = vlm.whole(model, batch).positions
    with prune(model, method, 0.3):
        right = model(**batch).logits
        with pytest.raises(ValueError, match=rf"attention_mask must be \[B, L\].*got \[1, 1, {n}, {n}\]"):
            model(**{**batch, "attention_mask": square, "position_ids": positions})
        assert torch.equal(model(**batch).logits, right)


in_chunks = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="it answers otherwise in chunks there, pruned or not: without the images",
)


@in_chunks
@pytest.mark.parametrize("family", ["llava", FAMILY])
def test_a_prompt_prefilled_in_chunks(family: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.alone(family)
    with prune(model, "divprune", 0.3):
        with pytest.raises(ValueError, match="prefill in one piece"):
            model.generate(**batch, max_new_tokens=2, prefill_chunk_size=16)
        assert model.generate(**batch, max_new_tokens=2).shape[1] <= batch["input_ids"].shape[1] + 2


@in_chunks
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_text_after_a_pruned_prompt_may_come_in_chunks(method: str) -> None:
    model, processor = vlm.built(FAMILY)
    batch = vlm.three(FAMILY)
    more = processor.tokenizer(" And which colour has it?", return_tensors="pt")["input_ids"].expand(3, -1)
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "return_dict_in_generate": True}
    with prune(model, method, 0.3):
        first = model.generate(**batch, **options)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]
        replies = [
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=copy.deepcopy(first.past_key_values),
                prefill_chunk_size=size,
                output_logits=True,
                **options,
            )
            for size in (None, 3)
        ]
    right, found = (torch.stack(reply.logits) for reply in replies)
    torch.testing.assert_close(found, right, atol=vlm.TOLERANCE, rtol=0)


def test_images_encoded_before_the_pruning() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    encoded = model.base_model.get_image_features(batch["pixel_values"], return_dict=True)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with prune(model, "divprune", 0.3):
        right = model(**batch).logits
        with pytest.raises(ValueError, match=re.escape("mm_encoder_outputs['image'] was encoded before prune()")):
            model(**text, mm_encoder_outputs={"image": encoded})
        encoded = model.base_model.get_image_features(batch["pixel_values"], return_dict=True)
        assert torch.equal(model(**text, mm_encoder_outputs={"image": encoded}).logits, right)


def test_a_cache_pruned_from_another_layer_on() -> None:
    model, _ = vlm.built("llava")
    batch = vlm.alone("llava")
    with prune(model, "divprune", 0.3):
        cache = model(**batch).past_key_values
    with (
        prune(model, "fastv", 0.3),
        pytest.raises(ValueError, match="the cache was pruned from layer 0 on, not from 2"),
    ):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], past_key_values=cache)


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_families", list(families._families))

    class OwnConfig(transformers.LlavaConfig):
        model_type = "own_llava"

    class Own(Llava):
        model_types = ("own_llava",)

    model, _ = vlm.tiny_models.build("llava")
    for module in (model, model.base_model):
        module.config = OwnConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    batch = vlm.alone("llava")
    with pytest.raises(ValueError, match="'own_llava' is not supported"):
        prune(model, "divprune")
    register_family(Own)
    assert "own_llava" in supported()
    given = vlm.whole(model, batch)
    with prune(model, "divprune", 0.3) as handle:
        found = model(**batch).logits[0, -1]
    right = vlm.logits(given, 0, vlm.kept_columns(handle.last, 0))[0]
    torch.testing.assert_close(found, right, atol=vlm.TOLERANCE, rtol=0)


def test_a_family_that_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="family must be a class derived from Family"):
        register_family(Llava())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="family must be a class derived from Family"):
        register_family(int)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Nameless\.model_types is empty"):
        register_family(type("Nameless", (Family,), {}))
    assert supported() == sorted(vlm.tiny_models.ALL)


def test_a_family_that_says_only_where_its_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the documentation's example: it prunes, and what it lacks is told before the model is touched."""
    monkeypatch.setattr(families, "_families", list(families._families))

    class Minimal(Family):
        model_types = ("llava",)

        def items(self, base: Any, kind: str, arguments: Any, output: Any) -> list[Any]:
            return Llava().items(base, kind, arguments, output)

    register_family(Minimal)
    model, _ = vlm.built("llava")
    before = vlm.footprint(model)
    with pytest.raises(ValueError, match=r"needs Minimal\.scores\(\), which this family does not define"):
        prune(model, "topk", importance="received_attention")
    assert vlm.footprint(model) == before
    with prune(model, "divprune", 0.3) as handle:
        model(**vlm.alone("llava"))
    assert handle.last.counts == [(64, 19)]


def _registered(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    monkeypatch.setattr(families, "_families", list(families._families))
    register_family(type("Own", (Llava,), {"model_types": ("llava",), **attributes}))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"items": Family.items}, r"Own defines no items\(\)"),
        ({"text_model": "decoder"}, r"LlavaModel has no decoder: Own\.text_model must name it"),
        ({"text_model": "vision_tower"}, r"LlavaModel\.vision_tower has no list of layers: Own\.text_model"),
        ({"encoders": lambda self, base: {}}, "LlavaModel has no get_image_features or get_video_features"),
        ({"encoders": lambda self, base: {"image": "encode"}}, r"has no encode: Own\.encoders\(\) must name"),
        ({"tower": "eyes"}, r"LlavaModel has no eyes: Own\.tower must name it"),
        ({"tower": "multi_modal_projector"}, r"finds no attention to watch in Own\.tower, multi_modal_projector"),
    ],
)
def test_a_family_that_does_not_fit_its_model(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], message: str
) -> None:
    _registered(monkeypatch, **attributes)
    model, _ = vlm.built("llava")
    before = vlm.footprint(model)
    with pytest.raises(ValueError, match=message):
        prune(model, "topk", importance="received_attention")
    assert vlm.footprint(model) == before


def test_a_decoder_without_attention_to_read() -> None:
    model, _ = vlm.tiny_models.build("llava")
    del model.base_model.language_model.layers[3].self_attn
    with pytest.raises(ValueError, match="needs self_attn in every layer of the LLM, which LlamaModel lacks"):
        prune(model, "fastv")


@pytest.mark.skipif("qwen2_5_omni_thinker" not in vlm.MORE, reason="not in this version of Transformers")
def test_a_model_whose_thinker_is_to_be_pruned() -> None:
    class Whole(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self) -> None:
            super().__init__(transformers.LlamaConfig(model_type="qwen2_5_omni"))
            self.thinker = vlm.built("qwen2_5_omni_thinker")[0]

    with pytest.raises(ValueError, match=r"Whole sees and writes with its thinker: pass model\.thinker"):
        prune(Whole())
