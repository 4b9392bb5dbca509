"""`flashprune calibrate`: D2Pruner's positional prior of a model, measured on a folder of images.

A run that is stopped goes on where it was: sums of all images read so far are kept beside the result. Under torchrun
the images are dealt out to the processes, and their sums added up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor, distributed

import flashprune

from . import console, files
from .console import INTERRUPTED, InputError
from .images import read_image
from .models import batch_inputs, load
from .select import parse_grid

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..integrations.transformers import Prior
    from ..integrations.transformers.calibration import AttentionReader, Sums

DEFAULT_GRID = (24, 24)  # for models whose images have no one grid: LLaVA-1.5's
SAVE_EVERY = 50  # images


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    model: str
    images: Path
    layer: int = 1
    prompt: str = "Describe the image."
    limit: int = 1000
    out: Path = Path("prior.safetensors")
    batch: int = 1
    grid: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    restart: bool = False


def calibrate(options: Options) -> None:
    """Measure, write the prior, and print a summary.

    Raises InputError for whatever is wrong with the arguments, the folder or the model, and for sums kept by a run with
    other settings.
    """
    files.check_output(options.out, "--out", suffix=".safetensors")
    paths, others = find_images(options.images)
    paths = paths[: options.limit]
    with Ranks.of_torchrun(options.device) as ranks:
        run = _Run(options, ranks, paths)
        done = run.read_all()
        total, planes = ranks.sum(done.sums.total), ranks.sum(done.sums.planes)
        images, skipped = (int(ranks.sum(torch.tensor(count))) for count in (done.images, done.skipped))
        if images == 0:
            run.partial.unlink(missing_ok=True)
            why = f": {run.complaint}" if run.complaint else ""
            raise InputError(f"none of the {len(paths)} images in {options.images} can be used{why}")
        if ranks.rank == 0:
            metadata = run.facts | {"images": images, "skipped": skipped + others, "version": flashprune.__version__}
            prior = run.prior(total, planes, metadata)
            files.write_whole(options.out, prior.packed())
            _print_summary(prior, options.out, skipped, others)
        ranks.wait()
        run.partial.unlink(missing_ok=True)


def find_images(folder: Path) -> tuple[list[Path], int]:
    """The images in a folder and the folders in it, sorted, and how many other files there are; hidden ones not.

    An image is what bears the suffix of a format that Pillow reads.

    Raises:
        InputError: no such folder, or no image in it.
    """
    from PIL import Image

    if not folder.is_dir():
        raise InputError(f"--images must be a folder, got {folder}" if folder.exists() else f"there is no {folder}")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found = [path for path in folder.rglob("*") if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    found = sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    images = [path for path in found if path.suffix.lower() in suffixes]
    if not images:
        raise InputError(f"there is no image in {folder}")
    return images, len(found) - len(images)


@dataclass(frozen=True)
class Ranks:
    """The processes of one run: this one's number, how many there are, and its device."""

    rank: int
    world: int
    device: str

    @classmethod
    @contextmanager
    def of_torchrun(cls, device: str) -> Iterator[Ranks]:
        """As torchrun's environment says; one process without it."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            yield cls(0, 1, device)
            return
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=2))  # the first to end waits for the last
        try:
            yield cls(distributed.get_rank(), world, device)
        finally:
            distributed.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all processes, on the CPU."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def agree(self, number: int) -> bool:
        """Whether it is the same in all processes."""
        extremes = torch.tensor([number, -number])
        return bool(torch.equal(self._reduced(extremes, distributed.ReduceOp.MAX), extremes))

    def wait(self) -> None:
        """For all processes."""
        self.sum(torch.zeros(1))

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.world == 1:
            return tensor
        here = tensor.to(self.device, copy=True)
        try:
            distributed.all_reduce(here, how)
        except RuntimeError as error:
            raise InputError(f"process {self.rank} lost the others, whose own lines say why: {error}") from None
        return here.cpu()


@dataclass(frozen=True)
class _Done:
    """What was read so far: files of this process, images among them, those skipped, and their attention."""

    files: int
    images: int
    skipped: int
    sums: Sums

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        from safetensors.torch import save

        counts = {"files": self.files, "images": self.images, "skipped": self.skipped}
        tensors = {"total": self.sums.total, "planes": self.sums.planes}
        files.write_whole(path, save(tensors, {"settings": json.dumps(settings), "counts": json.dumps(counts)}))

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any], files: int, empty: Sums) -> _Done:
        """What `save` wrote, of a run with the same settings over so many files, whose sums began as these."""
        from safetensors import safe_open

        from ..integrations.transformers.calibration import Sums

        try:
            with safe_open(path, framework="pt") as archive:
                found, counts = (dict(json.loads(archive.metadata()[name])) for name in ("settings", "counts"))
                sums = Sums(archive.get_tensor("total"), archive.get_tensor("planes"))
        except Exception as error:  # any file may be there
            raise InputError(f"{path} holds no sums of a stopped run, --restart drops it: {error}") from None
        for name, wanted in settings.items():
            if found.get(name) != wanted:
                differ = "other images" if name == "files" else f"{name} {found.get(name)}, not {wanted}"
                raise InputError(f"{path} is of a run with {differ}: give that again, or --restart to drop it")
        if problem := _count_problem(counts, files) or _sum_problem(sums, empty, counts["images"]):
            raise InputError(f"{path} holds no sums of a stopped run, --restart drops it: {problem}")
        return cls(**counts, sums=sums)


def _count_problem(counts: dict[str, Any], files: int) -> str:
    """Why these cannot be what was counted on the way through so many files; empty if they can."""
    if counts.keys() != {"files", "images", "skipped"}:
        return f"counts of {', '.join(counts) or 'nothing'}, not of files, images and skipped"
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= files:
            return f"{name}={count!r} must be a count of at most {files} files"
    if counts["files"] != counts["images"] + counts["skipped"]:
        return f"{counts['files']} files are not {counts['images']} images and {counts['skipped']} skipped"
    return ""


def _sum_problem(sums: Sums, empty: Sums, images: int) -> str:
    """Why these cannot be the sums of so many images; empty if they can."""
    for name in ("total", "planes"):
        found, like = getattr(sums, name), getattr(empty, name)
        if found.dtype != like.dtype or found.shape != like.shape:
            wanted, got = (f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (like, found))
            return f"{name} must be {wanted}, got {got}"
    if not bool((sums.total.isfinite() & (sums.total >= 0)).all()):
        return "total must be attention: finite and not negative everywhere"
    if bool((sums.planes < 0).any()) or int(sums.planes[0]) < images or (images == 0 and bool(sums.planes.any())):
        return f"planes {sums.planes.tolist()} cannot be those of {images} images"
    return ""


class _Run:
    """One process's part of a calibration."""

    def __init__(self, options: Options, ranks: Ranks, paths: Sequence[Path]) -> None:
        self.options, self.ranks = options, ranks
        self.paths = paths[ranks.rank :: ranks.world]
        self.complaint = ""  # about the first image that was skipped
        grid = None if options.grid is None else parse_grid(options.grid)
        self.model, self.processor = load(options.model, ranks.device, options.dtype)
        from ..integrations.transformers.calibration import Sums
        from ..integrations.transformers.prior import fixed_grid, model_name

        grid = grid or fixed_grid(self.model) or DEFAULT_GRID
        self.facts = {"model": model_name(self.model), "layer": options.layer, "grid": list(grid)}
        self.facts["prompt"] = options.prompt
        sizes = [f"{path.relative_to(options.images).as_posix()}\0{path.stat().st_size}" for path in paths]
        self.settings = self.facts | {
            "weights": str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch": options.batch,
            "files": hashlib.sha256("\n".join(sizes).encode("utf-8", "surrogateescape")).hexdigest(),
        }
        text = json.dumps(self.settings | {"weights": None})  # a host may keep them elsewhere
        if not ranks.agree(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)):
            raise InputError("the processes do not see the same images, or were given other arguments")
        self.partial = _partial(options.out, ranks.rank, ranks.world)
        self.start = _Done(0, 0, 0, Sums.empty(self.model, grid))
        others = _partials_of_other_worlds(options.out, ranks.world)
        if options.restart:
            for path in (self.partial, *others):
                path.unlink(missing_ok=True)
        elif others:
            raise InputError(f"{others[0]} is of a run with another number of processes: --restart drops it")
        elif self.partial.exists():
            self.start = _Done.load(self.partial, self.settings, len(self.paths), self.start.sums)

    def read_all(self) -> _Done:
        """Read every image of this process that is not read yet, and keep the sums whatever happens meanwhile."""
        from ..integrations.transformers.calibration import AttentionReader

        try:
            reader = AttentionReader(self.model, self.options.layer)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        done = kept = self.start
        try:
            with console.progress() as bar, _terminated_like_interrupted():
                label = f"layer {self.options.layer}"
                task = bar.add_task(label, total=len(self.paths), completed=done.files, visible=self.ranks.rank == 0)
                while done.files < len(self.paths):
                    done = self._next(reader, done)
                    bar.update(task, completed=done.files)
                    if done.files - kept.files >= SAVE_EVERY:
                        done.save(self.partial, self.settings)
                        kept = done
        except KeyboardInterrupt:
            if self.ranks.rank == 0:
                typer.echo(f"stopped after {done.files} of {len(self.paths)} images; run it again to go on", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            reader.remove()
            if done.files > kept.files:
                done.save(self.partial, self.settings)
        return done

    def _next(self, reader: AttentionReader, done: _Done) -> _Done:
        """One batch more."""
        paths = self.paths[done.files : done.files + self.options.batch]
        images = [image for path in paths if (image := self._decoded(path)) is not None]
        try:
            inputs = self._inputs(images)
        except Exception:  # each processor raises its own: for an image too narrow, say
            images = [image for image in images if self._fits(image)]
            inputs = self._inputs(images)
        sums = done.sums
        if images:
            try:
                for item, attention in reader.read(inputs):
                    sums = sums.plus(item, attention)
            except Exception as error:  # above all, a GPU that is full
                names = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
                raise InputError(f"the model fails on {names}: {error}") from error
        skipped = len(paths) - len(images)
        return _Done(done.files + len(paths), done.images + len(images), done.skipped + skipped, sums)

    def _decoded(self, path: Path) -> Image | None:
        from PIL import Image

        try:
            return Image.fromarray(read_image(path))
        except InputError as error:
            self.complaint = self.complaint or str(error)
            return None

    def _fits(self, image: Image) -> bool:
        try:
            self._inputs([image])
        except Exception as error:
            self.complaint = self.complaint or str(error)
            return False
        return True

    def _inputs(self, images: Sequence[Image]) -> Any:
        if not images:
            return None
        inputs = batch_inputs(self.processor, [[image] for image in images], self.options.prompt)
        return inputs.to(self.model.device, self.model.dtype)

    def prior(self, total: Tensor, planes: Tensor, metadata: dict[str, Any]) -> Prior:
        """The mean of all processes' sums."""
        from ..integrations.transformers import Prior
        from ..integrations.transformers.calibration import Sums

        return Prior(Sums(total, planes).mean(), metadata)


def _partial(out: Path, rank: int, world: int) -> Path:
    """Where a process keeps its sums: beside the result, in the current folder where that goes into no file."""
    share = "" if world == 1 else f".{rank + 1}-of-{world}"
    out = _beside(out)
    return Path(f"{out}{share}.partial")


def _partials_of_other_worlds(out: Path, world: int) -> list[Path]:
    ours = {_partial(out, rank, world) for rank in range(world)}
    out = _beside(out)
    alike = re.compile(re.escape(out.name) + r"(\.\d+-of-\d+)?\.partial")
    return sorted(path for path in out.parent.iterdir() if alike.fullmatch(path.name) and path not in ours)


def _beside(out: Path) -> Path:
    return out if files.is_regular(out) else Path(Options.out.name)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """What torchrun and schedulers send to end a process is what Ctrl-C sends."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_summary(prior: Prior, out: Path, unusable: int, others: int) -> None:
    facts = prior.metadata
    h, w = facts["grid"]
    table = console.table(f"Prior of {facts['model']}, layer {facts['layer']}, from {facts['images']} images")
    for name in ("plane", "attention", "highest at (row, column)", "lowest at (row, column)"):
        table.add_column(name, justify="right")
    for plane, attention in enumerate(prior.maps):
        cells = [str(plane), f"{float(attention.sum()):.3f}"]
        for place in (int(attention.argmax()), int(attention.argmin())):
            ratio = float(attention.flatten()[place] / attention.mean())
            cells.append(f"{ratio:.2f} x mean at ({place // w}, {place % w})")
        table.add_row(*cells)
    table.caption = f"Grid {h}x{w}, rows and columns from 0. Skipped: unusable images {unusable}, other files {others}."
    screen = files.screen(out)
    screen.print(table)
    screen.print(f"wrote {files.name_of(out)}", soft_wrap=True)
