"""What a pruned model keeps is what flashprune.reference keeps of the same tokens, for every scope and budget."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import BEFORE, FAMILIES, INSIDE, WITH_VIDEO

import flashprune
from flashprune import reference
from flashprune.integrations.transformers import VisualTokens, prune

pytestmark = pytest.mark.filterwarnings("ignore:the prior's .* map is resized")

PROMPTS = {"alone": vlm.alone, "three": vlm.three, "video": vlm.video}
ALL = [(family, "three") for family in FAMILIES] + [(family, "video") for family in WITH_VIDEO]


def share(method: str) -> float:
    """What is kept; of CDPruner fewer tokens than the features are wide, since rounding decides beyond its rank."""
    return 0.2 if method == "cdpruner" else 0.3


def lengths(family: str, prompts: str) -> list[list[int]]:
    """Visual tokens of each image or video, prompt by prompt, counted off the processor's output."""
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    config = model.config
    found: list[list[int]] = []
    for ids in batch["input_ids"].tolist():
        visual = [token in (config.image_token_id, getattr(config, "video_token_id", None)) for token in ids]
        runs, previous = [], False
        for token in visual:
            if token and not previous:
                runs.append(0)
            if token:
                runs[-1] += 1
            previous = token
        found.append(runs)
    if family == "qwen3_vl" and prompts == "video":  # a run for each pair of frames, with its time stamp
        return [[sum(runs)] for runs in found]
    if family in ("llava_next", "llava_onevision") and prompts == "three":  # the images adjoin
        names = [name for name in ("pixel_values", "image_sizes", "batch_num_images") if name in batch]
        images = model.base_model.get_image_features(**{name: batch[name] for name in names}).pooler_output
        return [[len(images[0]), len(images[1])], [len(images[2])], []]
    return found


def naive_scores(features: Tensor) -> Tensor:
    """VisionSelector as its paper defines it: each token's mean product with all."""
    scorer = vlm.scorer()
    return (scorer.q_proj(features) @ scorer.k_proj(features).T).mean(1) / scorer.hidden**0.5


def by_hand(method: str, features: Tensor, importance: Tensor, k: int, positions: Tensor, prior: Tensor) -> list[int]:
    """One segment's kept tokens, by the definitions."""
    if method == "d2pruner":
        return reference.d2pruner(features, importance, k, prior=prior, alpha=0.5, positions=positions).tolist()
    found = {
        "idpruner": lambda: reference.idpruner(features, naive_scores(features), k),
        "visionselector": lambda: reference.topk_select(naive_scores(features), k),
        "divprune": lambda: reference.divprune(features, k),
        "cdpruner": lambda: reference.cdpruner(features, importance, k),
        "topk": lambda: reference.topk_select(importance, k),
        "naive_hybrid": lambda: reference.naive_hybrid(features, importance, k, pool_ratio=1.5),
        "fastv": lambda: reference.fastv(importance, k),
    }
    return found[method]().tolist()


def prior_by_hand(planes: list[tuple[int, int]], positions: Tensor) -> Tensor:
    """Each token's place in its plane's map; a newline's is that of the token before it."""
    maps = [
        reference.resize_prior(vlm.prior()[min(t, 1)].flatten(), (6, 6), grid).reshape(grid) * 36 / (grid[0] * grid[1])
        for t, grid in enumerate(planes)
    ]
    return torch.stack([maps[t][y, min(x, planes[t][1] - 1)] for t, y, x in positions.tolist()])


@pytest.mark.parametrize("scope", ["image", "request"])
@pytest.mark.parametrize("method", BEFORE + INSIDE)
@pytest.mark.parametrize(("family", "prompts"), ALL)
@torch.no_grad()
def test_the_kept_are_those_of_the_reference(family: str, prompts: str, method: str, scope: str) -> None:
    model, _ = vlm.built(family)
    batch = PROMPTS[prompts](family)
    given = vlm.whole(model, batch)
    first_layer = vlm.first_pruned(method)
    with prune(model, "topk", 0.3, importance="received_attention") as handle:
        model(**batch)
        encoder = [item.scores for items in handle.last.items for item in items]  # tested by itself
    with prune(model, method, share(method), scope=scope, **vlm.settings(method)) as handle:
        model(**batch)
        last = handle.last
    attention = vlm.llm_attention(family, batch, vlm.LAYER) if method in INSIDE else None
    segment, image = 0, 0
    for row, counts in enumerate(lengths(family, prompts)):
        columns = given.visual_columns(row)
        entered = vlm.states(given, row, None, 0, last_layer=first_layer)[0][0]
        inside = [column in columns for column in given.columns(row)]
        features, start = entered[inside], 0
        groups = [[n] for n in counts] if scope == "image" else [counts] if counts else []
        for group in groups:
            n = sum(group)
            here = slice(start, start + n)
            own, planes, blocks = last.items[segment], [], []
            assert [len(item) for item in own] == group
            for item in own:
                blocks.append(item.positions + torch.tensor([len(planes), 0, 0], dtype=torch.int32))
                planes += item.planes
            importance = torch.cat(encoder[image : image + len(group)]) if attention is None else attention[row][here]
            prior = torch.cat([prior_by_hand(list(item.planes), item.positions) for item in own])
            k = round(share(method) * n)
            right = by_hand(method, features[here], importance, k, torch.cat(blocks), prior)
            assert last.rows[segment] == row
            assert last.counts[segment] == (n, k)
            assert last.kept[segment].tolist() == right
            assert last.positions[segment].tolist() == [columns[here][i] for i in right]
            segment, image, start = segment + 1, image + len(group), start + n
        assert start == len(columns)
    assert segment == len(last.rows)
    assert last.tokens == int(given.visual.sum())
    assert last.tokens_kept == sum(k for _, k in last.counts)
    assert last.seconds > 0
    assert last.backend in ("cpu", "reference")


