"""The command line of examples/tiny_models.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import FAMILIES, WIDTHS, save


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a vision-language model with random weights as a folder.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    save(arguments.family, arguments.folder, arguments.width, dtype=getattr(torch, arguments.dtype))
