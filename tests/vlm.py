"""Tiny vision-language models, their prompts, and what pruning them must give, worked out by hand.

Nothing here uses flashprune.integrations: the oracle embeds a prompt with the unpruned model's own functions, cuts it
with plain Python, and runs the decoder layers one by one on one prompt, without padding and without cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from examples import tiny_models
from PIL import Image
from torch import Tensor, nn

import flashprune as fp
from flashprune.cli.photos import load_photo

# Those that the whole matrix of methods and forms runs on, and those of test_transformers_families.py.
FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MORE = tuple(family for family in tiny_models.FAMILIES if family not in FAMILIES)
UNWATCHED = ("got_ocr2",)  # whose encoder's attention nobody sees
QWEN_VL = tiny_models.QWEN_VL
WITH_VIDEO = tuple(family for family in FAMILIES if family in tiny_models.VIDEO)
WIDTH = 64  # of the tiny language models

BEFORE = ("idpruner", "visionselector", "divprune", "cdpruner", "topk", "naive_hybrid")
INSIDE = ("d2pruner", "fastv")
LAYER = 1  # whose attention the methods inside use: the layers after it see fewer tokens
# Logits have a standard deviation of 1.5. The oracle and the unpruned model, of which it is a copy by hand, differ by
# up to 1.6e-5 themselves: other shapes, other order of float32 sums.
TOLERANCE = 4e-5
# A state updated token by token, or in chunks: the oracle and the unpruned Qwen3.5 differ by up to 8.2e-5.
TOLERANCES = {"qwen3_5": 2e-4, "qwen3_5_moe": 2e-4}


@cache
def built(family: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """The model, its weights open to gradients as after loading, and its processor; one of each a process."""
    model, processor = tiny_models.build(family)
    if family != "paligemma2":  # Gemma 2 knows but eager attention
        model.set_attn_implementation(attention)
    return model, processor


@cache
def photo(file: str, width: int, height: int) -> Image.Image:
    return Image.fromarray(load_photo(file)).resize((width, height))


def alone(family: str) -> Any:
    """One prompt about one image, wider than high."""
    return tiny_models.inputs(built(family)[1], [[photo("astronaut.png", 200, 112)]], ["What is this?"])


def three(family: str) -> Any:
    """A batch, padded on the left: two images of unlike size, one small image, and text alone."""
    return tiny_models.inputs(built(family)[1], *zip(*_three(), strict=True))


def row(family: str, index: int) -> Any:
    """A prompt of `three` by itself."""
    images, prompt = _three()[index]
    return tiny_models.inputs(built(family)[1], [images], [prompt])


def _three() -> list[tuple[list[Image.Image], str]]:
    return [
        ([photo("chelsea.png", 84, 140), photo("coffee.png", 150, 150)], "Compare the two."),
        ([photo("astronaut.png", 112, 60)], "Read the text on the sign and say which colour it has."),
        ([], "Hello, who are you?"),
    ]


def video(family: str) -> Any:
    """One prompt about five frames."""
    frames = [photo("coffee.png", 110 + i, 84) for i in range(5)]
    frames = [frame.resize((112, 84)) for frame in frames]
    return tiny_models.video_inputs(family, *built(family), frames, "What happens?")


def scorer(seed: int = 0) -> fp.VisionSelector:
    """A random scorer whose scores differ well."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fp.VisionSelector(WIDTH, 16).requires_grad_(False)


def prior() -> Tensor:
    """`[2, 6, 6]`, a map for the first plane of an image and one for all others, far from flat."""
    return torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.05


def settings(method: str) -> dict[str, Any]:
    """What `prune` needs for a method, so that the choice is not that of another."""
    if method in ("idpruner", "visionselector"):
        return {"scorer": scorer()}
    if method in ("cdpruner", "topk", "naive_hybrid"):
        pool = {"pool_ratio": 1.5} if method == "naive_hybrid" else {}
        return {"importance": "received_attention", **pool}
    return {"prior": prior(), "alpha": 0.5} if method == "d2pruner" else {}


def full_attention(family: str) -> bool:
    """Whether every layer of the LLM attends to all that came before."""
    config = tiny_models.make_config(family, "tiny", tiny_models.make_tokenizer(family)).get_text_config()
    return all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])


@dataclass
class Whole:
    """All that enters the language model of the unpruned model: embeddings `[B, L, D]`, positions `[1 or 3, B, L]`."""

    model: Any
    ids: Tensor
    embeds: Tensor
    positions: Tensor
    attended: Tensor  # bool [B, L]
    visual: Tensor  # bool [B, L]
    deepstack: list[Tensor]  # [B, L, D], what Qwen3-VL adds after each of its first layers
    deltas: list[int]  # position of the next token of each row, less its number of tokens
    both_ways: tuple[str, ...] = ()  # kinds of layers in which the tokens of an image see one another
    per_layer: Tensor | None = None  # [B, L, layers, d], what Gemma 4 looks up for each layer

    def images(self, row: int, columns: list[int]) -> Tensor:
        """Of each column, which run of visual ones it belongs to; -1 for text."""
        runs, found = -1, {}
        for column in self.visual_columns(row):
            runs += column - 1 not in found
            found[column] = runs
        return torch.tensor([found.get(column, -1) for column in columns])

    def visual_columns(self, row: int) -> list[int]:
        return self.visual[row].nonzero().flatten().tolist()

    def columns(self, row: int) -> list[int]:
        return self.attended[row].nonzero().flatten().tolist()


