"""Block sizes, warps and stages of every kernel, by class of device, data type and size; nothing is tuned at run time.

They were chosen so that every one compiles without spills into the shared memory of its class of devices; attention on
AMD's gfx11, which has half the registers, spills. None changes a selection.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

SHARED_MEMORY = {  # bytes a program may have: NVIDIA's 8.0, 9.0 and 10.x; its others; AMD's
    "datacenter": 163 * 1024,
    "consumer": 99 * 1024,
    "amd": 64 * 1024,
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
EVERY, HALF = "fp32 fp16 bf16", "fp16 bf16"
NVIDIA, ANY = "datacenter consumer", "datacenter consumer amd"
LARGE = float("inf")
PRODUCTS = ("cosines", "query", "received")  # kinds whose products may take several of tensor cores
FEW_ROWS = 16  # query rows a key head, up to which one smallest tile holds them all

# Per kind of kernel: names of the columns, then rows. Of the rows for a device and data type the first whose "up to" is
# not exceeded holds.
# fmt: off
TABLE: dict[str, tuple[tuple[Any, ...], ...]] = {
    # The engine of MMR and max-min; up to: tokens. A pair's cosine must not depend on the size: one tile for all.
    "greedy": (
        ("device",     "dtype", "up to", "CLASSES", "CANDIDATES", "ROWS", "COLS", "DEPTH", "num_warps", "num_stages"),
        (ANY,          "fp32",  1024,     256,       64,           32,     32,     16,      8,           2),
        (ANY,          "fp32",  LARGE,    512,       128,          32,     32,     16,      8,           2),
        (ANY,          HALF,    1024,     256,       64,           32,     32,     32,      8,           3),
        (ANY,          HALF,    LARGE,    512,       128,          32,     32,     32,      8,           3),
    ),
    # Every token absorbs the first picks, by the engine's tiles; with eight warps it spills on sm_90.
    "absorb": (
        ("device",     "dtype", "up to", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    4,           3),
    ),
    # A larger tile or block of this one spills.
    "dpp": (
        ("device",     "dtype", "up to", "CLASSES", "CANDIDATES", "COLS", "DEPTH", "num_warps", "num_stages"),
        (ANY,          "fp32",  1024,     256,       32,           16,     16,      8,           2),
        (ANY,          "fp32",  LARGE,    512,       32,           16,     16,      8,           2),
        (ANY,          HALF,    1024,     256,       32,           16,     32,      8,           3),
        (ANY,          HALF,    LARGE,    512,       32,           16,     32,      8,           3),
    ),
    # The first picks of a segment; up to: tokens.
    "seeds": (
        ("device",     "dtype", "up to", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          EVERY,   1024,     256,       8,           3),
        (ANY,          EVERY,   LARGE,    512,       8,           3),
    ),
    # Tiles of cosines; those of 128 rows spill on sm_100. Aligned rows come 16 bytes at a time, others an element at a
    # time, each with an address in registers; the spatial term of a graph takes registers too. One BLOCK_D for each
    # data type, the engine's DEPTH: by that many products a pair's cosine is summed in float32, whatever the tile.
    "cosines": (
        ("device",     "dtype", "up to", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        (ANY,          "fp32",  LARGE,    64,        16,        8,           2),
        (ANY,          HALF,    LARGE,    64,        32,        8,           4),
    ),
    "cosines unaligned": (
        ("device",     "dtype", "up to", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        (ANY,          "fp32",  LARGE,    64,        16,        8,           2),
        (ANY,          HALF,    LARGE,    64,        32,        8,           2),
    ),
    "cosines spatial": (
        ("device",     "dtype", "up to", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        (ANY,          "fp32",  LARGE,    64,        16,        8,           2),
        (ANY,          HALF,    LARGE,    64,        32,        8,           2),
    ),
    "norms": (
        ("device",     "dtype", "up to", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    4,         512,       4,           2),
    ),
    # Independent sets; up to: tokens. WORDS of 32 candidates are a panel's width, a multiple of a tile of cosines.
    "sweep": (
        ("device",     "dtype", "up to", "WORDS", "num_warps", "num_stages"),
        (ANY,          EVERY,   2048,     64,      4,           2),
        (ANY,          EVERY,   LARGE,    128,     4,           2),
    ),
    "prepare": (
        ("device",     "dtype", "up to", "BLOCK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    256,     4,           2),
    ),
    "finish": (
        ("device",     "dtype", "up to", "CHUNK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    1024,    4,           2),
    ),
    "diagonal": (
        ("device",     "dtype", "up to", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    1024,      4,           2),
    ),
    "topk": (
        ("device",     "dtype", "up to", "BLOCK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    1024,    4,           3),
    ),
    "pick order": (
        ("device",     "dtype", "up to", "ROWS", "COLS", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    128,    64,     4,           3),
    ),
    # Query attention with up to FEW_ROWS query rows a key head, with more, and with strides of any number of elements;
    # up to: head dimension. Of float32 three products keep twice the registers.
    "query few": (
        ("device",     "dtype", "up to", "MAX_SPLITS", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          "fp32",  128,      64,           16,        64,        4,           2),
        (ANY,          "fp32",  256,      64,           16,        32,        8,           2),
        (ANY,          HALF,    128,      64,           16,        64,        4,           3),
        (ANY,          HALF,    256,      64,           16,        64,        4,           2),
    ),
    "query many": (
        ("device",     "dtype", "up to", "MAX_SPLITS", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          "fp32",  128,      32,           32,        64,        8,           2),
        (ANY,          "fp32",  256,      32,           16,        32,        8,           2),
        (ANY,          HALF,    128,      32,           64,        64,        4,           3),
        (ANY,          HALF,    256,      32,           64,        64,        8,           2),
    ),
    "query unaligned": (
        ("device",     "dtype", "up to", "MAX_SPLITS", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          "fp32",  128,      32,           16,        64,        4,           2),
        (ANY,          "fp32",  256,      32,           16,        32,        8,           1),
        (ANY,          HALF,    128,      32,           16,        64,        4,           3),
        (ANY,          HALF,    256,      32,           16,        64,        4,           2),
    ),
    # Received attention: BLOCK_M rows stay, blocks of BLOCK_N stream past them; up to: head dimension.
    "received": (
        ("device",     "dtype", "up to", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          "fp32",  127,      32,        32,        8,           2),
        (ANY,          "fp32",  128,      32,        64,        8,           2),
        (ANY,          "fp32",  256,      16,        32,        8,           2),
        ("consumer",   HALF,    127,      64,        64,        4,           2),
        (ANY,          HALF,    128,      128,       64,        8,           3),
        (ANY,          HALF,    256,      128,       64,        8,           2),
    ),
    "received unaligned": (
        ("device",     "dtype", "up to", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (ANY,          EVERY,   128,      16,        32,        4,           2),
        (ANY,          EVERY,   256,      16,        32,        8,           1),
    ),
    "mean": (
        ("device",     "dtype", "up to", "BLOCK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    128,     4,           3),
    ),
    # A video's tokens: whole rows, tiles of channels, and lines of channels or frames.
    "frames": (
        ("device",     "dtype", "up to", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    4,         512,       8,           2),
    ),
    "moments": (
        ("device",     "dtype", "up to", "ROWS", "COLS", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    32,     64,     4,           2),
    ),
    "video": (
        ("device",     "dtype", "up to", "BLOCK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    256,     4,           2),
    ),
    "ranks": (
        ("device",     "dtype", "up to", "ROWS", "COLS", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    64,     64,     4,           2),
    ),
    "minmax": (
        ("device",     "dtype", "up to", "BLOCK", "num_warps", "num_stages"),
        (ANY,          EVERY,   LARGE,    1024,    4,           3),
    ),
}
# fmt: on


@functools.cache
def device_class(device: torch.device) -> str:
    """By the shared memory that a program may have, which is what limits a tile; read once a device."""
    if device.type != "cuda":
        return "consumer"
    if torch.version.hip:
        return "amd"
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return "datacenter" if most >= SHARED_MEMORY["datacenter"] else "consumer"


def precision(dtype: str, device: str) -> str:
    """How `tl.dot` multiplies: of float32 three TF32 products where there are such, about the accuracy of float32."""
    return "tf32x3" if dtype == "fp32" and device in NVIDIA.split() else "ieee"


@functools.cache
def buckets(kind: str, dtype: str, device: str) -> tuple[tuple[float, dict[str, Any]], ...]:
    """The sizes up to which configurations hold, ascending, each with its configuration."""
    columns, *rows = TABLE[kind]
    products = {"PRECISION": precision(dtype, device)} if kind.split()[0] in PRODUCTS else {}
    return tuple(
        (most, dict(zip(columns[3:], values, strict=True)) | products)
        for devices, dtypes, most, *values in rows
        if device in devices.split() and dtype in dtypes.split()
    )


def choose(kind: str, dtype: str, device: str, size: int = 0) -> dict[str, Any]:
    for most, constants in buckets(kind, dtype, device):
        if size <= most:
            return constants
    raise ValueError(f"no configuration of {kind} for size {size}")


def config(kind: str, like: Tensor, size: int = 0) -> dict[str, Any]:
    """The constants of a kernel of this kind, with num_warps and num_stages, for tensors as ``like``."""
    return choose(kind, DTYPES[like.dtype], device_class(like.device), size)
