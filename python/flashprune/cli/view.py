"""`flashprune view`: which visual tokens of an image a model keeps, and how it answers then: a picture and a page."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import console, draw, files, page, runs, variants
from .console import InputError
from .images import read_image
from .models import load, prompt_inputs
from .planes import Panel, panels
from .profile import digits, spread

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..integrations.transformers.profiling import Profile, Variant

PICTURE = "flashprune-view.png"
PAGE = "flashprune-view.html"
_PANEL_PIXELS = 320  # the longer side of a panel of the picture
_PAGE_PIXELS = 768  # of an image in the page
_LABELS = {  # beside those of `runs.METHODS`
    "fastv": ("FastV", "attention inside\nthe LLM"),
    "visionselector": ("VisionSelector", "learned scorer\nalone"),
}


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    model: str
    image: Path
    prompt: str = "Describe the image."
    methods: Sequence[str] | None = None
    keeps: Sequence[str] | None = None
    scorer: Path | None = None
    importance: str | None = None
    prior: Path | None = None
    tokens: int = 32
    device: str = "cpu"
    dtype: str = "auto"
    runs: int = 5
    out: Path = Path("view")


class Answer(NamedTuple):
    """What the model generated, greedily: int64 `[n]` on the CPU, and as text."""

    ids: Tensor
    text: str

    def equal(self, other: Answer) -> int:
        """How many tokens there are before the first that differs."""
        shorter = min(len(self.ids), len(other.ids))
        differing = (self.ids[:shorter] != other.ids[:shorter]).nonzero()
        return int(differing[0]) if len(differing) else shorter


class Result(NamedTuple):
    """One variant: `kept` holds the raster indices of the tokens kept in each panel, None where that is all."""

    profile: Profile
    answer: Answer
    kept: list[Tensor] | None


def view(options: Options) -> None:
    """Run the model with and without pruning, print a table, and write the picture and the page.

    Raises InputError for whatever is wrong with the arguments, the files or the model; nothing is written then.
    """
    from PIL import Image

    _check_folder(options.out, options.image)
    image = Image.fromarray(read_image(options.image))
    chosen = variants.make(options.methods, options.keeps, options.scorer, options.importance, options.prior)
    model, processor = load(options.model, options.device, options.dtype)
    variants.try_on(model, chosen)
    seen, results = run(model, processor, image, chosen, options)
    outputs = {
        PICTURE: files.png_bytes(_picture(options, image, seen[0], results)),
        PAGE: page.html(_document(options, model, image, seen, results)).encode(),
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {options.out}: {error.strerror}") from None
    for name, data in outputs.items():
        files.write_whole(options.out / name, data)
    _print(options, results)


def run(
    model: Any, processor: Any, image: Image, chosen: Sequence[Variant], options: Options
) -> tuple[list[Panel], list[Result]]:
    """The panels of the image, and the results of the model without pruning and of every variant, in this order."""
    from ..integrations.transformers import Item
    from ..integrations.transformers.profiling import Variant, measure, selection_of

    inputs = prompt_inputs(processor, [image], options.prompt).to(model.device, model.dtype)
    item = functools.reduce(Item.joined, selection_of(model, inputs, Variant("divprune", 1.0)).items[0])  # of tiles
    seen = panels(model.config.model_type, processor, image.size, item)
    everything = [Variant(), *chosen]
    results = []
    with console.progress() as progress:
        bar = progress.add_task("running the model", total=(options.runs + 2) * len(everything))
        profiles = measure(
            model, inputs, everything, runs=options.runs, first_token=False, progress=lambda: progress.advance(bar)
        )
        for profile in profiles:
            with profile.variant.applied(model) as handle:
                ids = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
            ids = ids[0, inputs["input_ids"].shape[1] :].cpu()
            answer = Answer(ids, processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
            last = None if handle is None else handle.last
            kept = None if last is None else [panel.kept(last.kept[0]) for panel in seen]
            results.append(Result(profile, answer, kept))
            progress.advance(bar)
    return seen, results


def agreement(answer: Answer, whole: Answer) -> str:
    """How far an answer is that of the model without pruning."""
    if torch.equal(answer.ids, whole.ids):
        return f"the same {len(whole.ids)} tokens"
    equal = answer.equal(whole)
    return f"differs from token {equal + 1} on"


def _check_folder(out: Path, image: Path) -> None:
    """Refuse a folder that cannot be made or written, before any work is done."""
    files.check_folder_name(out, "--out")
    if out.is_dir():
        for name in (PICTURE, PAGE):
            files.check_output(out / name, "--out", image)
        return
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out: cannot make the folder {out}: {parent} is no folder that can be written")


def _label(method: str) -> tuple[str, str]:
    known = runs.METHODS.get(method)
    return _LABELS[method] if known is None else (known.label, known.note)


def _picture(options: Options, image: Image, panel: Panel, results: Sequence[Result]) -> np.ndarray:
    """A row a method, a column a keep; of several panels the finest."""
    whole, *pruned = results
    pixels = np.asarray(panel.picture(image, _PANEL_PIXELS))
    cell = tuple(max(2, round(side / count)) for side, count in zip(pixels.shape, panel.grid, strict=False))
    size = (cell[0], cell[1])
    every = torch.arange(panel.grid[0] * panel.grid[1])
    original = draw.dim_dropped(pixels, panel.grid, every, size)
    methods = dict.fromkeys(one.profile.variant.method for one in pruned)
    columns = [draw.Column("all tokens", [draw.Panel(original, "not pruned") for _ in methods])]
    for keep in dict.fromkeys(one.profile.variant.keep for one in pruned):
        chosen = [one for one in pruned if one.profile.variant.keep == keep]
        drawn = []
        for one in chosen:
            assert one.kept is not None
            kept = draw.dim_dropped(pixels, panel.grid, one.kept[0], size)
            drawn.append(draw.Panel(kept, f"answer {_short_agreement(one.answer, whole.answer)}"))
        profile = chosen[0].profile
        columns.append(draw.Column(f"{variants.keep_label(keep)}: {profile.kept} of {profile.tokens}", drawn))
    rows = [draw.Row(*_label(method)) for method in methods]
    note = f"{panel.name}, {panel.grid[0]} x {panel.grid[1]} tokens"
    group = draw.Group(options.image.name, note, columns)
    title = f"Visual tokens of {Path(options.model).name}: kept in colour, dropped in grey."
    return draw.sheet("What each method keeps", title, rows, [group])


def _short_agreement(answer: Answer, whole: Answer) -> str:
    return "the same" if torch.equal(answer.ids, whole.ids) else f"differs from token {answer.equal(whole) + 1}"


def _document(
    options: Options, model: Any, image: Image, seen: Sequence[Panel], results: Sequence[Result]
) -> dict[str, Any]:
    """What the page shows; see `page.html`."""
    from ..benchmarks import machine

    facts = machine.facts(model.device.type)
    whole = results[0]
    return {
        "model": Path(options.model).name if Path(options.model).is_dir() else options.model,
        "image": f"{options.image.name}, {image.width} x {image.height} pixels",
        "prompt": options.prompt,
        "measured": f"Prefill: median of {options.runs} interleaved runs after a warm-up, {model.dtype} on "
        f"{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}, flashprune {facts['flashprune']}, {facts['date']}. "
        "It is the language model on the whole prompt, with the selection and without image encoding.",
        "panels": [
            {
                "name": panel.name,
                "rows": panel.grid[0],
                "columns": panel.grid[1],
                "source": _jpeg(panel.picture(image, _PAGE_PIXELS)),
            }
            for panel in seen
        ],
        "whole": _entry(whole, whole, seen),
        "pruned": [_entry(one, whole, seen) for one in results[1:]],
    }


def _entry(one: Result, whole: Result, seen: Sequence[Panel]) -> dict[str, Any]:
    variant = one.profile.variant
    kept = one.kept or [torch.arange(panel.grid[0] * panel.grid[1]) for panel in seen]
    return {
        "method": variant.method,
        "label": _label(variant.method)[0] if variant.method else "not pruned",
        "keep": str(variant.keep),
        "keep_label": variants.keep_label(variant.keep),
        "tokens": one.profile.tokens,
        "kept": one.profile.kept,
        "prefill": spread(one.profile.prefill),
        "cache": f"{digits(one.profile.cache_bytes / 1e6)} MB",
        "answer": one.answer.text,
        "shared": _shared(one.answer.text, whole.answer.text),
        "agreement": agreement(one.answer, whole.answer),
        "masks": [_bits(cells, panel) for cells, panel in zip(kept, seen, strict=True)],
    }


def _shared(text: str, other: str) -> str:
    """What both begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    return "".join(character for character, _ in same)


