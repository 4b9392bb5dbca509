"""What both engines' tests share: settings, videos, and the grid of sizes over which counts are compared."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

VARIANTS = {
    "evs": {},
    "vidcom2": {},
    "mmr": {"LAMBDA": "0.3"},
    "mis": {"THRESHOLD": "0.5", "IMPORTANCE": "norm"},
    "maxmin": {},
    "topk": {"IMPORTANCE": "norm"},
}
WRONG = {  # all others are in test_integrations_video.py
    "by the prompt": ({"METHOD": "d2pruner"}, "FLASHPRUNE_VIDEO_METHOD=d2pruner chooses by the prompt"),
    "rate": ({"METHOD": "evs", "RATE": "1"}, "FLASHPRUNE_VIDEO_RATE=1.0 must be at least 0 and less than 1"),
}


def environment(method: str, **options: str) -> dict[str, str]:
    return {"FLASHPRUNE_VIDEO_" + name: value for name, value in {"METHOD": method, **options}.items()}


def video(
    frames: int, rows: int, columns: int, dim: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames that share much: a still background, noise that differs in strength from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, rows * columns, dim, generator=generator)
    noise = torch.randn(frames, rows * columns, dim, generator=generator)
    strength = torch.rand(frames, rows * columns, 1, generator=generator)
    return (still + strength * noise).flatten(0, 1).to(dtype)


def sizes() -> Iterator[tuple[int, int, float]]:
    """Tokens a frame, frames, rate."""
    tokens = (1, 2, 3, 7, 12, 35, 64, 100, 195, 256, 391, 1001)
    frames = (1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 384)
    return product(tokens, frames, [i / 100 for i in range(100)] + [0.333, 0.999, 1 / 3])


def run(program: str, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that starts as an engine's does, with these settings."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FLASHPRUNE_")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, env=plain | given, capture_output=True, text=True, timeout=300)