@pytest.mark.parametrize(
    ("keep", "rule", "kept"),
    [
        (0.29, "round", lambda n: round(0.29 * n)),
        (0.29, "floor", lambda n: int(0.29 * n)),
        (0.29, "ceil", lambda n: -int(-0.29 * n // 1)),
        (7, "round", lambda n: 7),
        (30, "round", lambda n: min(30, n)),
        (1, "round", lambda n: 1),
        (0.001, "round", lambda n: 1),
    ],
)
@pytest.mark.parametrize("scope", ["image", "request"])
@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_budgets(family: str, method: str, scope: str, keep: float, rule: str, kept: Any) -> None:
    model, _ = vlm.built(family)
    counts = lengths(family, "three")
    segments = [n for row in counts for n in row] if scope == "image" else [sum(row) for row in counts if row]
    with prune(model, method, keep, rule=rule, scope=scope) as handle:
        output = model(**vlm.three(family))
    assert handle.last is not None
    assert handle.last.counts == [(n, kept(n)) for n in segments]
    assert output.logits.shape[1] == handle.last.length[1]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("method", BEFORE + INSIDE)
def test_a_backend_asked_for_chooses(method: str, backend: str) -> None:
    if flashprune.backends()[backend] != "ready":
        pytest.skip(f"{backend}: {flashprune.backends()[backend]}")
    model, _ = vlm.built("llava_next")
    batch = vlm.three("llava_next")
    with prune(model, method, share(method), **vlm.settings(method)) as handle:
        model(**batch)
        right = handle.last
    with prune(model, method, share(method), backend=backend, **vlm.settings(method)) as handle:
        model(**batch)
    assert handle.last.backend == backend
    assert [one.tolist() for one in handle.last.kept] == [one.tolist() for one in right.kept]


def test_an_importance_of_ones_own_sees_the_tokens() -> None:
    model, _ = vlm.built("qwen2_5_vl")
    batch = vlm.three("qwen2_5_vl")
    given = vlm.whole(model, batch)
    seen: list[VisualTokens] = []

    def importance(tokens: VisualTokens) -> Tensor:
        seen.append(tokens)
        return tokens.features.norm(dim=1)

    with prune(model, "topk", 8, importance=importance, scope="image") as handle:
        model(**batch)
    (tokens,) = seen
    assert torch.equal(tokens.features, given.embeds[given.visual])
    assert torch.equal(tokens.input_ids, batch["input_ids"])
    assert tokens.lengths == [n for row in lengths("qwen2_5_vl", "three") for n in row]
    assert tokens.cu_seqlens.tolist() == [0, *torch.tensor(tokens.lengths).cumsum(0).tolist()]
    grids = (batch["image_grid_thw"][:, 1:] // 2).tolist()
    assert tokens.positions.tolist() == [[0, y, x] for h, w in grids for y in range(h) for x in range(w)]
    for kept, features in zip(handle.last.kept, tokens.features.split(tokens.lengths), strict=True):
        assert kept.tolist() == features.norm(dim=1).topk(8).indices.sort().values.tolist()


@pytest.mark.parametrize("family", WITH_VIDEO)
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_where_a_videos_tokens_stand(family: str, method: str) -> None:
    model, _ = vlm.built(family)
    batch = vlm.video(family)
    with prune(model, method, 0.5) as handle:
        model(**batch)
    frames = {"llava_onevision": [(3, 3)] * 5, "internvl": [(4, 4)]}.get(family)
    if frames is None:
        t, h, w = batch["video_grid_thw"][0].tolist()
        frames = [(h // 2, w // 2)] * t
    (items,) = handle.last.items
    assert len(items) == (5 if family == "internvl" else 1)  # whose frames are images to the model, with text between
    for item in items:
        assert item.kind == ("image" if family == "internvl" else "video")
        assert list(item.planes) == frames
        cells = [[t, y, x] for t, (h, w) in enumerate(frames) for y in range(h) for x in range(w)]
        newline = [[4, 2, 3]] if family == "llava_onevision" else []
        assert item.positions.tolist() == cells + newline


@pytest.mark.parametrize("keep", [np.int64(16), np.uint8(16), np.float64(0.25), np.float32(0.25), Fraction(1, 4)])
def test_keep_is_any_number(keep: Any) -> None:
    model, _ = vlm.built("llava")
    with prune(model, "divprune", keep) as handle:
        model(**vlm.alone("llava"))
    assert handle.last is not None and handle.last.counts == [(64, 16)]
