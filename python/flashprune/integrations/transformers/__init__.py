"""Prune the visual tokens of a Hugging Face Transformers model: one line, reversible.

    handle = prune(model, method="idpruner", keep=0.25, scorer="scorer.safetensors")

For the models of `supported()`, and others by `register_family`.
"""

from . import requirement  # noqa: F401
from .clip import CLIPRelevance
from .families import Family, register_family, supported
from .prior import Prior
from .prune import Handle, prune, unprune
from .report import Selection
from .tokens import Item, VisualTokens

__all__ = [
    "CLIPRelevance",
    "Family",
    "Handle",
    "Item",
    "Prior",
    "Selection",
    "VisualTokens",
    "prune",
    "register_family",
    "supported",
    "unprune",
]
