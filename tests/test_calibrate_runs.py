"""`flashprune calibrate`: runs that stop and go on, several processes, and sums that do not belong to a run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.19")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.calibration import assert_same, fails, photo, run, succeeds

from flashprune.integrations.transformers import Prior
from flashprune.integrations.transformers.calibration import AttentionReader

pytestmark = pytest.mark.usefixtures("one_process")


def stopped_after(monkeypatch: pytest.MonkeyPatch, images: int, error: BaseException) -> None:
    """The model is interrupted when it is given one image more."""
    read, count = AttentionReader.read, iter(range(images))

    def interrupted(self: AttentionReader, inputs: Any) -> Any:
        if next(count, None) is None:
            raise error
        return read(self, inputs)

    monkeypatch.setattr(AttentionReader, "read", interrupted)


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read, calls = AttentionReader.read, [0]

    def counted(self: AttentionReader, inputs: Any) -> Any:
        calls[0] += 1
        return read(self, inputs)

    monkeypatch.setattr(AttentionReader, "read", counted)
    return calls


def test_interrupted_run_goes_on(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "prior.safetensors"
    arguments = (folders["llava_next"], "--images", photos, "--out")
    (photos / "0cut.png").write_bytes(b"no image")
    succeeds(*arguments, whole)
    with monkeypatch.context() as patched:
        stopped_after(patched, 4, KeyboardInterrupt())
        result = run(*arguments, out)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["stopped after 5 of 8 images; run it again to go on"]
    assert not out.exists() and Path(f"{out}.partial").exists()
    calls = counting_reads(monkeypatch)
    succeeds(*arguments, out)
    assert calls == [3]
    assert_same(out, whole)
    assert not Path(f"{out}.partial").exists()


def test_killed_run_goes_on_from_the_last_sums_kept(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "prior.safetensors"
    arguments = (folders["llava"], "--images", photos, "--out")
    succeeds(*arguments, whole)
    script = f"""
import os, sys
from flashprune.cli import calibrate, main
from flashprune.integrations.transformers.calibration import AttentionReader
read, left = AttentionReader.read, iter(range(5))
AttentionReader.read = lambda self, inputs: os._exit(9) if next(left, None) is None else read(self, inputs)
calibrate.SAVE_EVERY = 2
sys.argv = ["flashprune", "calibrate", {str(folders["llava"])!r}, "--images", {str(photos)!r}, "--out", {str(out)!r}]
main()
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    calls = counting_reads(monkeypatch)
    succeeds(*arguments, out)
    assert calls == [3]  # of 7: 4 were kept, the fifth was lost
    assert_same(out, whole)


