"""AngelSlim's token compressor is in no package index. Where it cannot be imported (from a checkout on the path), a
stand-in with the same modules, functions and fields takes its place; where it can, masks are compared with its own too.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.peers.angelslim_divprune import maxmin_loop
from benchmarks.peers.angelslim_idpruner import idpruner as mmr_loop
from safetensors.torch import save_file
from torch import Tensor

import flashprune as fp
from flashprune.integrations import angelslim

PACKAGE = "angelslim.compressor.token_compressor"
REAL = find_spec("angelslim") is not None and find_spec(PACKAGE) is not None
IMAGE = 9
DIM = 32
SCORER = torch.randn(DIM, generator=torch.Generator().manual_seed(5))


@dataclass
class StandInContext:
    """The fields of AngelSlim's PruningContext that the strategies read."""

    input_ids: Tensor
    inputs_embeds: Tensor | None
    model_config: Any
    llm_q: dict[int, Tensor] = field(default_factory=dict)
    llm_k: dict[int, Tensor] = field(default_factory=dict)
    feature_map: Tensor | None = None
    image_grid_thw: Tensor | None = None
    spatial_merge_size: int = 2


def stand_in() -> dict[str, ModuleType]:
    def tokens(context: StandInContext) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        mask = context.input_ids[0] == context.model_config.image_token_id
        return mask.nonzero().flatten(), (~mask).nonzero().flatten(), mask, []

    members: dict[str, dict[str, Any]] = {
        "factory": {"PRUNING_STRATEGIES": {"idpruner": None}},
        "base.context": {"PruningContext": StandInContext},
        "algorithm.utils.utils": {
            "_extract_and_validate_vision_token_info": tokens,
            "resolve_num_tokens_to_keep": lambda ratio, n: max(round(n * (1 - ratio)), min(n, 1 if ratio < 1 else 0)),
        },
        "algorithm.utils.vision_selector_utils": {"get_universal_selector_scores": None},
    }
    names = {"angelslim", "angelslim.compressor", PACKAGE, *(f"{PACKAGE}.{name}" for name in members)}
    names |= {name.rpartition(".")[0] for name in names if "." in name} | {f"{PACKAGE}.algorithm"}
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(__path__=[], **members.get(name.removeprefix(f"{PACKAGE}."), {}))
    return modules


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """AngelSlim or its stand-in, with a scorer that needs no weights, and flashprune's strategies registered."""
    if not REAL:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)

    def scores(selector_path: str, vision_hidden: Tensor, text_hidden: None = None, mode: str = "") -> Tensor:
        assert (selector_path, mode, text_hidden) == ("scorer", "raw", None)
        return vision_hidden @ SCORER.to(vision_hidden)

    utils = import_module(f"{PACKAGE}.algorithm.utils.vision_selector_utils")
    monkeypatch.setattr(utils, "get_universal_selector_scores", scores)
    if REAL:
        monkeypatch.setattr(import_module(f"{PACKAGE}.algorithm.idpruner"), "get_universal_selector_scores", scores)
    registry = import_module(f"{PACKAGE}.factory").PRUNING_STRATEGIES
    before = dict(registry)
    angelslim.register()
    yield SimpleNamespace(registry=registry, Context=import_module(f"{PACKAGE}.base.context").PruningContext)
    registry.clear()
    registry.update(before)


