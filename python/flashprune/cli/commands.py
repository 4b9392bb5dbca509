"""The command line: arguments and help texts. The work is in the module named after each command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import console

app = typer.Typer(
    name="flashprune",
    help="Choose which visual tokens a multimodal LLM keeps.",
    epilog="flashprune COMMAND --help describes a command and shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class MethodName(str, Enum):
    topk = "topk"
    divprune = "divprune"
    cdpruner = "cdpruner"
    idpruner = "idpruner"
    d2pruner = "d2pruner"


class BackendName(str, Enum):
    auto = "auto"
    reference = "reference"
    cpu = "cpu"
    triton = "triton"
    cuda = "cuda"


class DeviceName(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


Backend = Annotated[
    BackendName,
    typer.Option(metavar="BACKEND", help="reference, cpu, triton, cuda, or auto: the fastest that is ready."),
]


def _print_version(asked: bool) -> None:
    if asked:
        import flashprune

        print(f"flashprune {flashprune.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    help="Prune photographs with every method: one picture, one table.\n\n"
    "The photographs come with scikit-image: nothing is downloaded, and no model runs. Patch features and importance "
    "are stand-ins for a model's.",
    epilog="Example:\n\nflashprune demo --out pictures",
)
@console.reports_errors
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the picture; made if need be.")] = Path("demo"),
    backend: Backend = BackendName.auto,
) -> None:
    from .demo import demo as run

    run(out, backend.value)


@app.command(
    help="Prune the tokens of your own image, or of features that a model computed.\n\n"
    "An image gets stand-in features and importance, as in the demo; feed real ones in as .npz or .safetensors. "
    "Output files are written whole or not at all. Wrong input ends with one line on stderr and exit code 2.",
    epilog="Examples:\n\nflashprune select cat.jpg --method d2pruner --out kept.png\n\n"
    "flashprune select tokens.npz --method idpruner --keep 64 --json kept.json",
)
@console.reports_errors
def select(
    image: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE",
            help="An image; or .npz/.safetensors with features [N, D] and, where needed, importance [N] "
            "and grid (h, w) or (t, h, w).",
        ),
    ],
    method: Annotated[
        MethodName, typer.Option(metavar="METHOD", help="topk, divprune, cdpruner, idpruner or d2pruner.")
    ] = MethodName.idpruner,
    keep: Annotated[
        str, typer.Option(metavar="RATIO|COUNT", help="0.25 or 25% keeps a quarter; 64 keeps 64 tokens.")
    ] = "0.25",
    grid: Annotated[
        str | None,
        typer.Option(metavar="ROWSxCOLS", help="Patches of the image; about 576 by its aspect ratio when not given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write a picture, dropped patches faded; - is standard output.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write indices, settings, latency and versions as JSON; - is standard output."
        ),
    ] = None,
    backend: Backend = BackendName.auto,
) -> None:
    from .select import select as run

    run(image, method.value, keep, grid, backend.value, out, json)


@app.command()
@console.reports_errors
def info() -> None:
    """Show versions, which backends run here and why others do not, and how the native code was built."""
    from .info import info as run

    run()


@app.command(
    help="Check every operator, backend and dtype against the definition in float64.\n\n"
    "Each selection is replayed in float64 and its largest regret shown. On features of -1 and +1, where every number "
    "is exact, the picks must be equal. Exit code 1 on any failure; each is named with the command that runs it again.",
    epilog="Examples:\n\nflashprune validate --quick\n\nflashprune validate --backend cpu --only mmr --seed 7",
)
@console.reports_errors
def validate(
    device: Annotated[DeviceName, typer.Option(help="Where the tensors live.")] = DeviceName.cpu,
    backend: Annotated[
        BackendName | None,
        typer.Option(metavar="BACKEND", help="One backend; every one that is ready on the device when not given."),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="OP[:CASE]", help="One operator, or one of its cases.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of all random inputs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller sizes, under 10 seconds.")] = False,
) -> None:
    from .validate import validate as run

    if not run(device.value, None if backend is None else backend.value, only, seed, quick):
        raise typer.Exit(1)


@app.command(
    help="Time selections beside the loops that published methods run today, and beside what the machine can do.\n\n"
    "Without sizes: the standard run, minutes long. Lists have commas between. Every variant is checked on the inputs "
    "that are timed; one that fails is a row of the table, not timed. Exit code 1 when flashprune fails somewhere, or "
    "is slower than --compare allows.",
    epilog="Examples:\n\nflashprune bench --out bench\n\n"
    "flashprune bench --op mmr,maxmin --tokens 576,2880 --dim 4096 --keep 0.1,0.25\n\n"
    "flashprune bench --preset llava-next --out bench\n\n"
    "flashprune bench --op mmr --compare bench/results.json --ratio 1.3",
)
@console.reports_errors
def bench(
    op: Annotated[
        str | None,
        typer.Option(metavar="OPS", help="Of mmr, mis, maxmin, dpp, topk, importance, d2pruner and idpruner; or all."),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where the tensors live.")] = DeviceName.cpu,
    backend: Annotated[
        str | None, typer.Option(metavar="BACKENDS", help="All that are ready when not given; ratios are of the first.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N,...", help="Token counts.")] = None,
    dim: Annotated[int | None, typer.Option(metavar="D", help="Features of a token.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="RATIOS", help="Shares (0.25 or 25%) or counts (64).")] = None,
    batch: Annotated[str | None, typer.Option(metavar="B,...", help="Images at a time.")] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")] = "float32",
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Shapes of llava-1.5, llava-next, internvl2.5, qwen2.5-vl, qwen2.5-vl-video or uniattn-13-images.",
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Race the published loops too.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    seconds: Annotated[float, typer.Option(metavar="S", help="Spent on a variant of a case, about.")] = 1.0,
    limit: Annotated[
        float, typer.Option(metavar="S", help="A variant expected to take longer at more tokens is left out there.")
    ] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for results.json, results.md, latency.png, latency.svg and report.html."
        ),
    ] = None,
    compare: Annotated[Path | None, typer.Option(metavar="JSON", help="An older results.json.")] = None,
    ratio: Annotated[float, typer.Option(metavar="R", help="How much slower than there is allowed.")] = 1.2,
) -> None:
    from .bench import Options
    from .bench import bench as run

    options = Options(
        op, device.value, backend, tokens, dim, keep, batch, dtype, preset, peers, memory, seconds, limit, out, compare,
        ratio,
    )  # fmt: skip
    if not run(options):
        raise typer.Exit(1)