def test_termination_keeps_the_sums(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    script = f"""
import os, signal, sys
from flashprune.cli import main
from flashprune.integrations.transformers.calibration import AttentionReader
read, left = AttentionReader.read, iter(range(2))
def terminated(self, inputs):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGTERM)
    return read(self, inputs)
AttentionReader.read = terminated
sys.argv = ["flashprune", "calibrate", {str(folders["llava"])!r}, "--images", {str(photos)!r}, "--out", {str(out)!r}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert "stopped after 2 of 7 images" in ended.stderr
    with safe_open(f"{out}.partial", framework="pt") as archive:
        assert json.loads(archive.metadata()["counts"]) == {"files": 2, "images": 2, "skipped": 0}


def test_failure_of_the_model_names_the_image_and_keeps_the_sums(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "prior.safetensors"
    stopped_after(monkeypatch, 3, torch.OutOfMemoryError("the GPU is full"))
    line = fails(folders["llava"], "--images", photos, "--out", out)
    assert line.endswith(f"the model fails on {photos / '4.png'}: the GPU is full")
    assert Path(f"{out}.partial").exists()


@pytest.fixture
def stopped(folders: dict[str, Path], photos: Path, tmp_path: Path) -> Iterator[Path]:
    """The --out of a run of LLaVA that was stopped."""
    out = tmp_path / "prior.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        stopped_after(patched, 2, KeyboardInterrupt())
        assert run(folders["llava"], "--images", photos, "--out", out).exit_code == 130
    yield out


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (["--layer", 2], "layer 1, not 2"),
        (["--prompt", "Hello"], "prompt Describe the image., not Hello"),
        (["--grid", "4x4"], "grid [8, 8], not [4, 4]"),
        (["--batch", 2], "batch 1, not 2"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
        (["--limit", 6], "other images"),
    ],
)
def test_sums_of_other_settings_are_refused(
    folders: dict[str, Path], photos: Path, stopped: Path, changed: list[Any], complaint: str
) -> None:
    arguments = (folders["llava"], "--images", photos, "--out", stopped, *changed)
    line = fails(*arguments)
    assert f"{stopped}.partial is of a run with {complaint}" in line and "--restart" in line
    assert not stopped.exists()
    succeeds(*arguments, "--restart")
    assert stopped.exists() and not Path(f"{stopped}.partial").exists()


def test_sums_of_another_model_or_folder_are_refused(folders: dict[str, Path], photos: Path, stopped: Path) -> None:
    line = fails(folders["llava_next"], "--images", photos, "--out", stopped)
    assert "model llava-4x64, not llava_next-4x64" in line
    photo(0, (50, 60)).save(photos / "new.png")
    assert "other images" in fails(folders["llava"], "--images", photos, "--out", stopped)


def test_damaged_sums_are_refused(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    Path(f"{out}.partial").write_bytes(b"rubbish")
    assert "holds no sums of a stopped run" in fails(folders["llava"], "--images", photos, "--out", out)


def rewritten(partial: Path, counts: dict[str, Any] | list[Any] | None, **tensors: torch.Tensor) -> None:
    """Sums of a stopped run of which a part is another."""
    with safe_open(partial, framework="pt") as archive:
        metadata = archive.metadata()
        held = {name: archive.get_tensor(name) for name in ("total", "planes")}
    if counts is not None:
        metadata["counts"] = json.dumps(counts)
    save_file(held | tensors, partial, metadata)


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        ({"files": -3, "images": -3, "skipped": 0}, "files=-3 must be a count of at most 7 files"),
        ({"files": 10**6, "images": 10**6, "skipped": 0}, "files=1000000 must be a count of at most 7 files"),
        ({"files": 2, "images": True, "skipped": 1}, "images=True must be a count"),
        ({"files": 2.0, "images": 2, "skipped": 0}, "files=2.0 must be a count"),
        ({"files": "2", "images": 2, "skipped": 0}, "files='2' must be a count"),
        ({"files": 2, "images": 2, "skipped": 3}, "2 files are not 2 images and 3 skipped"),
        ({"files": 3, "images": 3, "skipped": 0}, "planes [2, 0] cannot be those of 3 images"),
        ({"files": 2, "images": 0, "skipped": 2}, "planes [2, 0] cannot be those of 0 images"),
        ({"files": 2, "images": 2}, "counts of files, images, not of files, images and skipped"),
        ({"files": 2, "images": 2, "skipped": 0, "sums": 1}, "not of files, images and skipped"),
        ([1, 2], "--restart drops it"),
    ],
)
def test_counts_that_cannot_be_are_refused(
    folders: dict[str, Path], photos: Path, stopped: Path, counts: Any, complaint: str
) -> None:
    rewritten(Path(f"{stopped}.partial"), counts)
    line = fails(folders["llava"], "--images", photos, "--out", stopped)
    assert f"{stopped}.partial holds no sums of a stopped run, --restart drops it: " in line and complaint in line
    assert not stopped.exists()


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (
            {"total": torch.zeros(2, 4, 4, dtype=torch.float64)},
            "total must be float64 [2, 8, 8], got float64 [2, 4, 4]",
        ),
        ({"total": torch.zeros(2, 8, 8)}, "total must be float64 [2, 8, 8], got float32 [2, 8, 8]"),
        ({"planes": torch.tensor([2])}, "planes must be int64 [2], got int64 [1]"),
        ({"total": torch.full((2, 8, 8), torch.nan, dtype=torch.float64)}, "finite and not negative everywhere"),
        ({"total": torch.full((2, 8, 8), -1.0, dtype=torch.float64)}, "finite and not negative everywhere"),
        ({"planes": torch.tensor([2, -1])}, "planes [2, -1] cannot be those of 2 images"),
    ],
)
def test_sums_of_another_kind_are_refused(
    folders: dict[str, Path], photos: Path, stopped: Path, tensors: dict[str, torch.Tensor], complaint: str
) -> None:
    rewritten(Path(f"{stopped}.partial"), None, **tensors)
    line = fails(folders["llava"], "--images", photos, "--out", stopped)
    assert complaint in line and "--restart" in line
    assert not stopped.exists()


def test_a_prior_to_standard_output(
    folders: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of a run that stops lie in the current folder then."""
    arguments, file = (folders["llava"], "--images", photos, "--out"), tmp_path / "prior.safetensors"
    succeeds(*arguments, file)
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patched:
        stopped_after(patched, 2, KeyboardInterrupt())
        assert run(*arguments, "-").exit_code == 130
    assert [path.name for path in folder.iterdir()] == ["prior.safetensors.partial"]
    result = run(*arguments, "-")
    assert result.exit_code == 0 and "wrote standard output" in result.stderr
    assert not list(folder.iterdir())
    (tmp_path / "piped.safetensors").write_bytes(result.stdout_bytes)
    assert_same(tmp_path / "piped.safetensors", file)


def test_a_prior_keeps_the_mode_of_its_file(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.safetensors"
    out.touch()
    out.chmod(0o600)
    succeeds(folders["llava"], "--images", photos, "--out", out, "--limit", 1)
    assert out.stat().st_mode & 0o777 == 0o600 and Prior.load(out).metadata["images"] == 1


def test_sums_of_another_number_of_processes_are_refused(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "prior.safetensors", tmp_path / "prior.safetensors.2-of-4.partial"
    other.touch()
    arguments = (folders["llava"], "--images", photos, "--out", out)
    assert f"{other} is of a run with another number of processes" in fails(*arguments)
    succeeds(*arguments, "--restart")
    assert out.exists() and not other.exists()


def test_two_processes_measure_what_one_does(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    (photos / "0cut.png").write_bytes(b"no image")
    arguments = [str(folders["llava_next"]), "--images", str(photos), "--out"]
    succeeds(*arguments, one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [*launch, "-m", "flashprune.cli", "calibrate", *arguments, str(two)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count(f"wrote {two}") == 1
    assert Prior.load(two).metadata == Prior.load(one).metadata
    # Float64 sums in another order, rounded to float32 once.
    torch.testing.assert_close(Prior.load(two).maps, Prior.load(one).maps, rtol=2**-23, atol=0)
    assert not list(tmp_path.glob("*.partial"))