@torch.no_grad()
def whole(model: Any, batch: Any, by_column: bool = False) -> Whole:
    """Embed a batch with the functions of the unpruned model.

    `by_column`: positions count padding too, as LLaVA's and InternVL's forward has it where `generate` does not say.
    """
    base, ids = model.base_model, batch["input_ids"]
    attended = batch["attention_mask"].bool()
    embeds = base.get_input_embeddings()(ids)
    visual = torch.zeros_like(attended)
    deepstack: list[Tensor] = []
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if batch.get(pixels) is None:
            continue
        encode = getattr(base, f"get_{kind}_features")
        given = {name: batch[name] for name in inspect.signature(encode).parameters if name in batch}
        output = encode(**given, return_dict=True)
        features = torch.cat(list(output.pooler_output)).flatten(0, -2)
        if kind == "video" and "video_compression_mask" in batch:
            features = features[batch["video_compression_mask"]]
        here = ids == placeholder(base, kind)
        visual |= here
        embeds = embeds.masked_scatter(here.unsqueeze(-1), features)
        for index, mark in enumerate(getattr(base, "visual_indicator_token_ids", ())):  # Ovis2, around its tiles
            embeds[ids == mark] = output.visual_indicator_features[index]
        for index, layer in enumerate(getattr(output, "deepstack_features", None) or []):
            if len(deepstack) <= index:
                deepstack.append(torch.zeros_like(embeds))
            deepstack[index] = deepstack[index].masked_scatter(here.unsqueeze(-1), torch.cat(list(layer)))
    if hasattr(base, "get_rope_index") and visual.any():
        known = dict(batch) | {"second_per_grids": batch.get("video_second_per_grid")}
        given = {name: known[name] for name in inspect.signature(base.get_rope_index).parameters if name in known}
        positions, deltas = base.get_rope_index(**given)
        return Whole(model, ids, embeds, positions, attended, visual, deepstack, deltas.flatten().tolist())
    padding = (~attended).sum(1, keepdim=True)
    positions = torch.arange(ids.shape[1])[None] - (0 if by_column else padding)
    deltas = padding.flatten().tolist() if by_column else [0] * len(ids)
    positions = positions.expand(3 if hasattr(base, "get_rope_index") else 1, len(ids), -1)
    both_ways = {"gemma3": ("full_attention", "sliding_attention"), "gemma4": ("sliding_attention",)}
    given = Whole(model, ids, embeds, positions, attended, visual, deepstack, deltas)
    given.both_ways = both_ways.get(base.config.model_type, ())
    if base.config.model_type == "gemma4":
        padding = base.config.text_config.pad_token_id
        given.per_layer = decoder(model).get_per_layer_inputs(ids.masked_fill(visual, padding))
    return given


def placeholder(base: Any, kind: str) -> int:
    one_for_both = base.config.model_type.startswith("glm4")
    return getattr(base.config, f"{'image' if one_for_both else kind}_token_id")


def decoder(model: Any) -> Any:
    """The language model without its head."""
    base = model.base_model
    return base.language_model if hasattr(base, "language_model") else base.text_model


@torch.no_grad()
def joined(parts: list[Whole], batches: list[Any]) -> Whole:
    """One prompt after another as one, its positions those of the unpruned model."""
    base = parts[0].model.base_model
    ids = torch.cat([part.ids for part in parts], dim=1)
    attended, deltas = torch.ones_like(ids, dtype=torch.bool), [0]
    positions = torch.arange(ids.shape[1])[None, None]
    if hasattr(base, "get_rope_index"):
        kinds = torch.cat([batch["mm_token_type_ids"] for batch in batches], dim=1)
        media: dict[str, Any] = {}
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            found = [batch[name] for batch in batches if name in batch]
            if found and name in inspect.signature(base.get_rope_index).parameters:
                media[name] = torch.cat(found)
        positions, delta = base.get_rope_index(ids, mm_token_type_ids=kinds, **media)
        deltas = delta.flatten().tolist()
    layers = max(len(part.deepstack) for part in parts)
    deepstack = [
        torch.cat([part.deepstack[i] if part.deepstack else torch.zeros_like(part.embeds) for part in parts], dim=1)
        for i in range(layers)
    ]
    visual, embeds = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("visual", "embeds"))
    return Whole(parts[0].model, ids, embeds, positions, attended, visual, deepstack, deltas)


