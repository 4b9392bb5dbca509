"""The importance that pruning takes from a model's attention is that of the weights of eager attention."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from tests.vlm import FAMILIES, QWEN_VL, WITH_VIDEO
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashprune.integrations.transformers import prune
from flashprune.integrations.transformers.selection import Plan
from flashprune.integrations.transformers.tokens import VisualTokens

PROMPTS = {"alone": vlm.alone, "three": vlm.three, "video": vlm.video}


@pytest.fixture
def chosen_from(monkeypatch: pytest.MonkeyPatch) -> list[VisualTokens]:
    """The tokens of every selection."""
    seen: list[VisualTokens] = []
    select = Plan.select

    def watched(self: Plan, tokens: VisualTokens, ks: list[int]) -> Tensor:
        seen.append(tokens)
        return select(self, tokens, ks)

    monkeypatch.setattr(Plan, "select", watched)
    return seen


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("prompts", ["alone", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_last_token(
    family: str, prompts: str, layer: int, attention: str, chosen_from: list[VisualTokens]
) -> None:
    model, _ = vlm.built(family, attention)
    batch = PROMPTS[prompts](family)
    right = vlm.llm_attention(family, batch, layer)
    with prune(model, "fastv", 0.3, layer=layer):
        model(**batch)
    tokens = chosen_from[-1]
    found = tokens.attention
    assert found is not None
    close(found, torch.cat(right))
    assert found.std() > 0.2 * found.mean()  # not flat


def encoder_scores(family: str, batch: Any, kind: str, layer: int | None) -> Tensor:
    """`[T]`: the encoder's attention for each visual token, from eager weights and what went where by equality."""
    model, _ = vlm.built(family, "eager")
    base = model.base_model
    seen: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = (module, args, kwargs, output)

        return hook

    tower = base.visual if family in QWEN_VL else base.vision_tower
    modules = [m for m in tower.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    default = {"llava": 1, "llava_next": 1, "llava_onevision": 2, "internvl": 2, "glm4v": 2}.get(family, 3)
    projector = tower.merger if family in QWEN_VL else base.multi_modal_projector
    watched = {"attention": modules[default if layer is None else layer], "tower": tower, "projector": projector}
    hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in watched.items()]
    pixels, encode = {
        "image": ("pixel_values", base.get_image_features),
        "video": ("pixel_values_videos", base.get_video_features if kind == "video" else None),
    }[kind]
    given = {name: batch[name] for name in (pixels, f"{kind}_grid_thw") if name in batch}
    if kind == "image":
        given |= {name: batch[name] for name in ("image_sizes", "batch_num_images") if name in batch}
    with torch.no_grad():
        packed = torch.cat(list(encode(**given, return_dict=True).pooler_output)).flatten(0, -2)
    for hook in hooks:
        hook.remove()

    into, out = seen["projector"][1][0], seen["projector"][3]
    if family in QWEN_VL:
        patches = received_in_spans(*seen["attention"][:3])
        scores = torch.stack([patches[4 * i : 4 * i + 4].sum() for i in range(len(patches) // 4)])
        return scores[same_rows(packed, out)]
    weights = seen["attention"][3][1].mean(1)  # [tiles, n, n]
    # SigLIP has no CLS: what each patch receives from all, a share of 1.
    tiles = weights.mean(1) if family == "llava_onevision" else weights[:, 0, 1:]
    if family == "internvl":
        patches = seen["tower"][3].last_hidden_state[:, 1:]  # projected: four of them a token
        where = [same_rows(one.reshape(-1, patches.shape[-1]), own) for one, own in zip(into, patches, strict=True)]
        return torch.cat([own[at].reshape(-1, 4).sum(1) for own, at in zip(tiles, where, strict=True)])
    if kind == "video":  # every frame's 5 x 5 patches to 3 x 3 tokens, a newline after the last frame
        pooled = functional.interpolate(tiles.reshape(-1, 1, 5, 5), size=(3, 3), mode="bilinear")
        return torch.cat([pooled.flatten(), torch.zeros(1)])
    flat = (
        torch.cat([out.flatten(0, 1), base.image_newline[None]])
        if hasattr(base, "image_newline")
        else out.flatten(0, 1)
    )
    return torch.cat([tiles.flatten(), torch.zeros(1)])[same_rows(packed, flat)]


def same_rows(rows: Tensor, among: Tensor) -> Tensor:
    """Which row of `among` each of `rows` is, to the bit."""
    equal = (rows[:, None] == among[None]).all(-1)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1)


def received_in_spans(module: Any, args: Any, kwargs: Any) -> Tensor:
    """`[patches]`: what each receives within its span, of queries and keys made of what entered Qwen's attention."""
    states = args[0] if args else kwargs["hidden_states"]
    query, key, _ = module.qkv(states).reshape(len(states), 3, module.num_heads, -1).permute(1, 0, 2, 3)
    rotate = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb_vision"]
    query, key = rotate(query, key, *kwargs["position_embeddings"])
    ends = kwargs["cu_seqlens"].tolist()
    found = []
    for start, end in itertools.pairwise(ends):
        products = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / math.sqrt(query.shape[-1])
        found.append(products.softmax(-1).mean((0, 1)))
    return torch.cat(found).detach()


CASES = [(family, "image", "three") for family in FAMILIES]
CASES += [(family, "image", "alone") for family in FAMILIES if family != "llava_onevision"]
CASES += [(family, "image", "alone") for family in ("qwen3_5", "glm4v") if family in vlm.MORE]
CASES += [(family, "image" if family == "internvl" else "video", "video") for family in WITH_VIDEO]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [None, 0])
@pytest.mark.parametrize(("family", "kind", "prompts"), CASES)
def test_attention_of_the_encoder(
    family: str, kind: str, prompts: str, layer: int | None, attention: str, chosen_from: list[VisualTokens]
) -> None:
    model, _ = vlm.built(family, attention)
    batch = PROMPTS[prompts](family)
    right = encoder_scores(family, batch, kind, layer)
    with prune(model, "topk", 0.3, importance="received_attention", encoder_layer=layer):
        model(**batch)
    tokens = chosen_from[-1]
    assert tokens.scores is not None
    close(tokens.scores, right)


@pytest.mark.parametrize(("family", "side"), [("gemma3", 2), ("gemma4", 2)])
def test_attention_of_the_encoder_of_gemma(family: str, side: int, chosen_from: list[VisualTokens]) -> None:
    """What the 2 x 2 patches of a token receive, from the weights of the last layer; Gemma 4 fills images up."""
    if family not in vlm.MORE:
        pytest.skip("not in this version of Transformers")
    model, _ = vlm.built(family, "eager")
    batch, seen = vlm.three(family), []
    modules = [m for m in model.base_model.vision_tower.modules() if type(m).__name__.endswith("Attention")]
    hook = modules[-1].register_forward_hook(lambda _, args, output: seen.append(output[1].mean(1)))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    right = []
    for image, weights in enumerate(seen[0]):
        places = [(x, y) for y in range(8) for x in range(8)]
        if family == "gemma4":
            places = [(x, y) for x, y in batch["image_position_ids"][image].tolist() if x >= 0]
        received = weights[: len(places), : len(places)].mean(0).tolist()
        width, height = (max(place) // side + 1 for place in zip(*places, strict=True))
        sums = [0.0] * (width * height)
        for (x, y), one in zip(places, received, strict=True):
            sums[y // side * width + x // side] += one
        right += sums
    with prune(model, "topk", 0.3, importance="received_attention"):
        model(**batch)
    tokens = chosen_from[-1]
    assert tokens.scores is not None
    close(tokens.scores, torch.tensor(right))


def test_attention_of_the_encoder_where_onevision_scales_its_tiles_down(chosen_from: list[VisualTokens]) -> None:
    model, _ = vlm.built("llava_onevision", "eager")
    batch, base = vlm.alone("llava_onevision"), model.base_model
    seen: list[Tensor] = []
    attention = base.vision_tower.encoder.layers[-1].self_attn
    hook = attention.register_forward_hook(lambda _, args, output: seen.append(output[1].mean((1, 2))))
    base.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)
    hook.remove()
    first, *tiles = seen[0].reshape(-1, 5, 5)
    # The photograph, 200 x 112, was put on 2 x 3 tiles as 210 x 118: of 10 rows of patches one is padding on each side.
    assert len(tiles) == 6
    mosaic = torch.cat([torch.cat(tiles[:3], dim=1), torch.cat(tiles[3:], dim=1)])[1:-1]
    scale = math.sqrt(mosaic.numel() / (2 * 25))
    size = (int(8 // scale), int(15 // scale))
    scaled = functional.interpolate(mosaic[None, None], size, mode="bilinear")[0, 0]
    right = torch.cat([first.flatten(), functional.pad(scaled, (0, 1)).flatten()])
    with prune(model, "topk", 0.3, importance="received_attention"):
        model(**batch)
    tokens = chosen_from[-1]
    assert tokens.scores is not None
    close(tokens.scores, right)


@pytest.mark.parametrize("method", ["topk", "fastv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_flash_attention_is_reached_under_its_own_name(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it computes with PyTorch, in FlashAttention's layout and with the arguments that it is given."""
    name, seen = "flash_attention_2", []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        packed = query.shape[2] > 1 and kwargs.get("position_ids") is not None
        seen.append((module, module.config._attn_implementation, packed))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if "cu_seq_lens_q" in kwargs:
            ends = kwargs["cu_seq_lens_q"].tolist()
            spans = torch.block_diag(*(torch.ones(b - a, b - a) for a, b in itertools.pairwise(ends))).bool()
            out = functional.scaled_dot_product_attention(query, key, value, spans, scale=kwargs["scaling"])
        else:
            assert attention_mask is None
            causal = query.shape[2] > 1 and kwargs.get("is_causal", module.is_causal)
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    model, _ = vlm.built(family)
    batch = vlm.alone(family)
    given = vlm.whole(model, batch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attend)
    for module in {id(m.config): m for m in model.modules() if hasattr(m, "config")}.values():
        monkeypatch.setattr(module.config, "_attn_implementation_internal", name)
    with prune(model, method, 0.3, **vlm.settings(method)) as handle:
        output = model(**batch)
        found = model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4)
        kept = vlm.kept_columns(handle.last, 0)
    monkeypatch.undo()
    reply = found[0, given.ids.shape[1] :].tolist()
    right = vlm.logits(given, 0, kept, vlm.first_pruned(method), reply)
    torch.testing.assert_close(output.logits[0, -1], right[0], atol=vlm.TOLERANCE, rtol=0)
    assert right[:-1].argmax(-1).tolist() == reply
    assert {own for _, own, _ in seen} == {name}
    text = [m.self_attn for m in model.base_model.language_model.layers]
    assert {id(m) for m in text} <= {id(m) for m, *_ in seen}
    # Positions that are not consecutive would count as packed sequences: no layer that sees fewer tokens is given them.
    assert not any(
        packed for module, _, packed in seen if any(module is one for one in text[vlm.first_pruned(method) :])
    )
