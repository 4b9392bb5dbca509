"""AngelSlim's token compressor on flashprune's kernels: strategies of its signature, for its evaluations as they are.

`register()` adds them to AngelSlim's registry; then a configuration names them in place of AngelSlim's own:
``strategy: "flashprune_idpruner"`` for ``"idpruner"``, with the same ``params``. A strategy takes AngelSlim's
``PruningContext`` of one prompt and returns its keep mask, bool ``[1, L]``: all text, and of the visual tokens as many
as AngelSlim's own strategies keep.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import importance, methods

_PACKAGE = "angelslim.compressor.token_compressor"


def flashprune_idpruner(
    context: Any, *, ratio: float, selector_path: str, mmr_lambda: float = 0.5, parallel_k: int = 1
) -> Tensor:
    """AngelSlim's ``idpruner``: `flashprune.idpruner` with the scores of its selector model, before the LLM.

    `ratio`: the share pruned; `selector_path`: folder or repository of the scorer; `mmr_lambda`, `parallel_k`: ``lam``
    and ``per_round`` of `flashprune.idpruner`. Scores are scaled in float32, there in the scorer's type. The options
    ``similarity_func`` and ``importance_func``, which hold code, are not taken.
    """
    scorer = import_module(f"{_PACKAGE}.algorithm.utils.vision_selector_utils").get_universal_selector_scores

    def select(features: Tensor, k: int) -> Tensor:
        scores = scorer(selector_path=selector_path, vision_hidden=features[None], text_hidden=None, mode="raw")
        return methods.idpruner(features, scores.squeeze(0), k, lam=mmr_lambda, per_round=parallel_k)

    return _keep_mask(context, ratio, lambda visual, k: select(_embeddings(context)[visual], k))


def flashprune_divprune(context: Any, *, ratio: float) -> Tensor:
    """AngelSlim's ``divprune``: `flashprune.divprune`, before the LLM; in float32, there in the model's type."""
    return _keep_mask(context, ratio, lambda visual, k: methods.divprune(_embeddings(context)[visual], k))


def flashprune_d2pruner(
    context: Any,
    *,
    ratio: float,
    layer_idx: int,
    prior: str | os.PathLike[str] | None = None,
    pivot_ratio: float = 0.7,
    alpha: float = 1.0,
    threshold: float = 0.8,
) -> Tensor:
    """D2Pruner, which AngelSlim has not: `flashprune.d2pruner` after an LLM layer, by its attention.

    In the configuration it stands at the layer after which to prune, with the ``requirements`` ``llm_q_layers`` and
    ``llm_k_layers`` of `layer_idx`, and ``feature_map: true`` for the features, which AngelSlim takes before its first
    attention layer. `prior`: a file of `flashprune calibrate`. With `alpha` below 1 or a prior, tokens need places:
    ``image_grid_thw``, or images of square grids.
    """
    query, key = context.llm_q.get(layer_idx), context.llm_k.get(layer_idx)
    if query is None or key is None:
        raise ValueError(f"layer_idx={layer_idx} is not captured: name it in llm_q_layers and llm_k_layers")
    if context.feature_map is None:
        raise ValueError("no hidden states are captured: set feature_map: true in the requirements")
    if context.feature_map.shape[1] != context.input_ids.shape[1]:
        raise ValueError("the hidden states are those from before an earlier pruning: prune once")

    def select(visual: Tensor, k: int) -> Tensor:
        last = int((~_visual_mask(context, visual)).nonzero()[-1])
        attention = importance.query_attention(
            query[0, :, last : last + 1].transpose(0, 1), key[0, :, : last + 1].transpose(0, 1), visual=visual
        )
        grids = _grids(context, visual) if alpha < 1 or prior is not None else []
        return methods.d2pruner(
            context.feature_map[0, visual],
            attention,
            k,
            prior=None if prior is None else _prior(prior, grids).to(attention),
            positions=_places(grids).to(visual.device) if grids else None,
            pivot_ratio=pivot_ratio,
            alpha=alpha,
            threshold=threshold,
        )

    return _keep_mask(context, ratio, select)


STRATEGIES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (flashprune_idpruner, flashprune_divprune, flashprune_d2pruner)
}


def register() -> None:
    """Add the strategies to AngelSlim's registry; calling it again changes nothing.

    Raises ModuleNotFoundError where there is no AngelSlim with a token compressor (its package on PyPI has none).
    """
    try:
        factory = import_module(f"{_PACKAGE}.factory")
    except ModuleNotFoundError as error:
        message = f"flashprune needs {_PACKAGE} for this, from a checkout of Tencent/AngelSlim: {error}"
        raise ModuleNotFoundError(message, name=error.name) from error
    factory.PRUNING_STRATEGIES.update(STRATEGIES)


def _keep_mask(context: Any, ratio: float, select: Callable[[Tensor, int], Tensor]) -> Tensor:
    if context.input_ids is None or context.input_ids.shape[0] != 1:
        raise ValueError("the context must hold input_ids of one prompt, [1, L]")
    utils = import_module(f"{_PACKAGE}.algorithm.utils.utils")
    visual = utils._extract_and_validate_vision_token_info(context)[0]
    k = utils.resolve_num_tokens_to_keep(ratio, len(visual))
    keep = torch.ones_like(context.input_ids, dtype=torch.bool)
    if k < len(visual):
        keep[0, visual] = False
        keep[0, visual[select(visual, k)]] = True
    return keep


def _embeddings(context: Any) -> Tensor:
    if context.inputs_embeds is None:
        raise ValueError("the context must hold inputs_embeds: set inputs_embeds: true in the requirements")
    return context.inputs_embeds[0]


def _visual_mask(context: Any, visual: Tensor) -> Tensor:
    return torch.zeros_like(context.input_ids[0], dtype=torch.bool).index_fill(0, visual, True)


def _grids(context: Any, visual: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each image's tokens."""
    if context.image_grid_thw is not None:
        merge = context.spatial_merge_size
        grids = [(h // merge, w // merge) for t, h, w in context.image_grid_thw.tolist() for _ in range(t)]
    else:
        breaks = (visual.diff() > 1).nonzero().flatten().tolist()
        ends = [-1, *breaks, len(visual) - 1]
        sides = [round((end - start) ** 0.5) for start, end in pairwise(ends)]
        grids = [(side, side) for side in sides]
    if sum(h * w for h, w in grids) != len(visual):
        raise ValueError(f"alpha and prior need places: {len(visual)} visual tokens are no images of grids {grids}")
    return grids


def _places(grids: list[tuple[int, int]]) -> Tensor:
    """int32 ``[N, 3]``: the image, row and column of each token."""
    return torch.cat([torch.cartesian_prod(*map(torch.arange, (1, h, w))) + torch.tensor([image, 0, 0])
                      for image, (h, w) in enumerate(grids)]).int()  # fmt: skip


def _prior(path: str | os.PathLike[str], grids: list[tuple[int, int]]) -> Tensor:
    from .transformers.prior import Prior, resized

    maps = Prior.load(path).maps
    return torch.cat([resized(maps[0], grid).flatten() for grid in grids])