def context(slim: SimpleNamespace, seed: int = 0, images: tuple[int, ...] = (64, 36), **fields: Any) -> Any:
    """A prompt: text, images of so many tokens between text, text."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1, 2, 3]
    for count in images:
        ids += [IMAGE] * count + [4, 5]
    config = SimpleNamespace(model_type="llava", vision_config=None, image_token_id=IMAGE, image_token_index=IMAGE)
    embeds = torch.randn(1, len(ids), DIM, generator=generator)
    return slim.Context(input_ids=torch.tensor([ids]), inputs_embeds=embeds, model_config=config, **fields)


def visual(given: Any) -> Tensor:
    return (given.input_ids[0] == IMAGE).nonzero().flatten()


def check(mask: Tensor, given: Any, picks: Tensor) -> None:
    """The mask keeps all text and, of the visual tokens, these."""
    assert mask.dtype == torch.bool and mask.shape == given.input_ids.shape
    assert mask[0, given.input_ids[0] != IMAGE].all()
    assert mask[0, visual(given)].nonzero().flatten().tolist() == picks.sort().values.tolist()


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.333])
@pytest.mark.parametrize(("lam", "per_round"), [(0.5, 1), (0.2, 1), (0.5, 4)])
def test_idpruner_is_angelslims_loop(slim: SimpleNamespace, ratio: float, lam: float, per_round: int) -> None:
    for seed in range(3):
        given = context(slim, seed)
        options = {"ratio": ratio, "selector_path": "scorer", "mmr_lambda": lam, "parallel_k": per_round}
        mask = slim.registry["flashprune_idpruner"](given, **options)
        features = given.inputs_embeds[0, visual(given)]
        k = round(100 * (1 - ratio))
        check(mask, given, mmr_loop(features, features @ SCORER, k, lam=lam, parallel_k=per_round))
        if REAL:
            assert torch.equal(mask, slim.registry["idpruner"](given, **options))


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.333])
def test_divprune_is_angelslims_loop(slim: SimpleNamespace, ratio: float) -> None:
    for seed in range(3):
        given = context(slim, seed)
        mask = slim.registry["flashprune_divprune"](given, ratio=ratio)
        check(mask, given, maxmin_loop(given.inputs_embeds[0, visual(given)], round(100 * (1 - ratio))))
        if REAL:
            assert torch.equal(mask, slim.registry["divprune"](given, ratio=ratio))


@pytest.mark.parametrize(("ratio", "kept"), [(0, 100), (0.004, 100), (0.991, 1), (0.999, 1), (1.0, 0)])
def test_counts_at_the_ends(slim: SimpleNamespace, ratio: float, kept: int) -> None:
    given = context(slim)
    mask = slim.registry["flashprune_divprune"](given, ratio=ratio)
    assert int(mask[0, visual(given)].sum()) == kept
    assert int(mask.sum()) == kept + given.input_ids.shape[1] - 100


def states(given: Any, seed: int = 1) -> Any:
    """With queries, keys and hidden states of layer 2 captured: 4 heads, 2 key heads."""
    generator = torch.Generator().manual_seed(seed)
    length = given.input_ids.shape[1]
    given.llm_q[2] = torch.randn(1, 4, length, 8, generator=generator)
    given.llm_k[2] = torch.randn(1, 2, length, 8, generator=generator)
    given.feature_map = torch.randn(1, length, DIM, generator=generator)
    return given


def attention(given: Any) -> Tensor:
    """What the last text token pays the visual tokens, softmax over all, mean over heads."""
    key = given.llm_k[2][0].repeat_interleave(2, 0)
    weights = (given.llm_q[2][0, :, -1:] @ key.transpose(1, 2) / 8**0.5).softmax(-1)
    return weights.mean(0)[0, visual(given)]


def test_d2pruner_goes_by_the_last_text_tokens_attention(slim: SimpleNamespace) -> None:
    given = states(context(slim))
    mask = slim.registry["flashprune_d2pruner"](given, ratio=0.75, layer_idx=2, threshold=0.3, pivot_ratio=0.4)
    features = given.feature_map[0, visual(given)]
    scores = attention(given)
    expected = fp.reference.mis_select(features, scores, 25, threshold=0.3, pivots=10)
    check(mask, given, expected)
    assert expected.tolist() != fp.reference.topk_select(scores, 25).tolist()


def test_d2pruner_knows_places_from_square_images_or_their_grids(slim: SimpleNamespace) -> None:
    options = {"ratio": 0.75, "layer_idx": 2, "alpha": 0.2, "threshold": 0.5}
    given = states(context(slim))
    places = [(image, y, x) for image, side in enumerate((8, 6)) for y in range(side) for x in range(side)]
    expected = d2pruner(given, places)
    check(slim.registry["flashprune_d2pruner"](given, **options), given, expected)
    given = states(context(slim, images=(48, 52)))
    given.image_grid_thw = torch.tensor([[1, 8, 24], [1, 26, 8]])
    places = [(0, y, x) for y in range(4) for x in range(12)] + [(1, y, x) for y in range(13) for x in range(4)]
    check(slim.registry["flashprune_d2pruner"](given, **options), given, d2pruner(given, places))
    given = states(context(slim, images=(50,)))
    with pytest.raises(ValueError, match="50 visual tokens are no images of grids"):
        slim.registry["flashprune_d2pruner"](given, **options)


def d2pruner(given: Any, places: list[tuple[int, int, int]]) -> Tensor:
    return fp.d2pruner(
        given.feature_map[0, visual(given)],
        attention(given),
        25,
        positions=torch.tensor(places, dtype=torch.int32),
        alpha=0.2,
        threshold=0.5,
        backend="reference",
    )


def test_d2pruner_divides_out_a_prior(slim: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.19")
    given = states(context(slim, images=(64,)))
    prior = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.01
    path = tmp_path / "prior.safetensors"
    save_file({"prior": prior}, path, metadata={"layer": json.dumps(2)})
    mask = slim.registry["flashprune_d2pruner"](given, ratio=0.75, layer_idx=2, prior=str(path))
    features, scores = given.feature_map[0, visual(given)], attention(given)
    expected = fp.d2pruner(features, scores, 16, prior=prior.flatten() / prior.sum(), backend="reference")
    assert expected.tolist() != fp.d2pruner(features, scores, 16, backend="reference").tolist()
    check(mask, given, expected)


@pytest.mark.parametrize(
    ("name", "options", "broken", "error", "message"),
    [
        ("idpruner", {"ratio": 0.5}, {}, TypeError, "selector_path"),
        ("divprune", {}, {}, TypeError, "ratio"),
        ("divprune", {"ratio": 0.5, "similarity_func": "x"}, {}, TypeError, "similarity_func"),
        ("divprune", {"ratio": 0.5}, {"inputs_embeds": None}, ValueError, "set inputs_embeds: true"),
        ("d2pruner", {"ratio": 0.5, "layer_idx": 1}, {}, ValueError, "layer_idx=1 is not captured"),
        ("d2pruner", {"ratio": 0.5, "layer_idx": 2}, {"feature_map": None}, ValueError, "set feature_map: true"),
        (
            "d2pruner",
            {"ratio": 0.5, "layer_idx": 2},
            {"feature_map": torch.zeros(1, 300, DIM)},
            ValueError,
            "before an earlier pruning",
        ),
    ],
)
def test_what_is_missing_is_named(
    slim: SimpleNamespace,
    name: str,
    options: dict[str, Any],
    broken: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given = states(context(slim))
    for attribute, value in broken.items():
        setattr(given, attribute, value)
    with pytest.raises(error, match=message):
        slim.registry[f"flashprune_{name}"](given, **options)


def test_prompts_come_one_at_a_time(slim: SimpleNamespace) -> None:
    given = context(slim)
    given.input_ids = given.input_ids.expand(2, -1)
    with pytest.raises(ValueError, match="input_ids of one prompt"):
        slim.registry["flashprune_divprune"](given, ratio=0.5)


def test_registering_keeps_angelslims_own(slim: SimpleNamespace) -> None:
    before = dict(slim.registry)
    angelslim.register()
    assert slim.registry == before
    assert {"idpruner", "flashprune_idpruner", "flashprune_divprune", "flashprune_d2pruner"} <= set(slim.registry)


@pytest.mark.skipif(REAL, reason="AngelSlim is here")
def test_without_angelslim_the_error_says_where_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="from a checkout of Tencent/AngelSlim"):
        angelslim.register()
