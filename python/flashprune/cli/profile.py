"""`flashprune profile`: what pruning does to a model's prefill, as a table and as JSON with every run."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from . import console, files, variants
from .console import InputError
from .images import read_image
from .models import load, prompt_inputs

if TYPE_CHECKING:
    from ..integrations.transformers.profiling import Profile

FORMAT = "flashprune-profile/1"
_MOST_PIXELS = 1 << 26
_LEGEND = (
    "visual tokens, KV: of the whole batch; KV MB: its keys and values, 10^6 bytes",
    "prefill: the language model on the prompt, with selection, without encoding",
    "first token: generate of one token, from pixels",
    "selection: its time and its share of the prefill; importance that comes from",
    "the encoder's attention is computed while encoding: in first token only",
)


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    model: str
    image: Path | None = None
    random_image: str | None = None
    prompt: str = "Describe the image."
    methods: Sequence[str] | None = None
    keeps: Sequence[str] | None = None
    scorer: Path | None = None
    importance: str | None = None
    prior: Path | None = None
    batch: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    runs: int = 5
    json: Path | None = None


def profile(options: Options) -> None:
    """Measure, print the table, and write the JSON that was asked for.

    Raises InputError for whatever is wrong with the arguments, the files or the model.
    """
    from PIL import Image

    if options.json is not None:
        files.check_output(options.json, "--json", options.image)
    pixels, source = _pixels(options)
    chosen = variants.make(options.methods, options.keeps, options.scorer, options.importance, options.prior)
    model, processor = load(options.model, options.device, options.dtype)
    variants.try_on(model, chosen)
    from ..integrations.transformers.profiling import Variant, measure, repeated

    inputs = prompt_inputs(processor, [Image.fromarray(pixels)], options.prompt).to(model.device, model.dtype)
    with console.progress() as progress:
        bar = progress.add_task("measuring", total=(options.runs + 1) * (1 + len(chosen)))
        batch = repeated(inputs, options.batch)
        profiles = measure(
            model, batch, [Variant(), *chosen], runs=options.runs, progress=lambda: progress.advance(bar)
        )
    found = document(options, model, inputs, source, profiles)
    screen = files.screen(options.json)
    _print(screen, found, profiles)
    if options.json is not None:
        files.write_whole(options.json, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
        screen.print(f"JSON: {files.name_of(options.json)}", soft_wrap=True)


def document(options: Options, model: Any, inputs: Any, source: str, profiles: Sequence[Profile]) -> dict[str, Any]:
    """Everything, raw samples in seconds included."""
    from ..benchmarks import machine

    return {
        "format": FORMAT,
        "machine": {"device": str(model.device), **machine.facts(model.device.type)},
        "model": {
            "name": options.model,
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "input": {
            "image": source,
            "prompt": options.prompt,
            "tokens": inputs["input_ids"].shape[1],
            "batch": options.batch,
        },
        "runs": options.runs,
        "variants": [_entry(one) for one in profiles],
    }


def spread(samples: Sequence[float]) -> str:
    """Milliseconds, median and range, three digits: `12.3 (11.9–14.0)`."""
    low, middle, high = (digits(1e3 * one) for one in (min(samples), statistics.median(samples), max(samples)))
    return f"{middle} ({low}–{high})"


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1000 else f"{value:.0f}"


def _pixels(options: Options) -> tuple[np.ndarray, str]:
    """uint8 `[height, width, 3]`, and what it is."""
    if options.image is not None and options.random_image is not None:
        raise InputError("--image and --random-image are two images: give one")
    if options.image is not None:
        pixels = read_image(options.image)
        return pixels, f"{options.image.name}, {pixels.shape[1]}x{pixels.shape[0]}"
    size = options.random_image or "640x480"
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", size)
    width, height = (int(side) for side in match.groups()) if match else (0, 0)
    if not 0 < width * height <= _MOST_PIXELS:
        raise InputError(
            f"--random-image must be WIDTHxHEIGHT, such as 640x480, of at most {_MOST_PIXELS} pixels; got {size}"
        )
    random = np.random.default_rng(0)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8), f"random pixels, {width}x{height}"


def _entry(one: Profile) -> dict[str, Any]:
    settings = {
        name: value if isinstance(value, str) else "from a file" for name, value in one.variant.settings.items()
    }
    return {
        "method": one.variant.method or None,
        "keep": one.variant.keep,
        **settings,
        "tokens": one.tokens,
        "kept": one.kept,
        "cache_bytes": one.cache_bytes,
        "backend": one.backend,
        "seconds": {name: getattr(one, name) for name in ("prefill", "selection", "forward", "first_token")},
    }


def _print(screen: Any, found: dict[str, Any], profiles: Sequence[Profile]) -> None:
    model, given, machine = found["model"], found["input"], found["machine"]
    for line in (
        f"{model['name']} ({model['type']}, {digits(model['parameters'] / 1e6)} M parameters, {model['dtype']}) on "
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch {machine['torch']}",
        f"{given['image']}; prompts of {given['tokens']} tokens, {given['batch']} at a time; median (min–max) of "
        f"{found['runs']} interleaved runs after a warm-up",
    ):
        screen.print(console.one_line(line))
    screen.print(_table(profiles))
    for line in _LEGEND:
        screen.print(line, style="dim")


def _table(profiles: Sequence[Profile]) -> Table:
    table = console.table("")
    table.title = None
    table.padding, table.show_edge = (0, 1, 0, 0), False  # 80 columns hold it
    table.add_column("keep", no_wrap=True)
    for heading in ("visual\ntokens", "prefill ms", "first token ms", "KV MB", "selection\nms"):
        table.add_column(heading, justify="right")
    method = ""
    for one in profiles:
        if one.variant.method != method:
            method = one.variant.method
            table.add_section()
            table.add_row(method, style="bold")
        table.add_row(
            f" {variants.keep_label(one.variant.keep)}" if method else "not pruned",
            str(one.kept),
            spread(one.prefill),
            spread(one.first_token),
            digits(one.cache_bytes / 1e6),
            _selection(one),
        )
    return table


def _selection(one: Profile) -> str:
    if not one.variant.method:
        return ""
    share = statistics.median(part / whole for part, whole in zip(one.selection, one.prefill, strict=True))
    return f"{digits(1e3 * statistics.median(one.selection))} ({share:.0%})"