def _bits(cells: Tensor, panel: Panel) -> str:
    """One bit a token of the panel, the first the highest of the first byte, as base64."""
    mask = np.zeros(panel.grid[0] * panel.grid[1], dtype=bool)
    mask[cells.numpy()] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def _jpeg(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _print(options: Options, results: Sequence[Result]) -> None:
    screen, whole = console.stdout(), results[0]
    drawn = console.table("")
    drawn.title = None
    drawn.add_column("keep", no_wrap=True)
    for heading in ("visual tokens", "prefill ms", "KV MB"):
        drawn.add_column(heading, justify="right")
    drawn.add_column("answer")
    method = ""
    for one in results:
        variant = one.profile.variant
        if variant.method != method:
            method = variant.method
            drawn.add_section()
            drawn.add_row(method, style="bold")
        drawn.add_row(
            f" {variants.keep_label(variant.keep)}" if method else "not pruned",
            str(one.profile.kept),
            digits(1e3 * statistics.median(one.profile.prefill)),
            digits(one.profile.cache_bytes / 1e6),
            agreement(one.answer, whole.answer) if method else f"{len(whole.answer.ids)} tokens",
        )
    screen.print(drawn)
    screen.print(f"Picture: {options.out / PICTURE}", soft_wrap=True)
    screen.print(f"Page:    {options.out / PAGE}", soft_wrap=True)
