"""The ways to run a model that `view` and `profile` compare: arguments checked, files read, then tried on the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scorer import VisionSelector
from .console import InputError

if TYPE_CHECKING:
    from ..integrations.transformers.profiling import Variant

METHODS = ("divprune", "d2pruner", "fastv", "topk", "idpruner")  # where none is named
KEEPS = ("0.5", "0.25", "0.1")
ENCODER = "received_attention"
IMPORTANCES = (ENCODER, "text_relevance")  # those that need no file


def make(
    methods: Sequence[str] | None,
    keeps: Sequence[str] | None,
    scorer: Path | None,
    importance: str | None,
    prior: Path | None,
) -> list[Variant]:
    """Every method at every keep, methods outermost. Lists may also have commas between.

    Methods that need an importance before the LLM get the scorer's, else the named one, else the encoder's attention.

    Raises:
        InputError: an unknown method, a keep of nothing, a file that cannot be read or is of no use, no Transformers.
    """
    try:
        from ..integrations.transformers.prior import read_prior
        from ..integrations.transformers.profiling import Variant
        from ..integrations.transformers.selection import METHODS as KNOWN
    except ModuleNotFoundError as error:
        raise InputError(str(error)) from None
    known = [name for name in KNOWN if name != "naive_hybrid"]  # has a setting that only its user can choose
    names = _split(methods or METHODS)
    for name in names:
        if name not in known:
            raise InputError(f"--method must be of {', '.join(known)}; got {name}")
    if importance not in (None, *IMPORTANCES):
        raise InputError(f"--importance must be {' or '.join(IMPORTANCES)}, got {importance}")
    if scorer is not None and importance is not None:
        raise InputError("--scorer and --importance are two importances: give one")
    scored = [name for name in names if KNOWN[name].needs == "importance"]
    if not scored and (scorer is not None or importance is not None):
        option = "--scorer" if scorer is not None else "--importance"
        raise InputError(f"{option} is not used by {', '.join(names)}")
    if prior is not None and "d2pruner" not in names:
        raise InputError("--prior belongs to d2pruner, which is not among the methods")
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    try:
        if scorer is not None:
            shared: dict[str, Any] = {"scorer": VisionSelector.from_checkpoint(scorer)}
        else:
            shared = {"importance": importance or ENCODER}
        settings |= {name: shared for name in scored}
        if prior is not None:
            settings["d2pruner"] = {"prior": read_prior(prior)}
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    shares = list(dict.fromkeys(read_keep(keep) for keep in _split(keeps or KEEPS)))
    return [Variant(name, keep, settings[name]) for name in names for keep in shares]


def read_keep(text: str) -> int | float:
    """`prune`'s keep: a whole number is a count, anything with a point, an exponent or a % is a share.

    Raises InputError when it is neither, or out of range.
    """
    if re.fullmatch(r"\+?\d+", text) and int(text) >= 1:
        return int(text)
    percent = text.endswith("%")
    try:
        share = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(f"--keep must be a share above 0 and up to 1.0, or a count of 1 or more; got {text}")
    return share


def keep_label(keep: int | float) -> str:
    """As a reader wants it: `25 %` or `64 tokens`."""
    return f"{keep} token{'s' * (keep != 1)}" if isinstance(keep, int) else f"{100 * keep:g} %"


def try_on(model: Any, variants: Iterable[Variant]) -> None:
    """Each variant put on the model and taken off, the scorer to where the model is.

    Raises InputError for what `prune` refuses: a scorer of another width, a prior of another model.
    """
    for variant in variants:
        if "scorer" in variant.settings:
            variant.settings["scorer"].to(model.device)
        try:
            with variant.applied(model):
                pass
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None


def _split(texts: Iterable[str]) -> list[str]:
    """The parts between commas of all texts, each once."""
    return list(dict.fromkeys(part.strip() for text in texts for part in text.split(",")))