def mask(given: Whole, row: int, columns: list[int], kind: str) -> Tensor | None:
    """What the columns of a prompt see of one another in a kind of layer."""
    if kind == "linear_attention":
        return None
    back = torch.tensor(columns)[:, None] - torch.tensor(columns)
    seen = back >= 0
    sliding = kind == "sliding_attention"
    within = back < decoder(given.model).config.sliding_window if sliding else torch.ones_like(seen)
    seen &= within
    if kind in given.both_ways:
        images = given.images(row, columns)
        same = (images[:, None] == images) & (images >= 0)
        seen |= same & within if given.model.config.model_type in ("gemma3", "gemma4") else same
    if given.model.config.model_type == "paligemma":  # the whole prompt
        prompt = torch.tensor(columns) < given.ids.shape[1]
        seen |= prompt[:, None] & prompt
    return torch.zeros(seen.shape, dtype=given.embeds.dtype).masked_fill(~seen, float("-inf"))[None, None]


def rotary(lm: Any, hidden: Tensor, positions: Tensor, kind: str) -> Any:
    kinds = (kind,) if "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters else ()
    return lm.rotary_emb(hidden, positions if len(positions) == 3 else positions[0], *kinds)


@torch.no_grad()
def states(
    given: Whole,
    row: int,
    kept: list[int] | None,
    first_layer: int,
    reply: list[int] = (),
    last_layer: int | None = None,
) -> tuple[Tensor, list[int]]:
    """Hidden states `[1, n, D]` that enter layer `last_layer` (None: that leave the last), and their columns.

    The layers from `first_layer` on see, of the visual columns, only those in `kept` (None: all); `reply` follows the
    prompt, its columns counting on.
    """
    lm = decoder(given.model)
    kind = "full_attention" if getattr(lm.config, "sliding_window", None) is None else "sliding_attention"
    kinds = getattr(lm.config, "layer_types", None) or [kind] * len(lm.layers)
    columns = given.columns(row)
    after = range(given.ids.shape[1], given.ids.shape[1] + len(reply))
    hidden = torch.cat([given.embeds[row, columns], lm.embed_tokens(torch.tensor(reply, dtype=torch.int64))])[None]
    first = len(columns) + given.deltas[row]
    text = torch.arange(first, first + len(reply)).expand(len(given.positions), -1)
    positions = torch.cat([given.positions[:, row, columns], text], dim=1)[:, None]
    columns = [*columns, *after]
    visual, stay, lookups = set(given.visual_columns(row)), list(range(len(columns))), None
    if given.per_layer is not None:
        replies = lm.get_per_layer_inputs(torch.tensor([reply], dtype=torch.int64))
        lookups = torch.cat([given.per_layer[row, given.columns(row)][None], replies], dim=1)
        lookups = lm.project_per_layer_inputs(hidden, lookups)
    for index, layer in enumerate(lm.layers):
        if index == first_layer and kept is not None:
            stay = [i for i, column in enumerate(columns) if column not in visual or column in kept]
            hidden, positions = hidden[:, stay], positions[:, :, stay]
            columns = [columns[i] for i in stay]
        if index == last_layer:
            return hidden, columns
        own = {} if lookups is None else {"shared_kv_states": {}, "per_layer_input": lookups[:, stay, index]}
        hidden = layer(
            hidden,
            attention_mask=mask(given, row, columns, kinds[index]),
            position_embeddings=rotary(lm, hidden, positions, kinds[index]),
            **own,
        )
        if index < len(given.deepstack):
            here = [i for i, column in enumerate(columns) if column in visual]
            hidden[0, here] += given.deepstack[index][row, [columns[i] for i in here]]
    return hidden, columns


@torch.no_grad()
def logits(given: Whole, row: int, kept: list[int] | None, first_layer: int = 0, reply: list[int] = ()) -> Tensor:
    """`[1 + len(reply), V]`: what follows the prompt, and each token of a reply to it, with the kept tokens fixed.

    Attention is causal, so one pass over prompt and reply is every step recomputed from scratch.
    """
    hidden, _ = states(given, row, kept, first_layer, reply)
    head: nn.Module = given.model.get_output_embeddings()
    return head(decoder(given.model).norm(hidden[0, -1 - len(reply) :]))


def first_pruned(method: str) -> int:
    """The first layer that sees fewer tokens."""
    return LAYER + 1 if method in INSIDE else 0


def kept_columns(last: Any, row: int) -> list[int]:
    """The columns of a prompt that the handle says were kept."""
    found = [p.tolist() for r, p in zip(last.rows, last.positions, strict=True) if r == row]
    return sorted(column for segment in found for column in segment)


@torch.no_grad()
def llm_attention(family: str, batch: Any, layer: int) -> list[Tensor]:
    """`[n]` for each prompt: what its last token pays each visual token in a layer, the mean of all heads' weights."""
    model, _ = built(family, "eager")
    weights = model(**batch, output_attentions=True).attentions[layer]
    visual = whole(model, batch).visual
    return [weights[row, :, -1].mean(0)[visual[row]] for row in range(len(weights))]


def footprint(model: nn.Module) -> list[tuple[str, int, int, list[str], int | None]]:
    """What hooks and instance attributes every module has: equal before and after a pruning."""
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)), id(vars(m).get("config")))
        for name, m in model.named_modules()
    ]
