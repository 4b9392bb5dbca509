"""Which patches a token is made of, and what they have received, for the towers of further families."""

import inspect
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from tests import vlm
from torch import Tensor

from flashprune.integrations.transformers import prune

NAMES = ("llava_next_video", "mistral3", "lighton_ocr", "idefics3", "smolvlm", "aya_vision", "cohere2_vision")
NAMES += (
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "janus",
    "ovis2",
    "vipllava",
    "qianfan_ocr",
    "video_llama_3",
    "paligemma",
)
FAMILIES = tuple(family for family in NAMES if family in vlm.MORE)
PROMPTS = {"three": vlm.three, "video": vlm.video}
CASES = [(family, "three") for family in FAMILIES] + [("llava_next_video", "video"), ("video_llama_3", "video")]
CLS = ("llava_next_video", "vipllava", "qianfan_ocr")
TOWERS = {"lighton_ocr": "vision_encoder", "video_llama_3": "vision_model"}
TOWERS |= dict.fromkeys(("idefics3", "smolvlm", "deepseek_vl", "deepseek_vl_hybrid", "janus"), "vision_model")


def encoder_scores(family: str, kind: str, batch: Any) -> Tensor:
    """`[T]`: what the patches of each token have received, by eager weights; which they are is read off gradients."""
    model, _ = vlm.built(family, "eager")
    tower = getattr(model.base_model, TOWERS.get(family, "vision_tower"))
    layers = [name for name, module in tower.named_modules() if type(module).__name__.endswith("Layer")]
    layer = tower.get_submodule(
        layers[1 if family in ("llava_next_video", "vipllava") else 2]
    )  # whose output becomes the features
    (attention,) = [module for module in layer.children() if type(module).__name__.endswith("Attention")]
    seen: dict[str, Any] = {}
    hooks = [
        attention.register_forward_hook(lambda _, args, output: seen.update(weights=output[1])),
        layer.register_forward_hook(lambda _, args, output: seen.update(states=output)),
    ]
    encode = getattr(model.base_model, f"get_{kind}_features")
    given = {name: batch[name] for name in inspect.signature(encode).parameters if name in batch}
    features = torch.cat(list(encode(**given, return_dict=True).pooler_output)).flatten(0, -2)
    for hook in hooks:
        hook.remove()

    weights, states = seen["weights"], seen["states"]  # [tiles, heads, n, n], [tiles, n, C]
    if isinstance(weights, list):  # of each image or frame
        received = torch.cat([one[0].mean((0, 1)) for one in weights])
    elif family in CLS:
        received = weights[:, :, 0, 1:].mean(1).flatten()
    elif "image_sizes" in given:  # all images in one sequence
        own = [h * w // 14**2 for h, w in given["image_sizes"].tolist()]
        received = weights[0].mean(0).sum(0) / torch.tensor(own).repeat_interleave(torch.tensor(own))
    else:
        received = weights.mean((1, 2)).flatten()
    found = []
    for token in features:
        (slope,) = torch.autograd.grad(token @ torch.linspace(1, 2, len(token)), states, retain_graph=True)
        of = (slope != 0).any(-1)
        patches = (of[:, 1:] if family in CLS else of).flatten()
        pooled = (family, kind) == ("llava_next_video", "video")
        found.append(received[patches].sum() / (int(patches.sum()) if pooled else 1))
    return torch.stack(found).detach()


@pytest.mark.parametrize(("family", "prompts"), CASES)
def test_attention_of_the_encoder(family: str, prompts: str) -> None:
    batch, kind = PROMPTS[prompts](family), "video" if prompts == "video" else "image"
    right = encoder_scores(family, kind, batch)
    assert right.std() > 0.1 * right.mean()
    with torch.no_grad(), prune(vlm.built(family)[0], "topk", 0.3, importance="received_attention") as handle:
        vlm.built(family)[0](**batch)
        found = torch.cat([item.scores for items in handle.last.items for item in items])
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)


PLANES = {
    "llava_next_video": [((5, 5), (6, 10))],
    "mistral3": [((4, 7),)],
    "lighton_ocr": [((4, 7),)],
    "idefics3": [((4, 4),)] * 5,
    "smolvlm": [((4, 4),)] * 5,
    "aya_vision": [((4, 4),)] * 3,
    "cohere2_vision": [((4, 4),)] * 3,
    "ovis2": [((4, 4),)] * 3,
    "qianfan_ocr": [((4, 4),) * 3],
    "video_llama_3": [((7, 13),)],
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grids(family: str) -> None:
    with prune(vlm.built(family)[0], "divprune", 0.3) as handle:
        vlm.built(family)[0](**vlm.alone(family))
    planes = [item.planes for items in handle.last.items for item in items]
    assert planes == PLANES.get(family, [((6, 6),)])


@pytest.mark.parametrize(("family", "plane"), [("llava_next_video", (2, 2)), ("video_llama_3", (3, 4))])
@torch.no_grad()
def test_grid_of_a_video(family: str, plane: tuple[int, int]) -> None:
    with prune(vlm.built(family)[0], "divprune", 0.3) as handle:
        vlm.built(family)[0](**vlm.video(family))
    assert [item.planes for items in handle.last.items for item in items] == [(plane,) * 5]


@torch.no_grad()
def test_idefics3_is_watched_in_whole_tiles_only() -> None:
    model, _ = vlm.built("idefics3")
    batch = vlm.alone("idefics3")
    batch["pixel_attention_mask"][0, 0, 60:] = 0
    with prune(model, "divprune", 0.3):
        model(**batch)
    with (
        prune(model, "topk", 0.3, importance="received_attention"),
        pytest.raises(ValueError, match="pixel_attention_mask must show whole tiles"),
    ):
        model(**batch)


@pytest.mark.parametrize("settings", [{"method": "idpruner", "scorer": vlm.scorer()}, {"method": "fastv"}], ids=str)
@torch.no_grad()
def test_a_video_of_which_the_model_drops_tokens_itself(settings: dict[str, Any]) -> None:
    model, _ = vlm.built("video_llama_3")
    batch = dict(vlm.video("video_llama_3"))
    video = batch["input_ids"] == model.config.video_token_id
    shown = torch.rand(int(video.sum()), generator=torch.Generator().manual_seed(0)) < 0.6
    stays = (~video).masked_scatter(video, shown)
    batch |= {name: batch[name][stays][None] for name in ("input_ids", "attention_mask")}
    batch["video_compression_mask"] = shown
    given = vlm.whole(model, batch)
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    with prune(model, keep=0.3, **settings) as handle:
        output = model(**batch).logits[0, -1]
        reply = model.generate(**batch, **options)[0, given.ids.shape[1] :].tolist()
        kept, last = vlm.kept_columns(handle.last, 0), handle.last
    right = vlm.logits(given, 0, kept, vlm.first_pruned(settings["method"]), reply[:-1])
    torch.testing.assert_close(output, right[0], atol=vlm.TOLERANCE, rtol=0)
    assert right.argmax(-1).tolist() == reply
    item = last.items[0][0]
    assert last.counts == [(int(shown.sum()), round(0.3 * int(shown.sum())))]
    assert item.positions.tolist() == [
        [t, y, x]
        for (t, y, x), here in zip(itertools.product(range(5), range(3), range(4)), shown, strict=True)
        if here
    ]
