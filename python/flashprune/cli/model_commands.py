"""The commands that run a model: arguments and help texts. The work is in the module named after each command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .commands import app

__all__ = ["app"]

Model = Annotated[str, typer.Option(metavar="MODEL", help="A folder, or owner/name on the Hugging Face hub.")]
Prompt = Annotated[str, typer.Option(metavar="TEXT", help="What is asked about the image.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="divprune, d2pruner, fastv, topk and idpruner when not given."),
]
Keeps = Annotated[
    list[str] | None,
    typer.Option(metavar="R,...", help="Shares (0.25 or 25%) or counts (64) of visual tokens; 0.5, 0.25 and 0.1."),
]
Scorer = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights of a VisionSelector, for methods that need an importance.")
]
Importance = Annotated[
    str | None, typer.Option(metavar="NAME", help="Else that of the vision encoder's attention: received_attention.")
]
Prior = Annotated[Path | None, typer.Option(metavar="FILE", help="D2Pruner's, from flashprune calibrate.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Of PyTorch: cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as saved), float32, bfloat16 or float16.")]


@app.command(
    help="Measure a model's prefill with and without pruning: latency, first token, key-value cache, selection.\n\n"
    "Variants run in turns after a warm-up; the table gives medians with their range.",
    epilog="Examples:\n\nflashprune profile --model llava-hf/llava-1.5-7b-hf --device cuda --image cat.jpg\n\n"
    "flashprune profile --model FOLDER --random-image 1920x1080 --method divprune,fastv --keep 0.25 --json runs.json",
)
@console.reports_errors
def profile(
    model: Model,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The image of the prompt.")] = None,
    random_image: Annotated[
        str | None, typer.Option(metavar="WxH", help="Random pixels instead; 640x480 when neither is given.")
    ] = None,
    prompt: Prompt = "Describe the image.",
    method: Methods = None,
    keep: Keeps = None,
    scorer: Scorer = None,
    importance: Importance = None,
    prior: Prior = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="How often the prompt stands in the batch.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Timed runs of each variant.")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every run and the machine as JSON.")] = None,
) -> None:
    from .profile import Options
    from .profile import profile as run

    options = Options(
        model, image, random_image, prompt, method, keep, scorer, importance, prior, batch, device, dtype, runs, json
    )
    run(options)
