"""Imported first: says which Transformers is needed before anything fails for want of it."""

from ..versions import require

# `generate` of earlier ones hands repeated prompts, as for beams, images that belong to others.
require("transformers", "5.19", extra="transformers")
