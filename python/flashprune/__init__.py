"""flashprune: fused kernels that choose which visual tokens a multimodal LLM keeps."""

from importlib.metadata import PackageNotFoundError, version

from . import metrics, reference, testing
from .budgets import budget, indices_to_mask
from .dispatch import backends
from .importance import debias, minmax, query_attention, received_attention, resize_prior, soft_topk
from .methods import cdpruner, d2pruner, divprune, fastv, idpruner, naive_hybrid
from .positions import pack_positions, unpack_positions
from .relevance import text_relevance
from .scorer import VisionSelector
from .selectors import dpp_select, maxmin_select, mis_select, mmr_select, topk_select
from .video import evs_select, vidcom2_select
from .workspaces import workspace

try:
    __version__ = version("flashprune")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+uninstalled"

__all__ = [
    "VisionSelector",
    "__version__",
    "backends",
    "budget",
    "cdpruner",
    "d2pruner",
    "debias",
    "divprune",
    "dpp_select",
    "evs_select",
    "fastv",
    "idpruner",
    "indices_to_mask",
    "maxmin_select",
    "metrics",
    "minmax",
    "mis_select",
    "mmr_select",
    "naive_hybrid",
    "pack_positions",
    "query_attention",
    "received_attention",
    "reference",
    "resize_prior",
    "soft_topk",
    "testing",
    "text_relevance",
    "topk_select",
    "unpack_positions",
    "vidcom2_select",
    "workspace",
]
