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
    str | None,
    typer.Option(
        metavar="NAME", help="Else received_attention, the vision encoder's, or text_relevance, to the prompt."
    ),
]
Prior = Annotated[Path | None, typer.Option(metavar="FILE", help="D2Pruner's, from flashprune calibrate.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Of PyTorch: cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as saved), float32, bfloat16 or float16.")]


@app.command(
    help="Show which visual tokens of an image a model keeps, and how it answers then.\n\n"
    "Writes a picture, methods by keeps, and a page with a slider that reads offline: answers with and without "
    "pruning, visual tokens, prefill latency and key-value cache. Each file is written whole or not at all.",
    epilog="Examples:\n\nflashprune view --model llava-hf/llava-1.5-7b-hf --device cuda --image cat.jpg\n\n"
    "flashprune view --model FOLDER --image cat.jpg --method divprune,fastv --keep 0.5,0.1 --prompt 'What is this?'",
)
@console.reports_errors
def view(
    model: Model,
    image: Annotated[Path, typer.Option(metavar="FILE", help="The image of the prompt.")],
    prompt: Prompt = "Describe the image.",
    method: Methods = None,
    keep: Keeps = None,
    scorer: Scorer = None,
    importance: Importance = None,
    prior: Prior = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Timed prefills of each variant.")] = 5,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for both files; made if need be.")] = Path("view"),
) -> None:
    from .view import Options
    from .view import view as run

    run(Options(model, image, prompt, method, keep, scorer, importance, prior, tokens, device, dtype, runs, out))


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
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every run and the machine as JSON; - is stdout.")
    ] = None,
) -> None:
    from .profile import Options
    from .profile import profile as run

    options = Options(
        model, image, random_image, prompt, method, keep, scorer, importance, prior, batch, device, dtype, runs, json
    )
    run(options)


@app.command(
    help="Measure a model's positional prior, for d2pruner: the mean attention that each place of an image gets.\n\n"
    "Every image of the folder is shown with one prompt. A run that is stopped goes on where it was when given again. "
    "Images that cannot be used are skipped and counted. Under torchrun the processes share the images, one GPU each.",
    epilog="Examples:\n\nflashprune calibrate llava-hf/llava-1.5-7b-hf --images coco --device cuda\n\n"
    "torchrun --nproc-per-node 8 -m flashprune.cli calibrate FOLDER --images coco --device cuda",
)
@console.reports_errors
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or owner/name on the Hugging Face hub.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Images, also in folders of it; taken in sorted order.")],
    layer: Annotated[int, typer.Option(metavar="L", min=0, help="Of the LLM, from 0: that of prune().")] = 1,
    prompt: Prompt = "Describe the image.",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="The first N images of the folder.")] = 1000,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The prior, .safetensors; - is stdout.")] = Path(
        "prior.safetensors"
    ),
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 1,
    grid: Annotated[
        str | None,
        typer.Option(metavar="ROWSxCOLS", help="Of the prior; the model's, or 24x24 where its images differ in size."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a stopped run has measured.")] = False,
) -> None:
    from .calibrate import Options
    from .calibrate import calibrate as run

    run(Options(model, images, layer, prompt, limit, out, batch, grid, device, dtype, restart))
