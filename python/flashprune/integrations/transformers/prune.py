"""`prune`: arguments in, checked; hooks on; a handle out."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from ... import budgets, checks
from ...scorer import VisionSelector
from . import masks
from .clip import CLIPRelevance
from .families import Family, family_of, unwrap
from .prior import read_prior
from .pruner import Pruner
from .relevance import prompt_relevance
from .report import Selection
from .selection import METHODS, SCOPES, Plan, Scorer, make_options, try_out
from .tokens import VisualTokens

_ACTIVE = "_flashprune"  # on a base model: the handle that prunes it
_RULES = ("round", "floor", "ceil")


class Handle:
    """A pruned model's switch: `remove()` it, or use it as a context manager; `last` tells of the last prefill."""

    def __init__(self, pruner: Pruner) -> None:
        self._pruner: Pruner | None = pruner
        self._base = pruner.base
        self._last = pruner.last

    @property
    def last(self) -> Selection | None:
        """What the last prefill with images or videos kept; None before the first.

        In each thread the last of its own; the latest of any in a thread that ran none.
        """
        return self._last.selection

    def remove(self) -> None:
        """Leave the model as it was; a second call does nothing. Caches that it pruned need another pruning."""
        if self._pruner is not None:
            self._pruner.remove()
            self._pruner = None
            delattr(self._base, _ACTIVE)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def prune(
    model: Any,
    method: str = "idpruner",
    keep: int | float = 0.25,
    *,
    scorer: VisionSelector | str | os.PathLike[str] | None = None,
    importance: str | Callable[[VisualTokens], Tensor] | None = None,
    encoder_layer: int | None = None,
    prior: Any = None,
    layer: int = 1,
    scope: str = "request",
    rule: str = "round",
    backend: str = "auto",
    **options: Any,
) -> Handle:
    """Prune the visual tokens of every prefill of a Transformers model, for `forward` and `generate` alike.

    - `model`: of a supported family, as `from_pretrained` loads it, or a pipeline, PEFT model or compiled model around
      one; its weights stay what they are.
    - `method`: `idpruner`, `divprune`, `cdpruner`, `naive_hybrid`, `visionselector` and `topk` prune before the LLM,
      by the embeddings that enter it; `d2pruner` and `fastv` inside it, by the attention of the prompt's last token in
      layer `layer` (0-based): the layers after it see the shorter sequence. `options` are those of the method of that
      name in `flashprune`: `lam`, `alpha`, `threshold`, `pool_ratio`, …
    - `keep`: the share of visual tokens kept (float), or their number (int; a segment with fewer stays whole). `rule`
      rounds a share: `round`, as DivPrune and AngelSlim do, `floor` or `ceil`. `keep=1.0` changes nothing, to the bit.
    - `scope`: what is pruned together, all images and videos of a prompt (`request`, as AngelSlim does) or each
      (`image`).
    - The importance, where the method needs one before the LLM, is one of: `scorer`, a `VisionSelector` or a file with
      its weights, which go to the embeddings' device; `importance="received_attention"`, from layer `encoder_layer` of
      the vision encoder (by default the one that makes the features; in Qwen2.5-VL its last with full attention): what
      CLS pays where there is a CLS, else what each token receives; `importance="text_relevance"`,
      `flashprune.text_relevance` of the visual tokens to all text of their prompt, by the embeddings that enter the
      LLM; or `importance=callable`, which takes `VisualTokens` and returns one score a token. For CDPruner's own
      importance, by CLIP, see `CLIPRelevance`.
    - `prior`: D2Pruner's positional prior, a file from `flashprune calibrate` or `[h, w]` maps; without it the
      attention stays biased, and a warning says so.
    - `backend`: as for every function of `flashprune`.

    Returns a `Handle`. Positions: kept tokens have those that they had, and so has all text, generated too. A batch may
    be padded on the left; outputs of a prefill are as long as the pruned sequence, while `labels` and `logits_to_keep`
    count the columns of the prompts as given. Caches may grow (`DynamicCache`) or be static.

    Raises TypeError or ValueError that name the argument, with the model as it was, for an unsupported model, one that
    is pruned already, an unknown method or option, a `keep` of nothing, an importance that is missing, superfluous or
    does not fit the model's width, a prior of another model or layer.

    Sources: the methods' papers, see `flashprune.methods`.
    """
    model = unwrap(model)
    family = family_of(model)
    base = model.base_model
    if getattr(base, _ACTIVE, None) is not None:
        raise ValueError("model is pruned already: call remove() on its handle, or unprune(model), first")
    checks.choice("method", method, tuple(METHODS))
    checks.choice("scope", scope, SCOPES)
    checks.choice("rule", rule, _RULES)
    checks.choice("backend", backend, ("auto", "cuda", "triton", "cpu", "reference"))
    family.check(base)
    language_model = family.language_model(base)
    plan = Plan(
        method=method,
        keep=_keep(keep),
        rule=rule,
        scope=scope,
        backend=backend,
        options=make_options(method, options),
        importance=_importance(method, scorer, importance, family, base),
        encoder_attention=importance == "received_attention",
        prior=_prior(method, prior, model, layer),
    )
    try_out(plan, 8)
    pruner = Pruner(
        model, family, plan, _layer(plan, layer, language_model), _encoder_layer(family, plan, base, encoder_layer)
    )
    handle = Handle(pruner)
    setattr(base, _ACTIVE, handle)
    return handle


