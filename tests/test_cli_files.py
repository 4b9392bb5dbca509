"""The files of the command line: images of any depth, feature files larger than memory, and where results go."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flashprune import outputs
from flashprune.cli import app, features, images
from flashprune.cli.console import InputError

REFERENCE = ("--backend", "reference")
COMMAND = (sys.executable, "-m", "flashprune.cli")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flashprune: error: "), result.stderr
    return lines[0]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    rows, cols = np.mgrid[0:48, 0:64]
    Image.fromarray(np.stack([rows * 5, cols * 3, (rows * cols) % 256], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path, random = tmp_path / "tokens.npz", np.random.default_rng(0)
    np.savez(path, features=random.standard_normal((48, 16), np.float32), importance=random.random(48, np.float32))
    return path


class TestImages:
    GRADIENT = np.linspace(0, 1, 256)[None].repeat(4, 0)  # [4, 256]
    GREY = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)

    def assert_gradient(self, path: Path) -> None:
        found = images.read_image(path)
        assert found.shape == (4, 256, 3) and found.dtype == np.uint8
        assert all(np.array_equal(found[..., channel], self.GREY) for channel in range(3))

    @pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
    def test_16_bits_are_scaled(self, tmp_path: Path, name: str) -> None:
        Image.fromarray((self.GRADIENT * 65535).round().astype(np.uint16)).save(tmp_path / name)
        self.assert_gradient(tmp_path / name)

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_32_bits_are_scaled(self, tmp_path: Path, dtype: type) -> None:
        highest = 65535 if dtype is np.int32 else 1
        Image.fromarray((self.GRADIENT * highest).astype(dtype)).save(tmp_path / "deep.tif")
        self.assert_gradient(tmp_path / "deep.tif")

    def test_big_endian(self, tmp_path: Path) -> None:
        header = b"MM\0*\0\0\0\x08\0\x09" + b"".join(
            tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + value
            for tag, kind, value in (
                (256, 3, b"\x01\0\0\0"), (257, 3, b"\0\x04\0\0"), (258, 3, b"\0\x10\0\0"), (259, 3, b"\0\x01\0\0"),
                (262, 3, b"\0\x01\0\0"), (273, 4, (122).to_bytes(4, "big")), (277, 3, b"\0\x01\0\0"),
                (278, 3, b"\0\x04\0\0"), (279, 4, (2048).to_bytes(4, "big")),
            )
        ) + bytes(4)  # fmt: skip
        pixels = (self.GRADIENT * 65535).round().astype(">u2").tobytes()
        (tmp_path / "deep.tif").write_bytes(header + pixels)
        with Image.open(tmp_path / "deep.tif") as image:
            assert image.mode == "I;16B"
        self.assert_gradient(tmp_path / "deep.tif")

    @pytest.mark.parametrize(
        ("values", "complaint"),
        [
            (np.array([[0, 70000]], np.int32), "values of mode I must lie in 0..65535, got 0 to 70000"),
            (np.array([[-1, 5]], np.int32), "got -1 to 5"),
            (np.array([[0, 255]], np.float32), "values of mode F must lie in 0..1, got 0 to 255"),
            (np.array([[0.5, np.nan]], np.float32), "got 0.5 to 0.5 and NaN"),
            (np.array([[np.nan, np.nan]], np.float32), "got none and NaN"),
        ],
    )
    def test_values_of_unknown_range_are_refused(self, tmp_path: Path, values: np.ndarray, complaint: str) -> None:
        Image.fromarray(values).save(tmp_path / "deep.tif")
        assert complaint in fails("select", tmp_path / "deep.tif")

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
    def test_transparent_pixels_are_white(self, tmp_path: Path, mode: str) -> None:
        """Under them lies red, or black, which an encoder drew there and nobody sees."""
        path = tmp_path / "clear.png"
        if mode in ("RGBA", "LA"):
            clear = Image.new(mode, (4, 2), (200, 0, 0, 0) if mode == "RGBA" else (0, 0))
            clear.putpixel((0, 0), (0, 0, 255, 255) if mode == "RGBA" else (90, 255))
            clear.save(path)
        else:
            clear = Image.new(mode, (4, 2), (200, 0, 0) if mode == "RGB" else 0)
            clear.putpixel((0, 0), (0, 0, 255) if mode == "RGB" else 90)
            clear.save(path, transparency=(200, 0, 0) if mode == "RGB" else 0)
        found = images.read_image(path).reshape(8, 3)
        assert (found[1:] == 255).all() and (found[0] != 255).any()

    def test_half_transparent_pixels_are_mixed_with_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.png")
        assert (images.read_image(tmp_path / "half.png") == 127).all()

    def test_transparent_value_of_16_bits(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[1000, 30000]], np.uint16)).save(tmp_path / "deep.png", transparency=1000)
        assert images.read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [255, 117]

    @pytest.mark.parametrize("module", ["select", "view", "profile", "calibrate"])
    def test_every_command_has_this_reader(self, module: str) -> None:
        assert getattr(pytest.importorskip(f"flashprune.cli.{module}"), "read_image") is images.read_image  # noqa: B009


class TestFeatures:
    def test_a_file_of_zeros_larger_than_memory_is_refused_unread(self, tmp_path: Path) -> None:
        """A terabyte that a few kilobytes hold: reading it would end in the kernel's killing the process."""
        path = tmp_path / "zeros.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("features.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 18)}
            )
            member.write(bytes(1 << 20))
        began = time.monotonic()
        line = fails("select", path, "--method", "divprune")
        assert "features float32 [1048576, 262144] take 1099.5 GB, and " in line and "GB are free" in line
        assert time.monotonic() - began < 20

    def test_memory_counts_the_conversion(self, tmp_path: Path, monkeypatch) -> None:
        np.savez(tmp_path / "t.npz", features=np.zeros((1000, 100)))
        monkeypatch.setattr("flashprune.benchmarks.machine.free_bytes", lambda: 1_100_000)
        with pytest.raises(InputError, match=r"take 0\.0 GB"):
            features.read_features(tmp_path / "t.npz")
        monkeypatch.setattr("flashprune.benchmarks.machine.free_bytes", lambda: 1_200_000)
        assert features.read_features(tmp_path / "t.npz").features.shape == (1000, 100)

    @pytest.mark.parametrize("kind", ["npz", "safetensors"])
    @pytest.mark.parametrize(
        ("arrays", "method", "complaint"),
        [
            ({"x": (4, 4)}, "", "no entry named features (it holds x)"),
            ({"features": (4, 4)}, "idpruner", "no entry named importance, which idpruner needs"),
            ({"features": (4, 4), "importance": (3,)}, "idpruner", "importance must be [4] like features, got [3]"),
            ({"features": (4,)}, "", "features must be float [N, D], got float32 [4]"),
            ({"features": (4, 4), "grid": (2,)}, "", "grid must be integers"),
        ],
    )
    def test_what_is_wrong_is_found_before_data_is_read(
        self, tmp_path: Path, monkeypatch, kind: str, arrays: dict, method: str, complaint: str
    ) -> None:
        path = tmp_path / f"t.{kind}"
        if kind == "npz":
            np.savez(path, **{name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
        else:
            save_file({name: torch.zeros(shape) for name, shape in arrays.items()}, path)
        monkeypatch.setattr(features, "_check_memory", lambda *_: pytest.fail("came to reading"))
        with pytest.raises(InputError) as raised:
            features.read_features(path, method)
        assert complaint in str(raised.value)

    def test_other_entries_are_not_looked_into(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
            archive.writestr("notes.npy", b"not an array")
            with archive.open("features.npy", "w") as member:
                np.save(member, np.eye(4))
        assert features.read_features(tmp_path / "t.npz").features.tolist() == np.eye(4).tolist()

    @pytest.mark.parametrize(
        ("values", "lost"), [(np.nan, 8), (np.inf, 8), (1e300, 8), (np.float32(1e30), 8), (np.float32(1e10), 0)]
    )
    def test_features_that_decide_nothing_are_told(self, tmp_path: Path, values: float, lost: int) -> None:
        np.savez(tmp_path / "t.npz", features=np.full((8, 4), values))
        result = run("select", tmp_path / "t.npz", "--method", "divprune", "--keep", 2, *REFERENCE)
        assert result.exit_code == 0, result.output
        notes = [line for line in result.stderr.splitlines() if line.startswith("flashprune: note: ")]
        assert len(notes) == (lost > 0)
        assert all(f"features of {lost} of 8 tokens are NaN, infinite, or too large" in note for note in notes)

    def test_one_token_among_many_and_importance_too(self, tmp_path: Path) -> None:
        held, importance = np.ones((9000, 4), np.float32), np.ones(9000, np.float32)
        held[8999, 3], importance[5] = np.nan, np.nan
        np.savez(tmp_path / "t.npz", features=held, importance=importance)
        result = run("select", tmp_path / "t.npz", "--method", "topk", "--keep", 2, *REFERENCE)
        assert "features of 1 of 9000 tokens" in result.stderr
        assert "importance of 1 of 9000 tokens is NaN" in result.stderr


class TestOutputs:
    def test_dash_is_standard_output(self, tokens: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("select", tokens, "--keep", 12, "--json", "-", *REFERENCE)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["k"] == 12
        assert "12 of 48 tokens" in result.stderr and "standard output" in result.stderr
        assert os.listdir(tmp_path) == ["tokens.npz"]

    def test_a_picture_too(self, photo: Path, tmp_path: Path) -> None:
        result = run("select", photo, "--grid", "6x8", "--out", "-", *REFERENCE)
        assert result.exit_code == 0 and result.stdout_bytes.startswith(b"\x89PNG\r\n")
        assert "--json: - is also the input or another output" in fails("select", photo, "--out", "-", "--json", "-")

    @pytest.mark.parametrize(
        "command", [("demo",), ("bench", "--op", "topk"), ("view", "--model", "m", "--image", "i")]
    )
    def test_a_folder_is_not_standard_output(self, tmp_path: Path, monkeypatch, command: tuple[str, ...]) -> None:
        monkeypatch.chdir(tmp_path)
        assert "standard output (-) cannot be" in fails(*command, "--out", "-")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "log.txt"])
    def test_redirected_output_is_appended_to_not_replaced(self, tokens: Path, tmp_path: Path, name: str) -> None:
        log = tmp_path / "log.txt"
        log.write_text("earlier\n")
        with log.open("ab") as stream:
            command = [*COMMAND, "select", tokens.name, "--keep", "12", "--json", name, *REFERENCE]
            done = subprocess.run(command, cwd=tmp_path, stdout=stream, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0 and "12 of 48 tokens" in done.stderr
        first, rest = log.read_text().split("\n", 1)
        assert first == "earlier" and json.loads(rest)["k"] == 12
        assert sorted(os.listdir(tmp_path)) == ["log.txt", "tokens.npz"]

    def test_another_open_file(self, tokens: Path, tmp_path: Path) -> None:
        with (tmp_path / "log.txt").open("w+") as stream:
            stream.write("earlier\n")
            stream.flush()
            name = f"/dev/fd/{stream.fileno()}"
            command = [*COMMAND, "select", str(tokens), "--keep", "12", "--json", name, *REFERENCE]
            subprocess.run(command, check=True, capture_output=True, pass_fds=[stream.fileno()])
        assert json.loads((tmp_path / "log.txt").read_text().removeprefix("earlier\n"))["k"] == 12

    def test_a_pipe_and_a_device_are_written(self, tokens: Path, tmp_path: Path) -> None:
        pipe, read = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        result = run("select", tokens, "--keep", 12, "--json", pipe, *REFERENCE)
        reader.join(60)
        assert result.exit_code == 0, result.output
        assert json.loads(read[0])["k"] == 12 and stat.S_ISFIFO(pipe.stat().st_mode)
        assert run("select", tokens, "--json", os.devnull, *REFERENCE).exit_code == 0
        assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
    def test_a_file_that_is_rewritten_keeps_its_mode(self, tokens: Path, tmp_path: Path, mode: int) -> None:
        report = tmp_path / "kept.json"
        report.touch()
        report.chmod(mode)
        assert run("select", tokens, "--json", report, *REFERENCE).exit_code == 0
        assert stat.S_IMODE(report.stat().st_mode) == mode and json.loads(report.read_text())

    def test_a_new_file_has_the_usual_mode(self, tokens: Path, tmp_path: Path) -> None:
        assert run("select", tokens, "--json", tmp_path / "kept.json", *REFERENCE).exit_code == 0
        (tmp_path / "other").touch()
        assert (tmp_path / "kept.json").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_what_a_killed_process_left_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / f".kept.json.{os.getpid()}.tmp").write_text("half")
        outputs.write_whole(tmp_path / "kept.json", b"whole")
        assert os.listdir(tmp_path) == ["kept.json"] and (tmp_path / "kept.json").read_text() == "whole"

    def test_a_full_device_is_one_line(self, tokens: Path) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        line = fails("select", tokens, "--json", "/dev/full", *REFERENCE)
        assert line == "flashprune: error: cannot write /dev/full: No space left on device"

    @pytest.mark.parametrize("arguments", [["select", "tokens.npz", "--keep", "2", *REFERENCE], ["--help"]])
    def test_a_full_disk_under_what_is_printed_is_one_line(
        self, tokens: Path, tmp_path: Path, arguments: list[str]
    ) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], cwd=tokens.parent, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert done.stderr == "flashprune: error: cannot write: No space left on device\n"

    def test_a_disk_that_fills_up_leaves_nothing_half_written(self, tokens: Path, tmp_path: Path, monkeypatch) -> None:
        def filling(path: Path, data: bytes) -> int:
            with open(path, "wb") as file:
                file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", filling)
        line = fails("select", tokens, "--json", tmp_path / "kept.json", *REFERENCE)
        assert line == f"flashprune: error: cannot write {tmp_path / 'kept.json'}: No space left on device"
        assert os.listdir(tmp_path) == ["tokens.npz"]

    def test_a_reader_that_has_seen_enough_is_no_error_of_ours(self, tokens: Path) -> None:
        command = [*COMMAND, "select", str(tokens), "--json", "-", *REFERENCE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert "Traceback" not in process.stderr.read()