def unprune(model: Any) -> None:
    """Take the pruning off a model, as `remove()` of its handle does; nothing if it is not pruned."""
    handle: Handle | None = vars(unwrap(model).base_model).get(_ACTIVE)
    if handle is not None:
        handle.remove()


def _keep(keep: int | float) -> int | float:
    count = isinstance(keep, numbers.Integral)
    budgets.budget(max(int(keep), 1) if count else 1, keep)  # its type and range
    if keep == 0:
        raise ValueError("keep=0 leaves no visual token: give a share above 0 or a count of at least 1")
    return int(keep) if count else float(keep)


def _importance(
    method: str, scorer: Any, importance: Any, family: Family, base: Any
) -> Callable[[VisualTokens], Tensor] | None:
    given = [name for name, value in (("scorer", scorer), ("importance", importance)) if value is not None]
    needs = METHODS[method].needs
    if needs != "importance":
        if given:
            uses = "the attention inside the LLM" if needs == "attention" else "no importance"
            raise ValueError(f"{given[0]} is not used by method={method!r}, which uses {uses}")
        return None
    if len(given) != 1:
        raise ValueError(
            f"method={method!r} needs one importance: scorer=, a VisionSelector or its weights' file; "
            "importance='received_attention', from the vision encoder; importance='text_relevance', to the prompt; or "
            "importance=callable; got " + (" and ".join(given) or "none")
        )
    if scorer is not None:
        return _scorer(scorer, family.language_model(base))
    if isinstance(importance, CLIPRelevance):
        importance.check(base)
        if type(family).packed is Family.packed:
            name = type(family).__name__
            raise ValueError(f"importance=CLIPRelevance needs {name}.packed(), which this family does not define")
    if callable(importance):
        return importance
    if importance == "text_relevance":
        return prompt_relevance
    if importance != "received_attention":
        raise ValueError(f"importance must be 'received_attention', 'text_relevance' or a callable, got {importance!r}")
    return None


def _scorer(scorer: Any, language_model: Any) -> Callable[[VisualTokens], Tensor]:
    if isinstance(scorer, str | os.PathLike):
        scorer = VisionSelector.from_checkpoint(scorer)
    if not isinstance(scorer, VisionSelector):
        raise TypeError(f"scorer must be a VisionSelector or a file's name, got {type(scorer).__name__}")
    width = language_model.config.hidden_size
    if scorer.in_features != width:
        raise ValueError(f"scorer takes features of width {scorer.in_features}, the model's have {width}")
    return Scorer(scorer)


def _prior(method: str, prior: Any, model: Any, layer: int) -> Any:
    if method != "d2pruner":
        if prior is not None:
            raise ValueError(f"prior belongs to method='d2pruner', got method={method!r}")
        return None
    if prior is None:
        warnings.warn(
            "d2pruner without prior: the positional bias stays in the attention; measure one with flashprune calibrate",
            UserWarning,
            stacklevel=3,
        )
        return None
    found = read_prior(prior)
    found.check(model, layer)
    return found


def _layer(plan: Plan, layer: int, language_model: Any) -> int:
    config = language_model.config
    layer = checks.integer("layer", layer, 0)
    if not plan.inside:
        return layer
    if layer > config.num_hidden_layers - 2:
        raise ValueError(f"layer={layer} leaves no layer after it: the LLM has {config.num_hidden_layers}")
    kinds = masks.kinds(config)
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"method={plan.method!r} needs full attention in every layer of the LLM, it has {kinds}")
    if not all(hasattr(one, "self_attn") for one in language_model.layers):
        name = type(language_model).__name__
        raise ValueError(f"method={plan.method!r} needs self_attn in every layer of the LLM, which {name} lacks")
    return layer


def _encoder_layer(family: Family, plan: Plan, base: Any, layer: int | None) -> int | None:
    """The layer to watch, or None if the encoder's attention is not wanted."""
    if not plan.encoder_attention:
        if layer is not None:
            raise ValueError("encoder_layer belongs to importance='received_attention'")
        return None
    if type(family).scores is Family.scores:
        name = type(family).__name__
        raise ValueError(f"importance='received_attention' needs {name}.scores(), which this family does not define")
    count = len(family.attention_modules(base))
    if count == 0:
        name = type(family).__name__
        raise ValueError(f"importance='received_attention' finds no attention to watch in {name}.tower, {family.tower}")
    layer = family.default_layer(base) if layer is None else checks.integer("encoder_layer", layer, 0)
    if layer >= count:
        raise ValueError(f"encoder_layer={layer} must be below {count}, the layers of the vision encoder")
    return layer
