"""The command line: what a user sees, the files that appear or do not, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import flashprune as fp
from flashprune.cli import app, commands, demo, draw, files, photos, runs, validate

METHODS = ("topk", "divprune", "cdpruner", "idpruner", "d2pruner")
REFERENCE = ("--backend", "reference")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    """The one line that a wrong input leaves on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flashprune: error: ")
    return lines[0]


def is_plain(text: str) -> bool:
    """Readable in a log: printable characters only, no line wider than 80, nothing cut off."""
    return "…" not in text and all(line.isprintable() and len(line) <= 80 for line in text.splitlines())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    rows, cols = np.mgrid[0:60, 0:80]
    pixels = np.stack([rows * 4, cols * 3, (rows * cols) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "features": random.standard_normal((48, 16)).astype(np.float32),
        "importance": random.random(48).astype(np.float32),
        "grid": np.array([6, 8]),
    }


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


class TestSelect:
    @pytest.mark.parametrize("method", METHODS)
    def test_image_to_picture_and_json(self, photo: Path, tmp_path: Path, method: str) -> None:
        out, report = tmp_path / "kept.png", tmp_path / "kept.json"
        options = ("--method", method, "--keep", "0.25", "--grid", "6x8", "--out", out, "--json", report, *REFERENCE)
        result = run("select", photo, *options)
        assert result.exit_code == 0, result.output
        assert "stand in for a model's" in result.stdout and "12 of 48 tokens" in result.stdout
        held = json.loads(report.read_text())
        assert (held["method"], held["n"], held["k"], held["grid"]) == (method, 48, 12, [6, 8])
        assert held["backend"] == "reference" and held["latency_ms"] > 0 and held["stand_in_features"] is True
        assert held["indices"] == sorted(set(held["indices"])) and len(held["indices"]) == 12
        assert held["versions"]["torch"] == torch.__version__
        self.assert_shows_kept(out, photo, held["indices"])

    @staticmethod
    def assert_shows_kept(out: Path, photo: Path, indices: list[int]) -> None:
        """Kept patches have the photograph's own pixels, the others do not."""
        drawn, original = (np.asarray(Image.open(path).convert("RGB")) for path in (out, photo))
        assert drawn.shape == original.shape
        for token in range(48):
            patch = np.s_[token // 8 * 10 : token // 8 * 10 + 10, token % 8 * 10 : token % 8 * 10 + 10]
            assert np.array_equal(drawn[patch], original[patch]) == (token in indices)

    def test_settings_are_in_the_json(self, photo: Path, tmp_path: Path) -> None:
        run("select", photo, "--method", "d2pruner", "--json", tmp_path / "a", *REFERENCE)
        settings = json.loads((tmp_path / "a").read_text())["settings"]
        assert settings == {"pivot_ratio": 0.7, "alpha": 1.0, "threshold": 0.8}

    @pytest.mark.parametrize("kind", ["npz", "safetensors"])
    def test_real_features_give_the_methods_own_picks(self, tmp_path: Path, tokens: dict, kind: str) -> None:
        path = tmp_path / f"tokens.{kind}"
        if kind == "npz":
            np.savez(path, **tokens)
        else:
            save_file({name: torch.from_numpy(array) for name, array in tokens.items()}, path)
        report = tmp_path / "kept.json"
        result = run("select", path, "--method", "idpruner", "--keep", 10, "--json", report, *REFERENCE)
        assert result.exit_code == 0, result.output
        assert "stand" not in result.stdout
        held = json.loads(report.read_text())
        features, importance = torch.from_numpy(tokens["features"]), torch.from_numpy(tokens["importance"])
        assert held["indices"] == fp.idpruner(features, importance, 10, backend="reference").tolist()
        assert held["grid"] == [6, 8] and held["stand_in_features"] is False

    def test_features_of_half_precision_stay_so(self, tmp_path: Path, tokens: dict) -> None:
        path, report = tmp_path / "tokens.safetensors", tmp_path / "kept.json"
        save_file({"features": torch.from_numpy(tokens["features"]).bfloat16()}, path)
        assert run("select", path, "--method", "divprune", "--json", report, *REFERENCE).exit_code == 0
        assert json.loads(report.read_text())["dtype"] == "bfloat16"

    def test_float64_and_foreign_byte_order_are_converted(self, tmp_path: Path, tokens: dict) -> None:
        path, report = tmp_path / "tokens.npz", tmp_path / "kept.json"
        np.savez(path, features=tokens["features"].astype(">f8"))
        assert run("select", path, "--method", "divprune", "--json", report, *REFERENCE).exit_code == 0
        assert json.loads(report.read_text())["dtype"] == "float32"

    def test_picture_of_features_needs_a_grid(self, tmp_path: Path, tokens: dict) -> None:
        path, out = saved(tmp_path / "t.npz", features=tokens["features"]), tmp_path / "kept.png"
        assert "--out needs a grid" in fails("select", path, "--method", "divprune", "--out", out, *REFERENCE)
        assert not out.exists()
        result = run("select", path, "--method", "divprune", "--grid", "4x12", "--out", out, *REFERENCE)
        assert result.exit_code == 0, result.output
        width, height = Image.open(out).size
        assert width == 3 * height

    @pytest.mark.parametrize(("keep", "k"), [("0.25", 12), ("1.0", 48), ("1", 1), ("48", 48), ("50%", 24), ("1e-9", 1)])
    def test_keep(self, tmp_path: Path, tokens: dict, keep: str, k: int) -> None:
        path, report = saved(tmp_path / "t.npz", **tokens), tmp_path / "kept.json"
        assert run("select", path, "--method", "topk", "--keep", keep, "--json", report, *REFERENCE).exit_code == 0
        assert json.loads(report.read_text())["k"] == k

    @pytest.mark.parametrize("keep", ["0", "-1", "49", "nan", "inf", "-inf", "1.5", "0.0", "-0.25", "101%", "half", ""])
    def test_keep_out_of_range(self, tmp_path: Path, tokens: dict, keep: str) -> None:
        path = saved(tmp_path / "t.npz", **tokens)
        assert "--keep" in fails("select", path, "--keep", keep, "--out", tmp_path / "o.png")
        assert not (tmp_path / "o.png").exists()

    @pytest.mark.parametrize("grid", ["24", "0x4", "-3x4", "3x", "axb", "99999x99999", "5x5"])
    def test_grid_that_does_not_fit(self, tmp_path: Path, tokens: dict, grid: str) -> None:
        assert "--grid" in fails("select", saved(tmp_path / "t.npz", **tokens), "--grid", grid)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_backend_that_cannot_run(self, photo: Path) -> None:
        assert "backend='cuda' cannot run" in fails("select", photo, "--backend", "cuda")

    def test_extreme_aspect_ratio(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((2, 3000, 3), dtype=np.uint8)).save(tmp_path / "line.png")
        result = run("select", tmp_path / "line.png", "--method", "topk", "--out", tmp_path / "o.png", *REFERENCE)
        assert result.exit_code == 0, result.output

    def test_markup_in_a_file_name_is_only_a_name(self, photo: Path) -> None:
        path = photo.rename(photo.with_name("[red]x[b] :smile:.png"))
        assert "[red]x[b] :smile:.png" in "".join(run("select", path, *REFERENCE).stdout.split("\n" + " " * 17))


class TestBadFiles:
    def test_missing(self, tmp_path: Path) -> None:
        assert "there is no file" in fails("select", tmp_path / "none.png")

    @pytest.mark.parametrize("name", ["text.png", "text.jpg", "text.npz", "text.safetensors", "text"])
    def test_text_under_another_name(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("not what the name says\n")
        assert name in fails("select", tmp_path / name)

    @pytest.mark.parametrize("name", ["empty.png", "empty.npz", "empty.safetensors"])
    def test_empty(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert name in fails("select", tmp_path / name)

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_truncated_image(self, photo: Path, share: float) -> None:
        data = photo.read_bytes()
        photo.write_bytes(data[: int(len(data) * share)])
        assert "photo.png" in fails("select", photo)

    def test_corrupt_image(self, photo: Path) -> None:
        data = bytearray(photo.read_bytes())
        data[60:90] = bytes(30)
        photo.write_bytes(data)
        assert "photo.png" in fails("select", photo)

    def test_folder_and_device(self, tmp_path: Path) -> None:
        assert "not a regular file" in fails("select", tmp_path)
        assert "not a regular file" in fails("select", os.devnull)

    def test_name_that_would_move_the_cursor(self, tmp_path: Path) -> None:
        line = fails("select", tmp_path / "a\n\x1b[2Jb.png")
        assert line.isprintable()

    def test_corrupt_archive(self, tmp_path: Path, tokens: dict) -> None:
        path = saved(tmp_path / "t.npz", **tokens)
        data = bytearray(path.read_bytes())
        data[1000:1100] = bytes(100)
        path.write_bytes(data)
        assert "t.npz" in fails("select", path)

    def test_pickled_objects_are_not_loaded(self, tmp_path: Path) -> None:
        assert "t.npz" in fails("select", saved(tmp_path / "t.npz", features=np.array([{}], dtype=object)))

    @pytest.mark.parametrize(
        ("arrays", "complaint"),
        [
            ({"x": np.zeros((4, 4))}, "no entry named features (it holds x)"),
            ({"features": np.zeros(4)}, "features must be float [N, D], got float64 [4]"),
            ({"features": np.zeros((4, 4), dtype=int)}, "features must be float [N, D], got int64 [4, 4]"),
            ({"features": np.zeros((0, 4))}, "with N, D >= 1, got [0, 4]"),
            ({"features": np.ones((4, 4))}, "no entry named importance, which idpruner needs"),
            ({"features": np.ones((4, 4)), "importance": np.ones(3)}, "importance must be [4] like features, got [3]"),
            ({"features": np.ones((4, 4)), "importance": np.ones((4, 1))}, "importance must be float [4]"),
            ({"features": np.ones((4, 4)), "grid": np.array([2, 3])}, "multiply to N=4, got 2x3"),
            ({"features": np.ones((4, 4)), "grid": np.array([2.0, 2.0])}, "got float64 [2]"),
            ({"features": np.ones((4, 4)), "grid": np.array([-2, -2])}, "got -2x-2"),
            ({"features": np.ones((4, 4)), "grid": np.array(4)}, "got int64 []"),
        ],
    )
    def test_wrong_arrays(self, tmp_path: Path, arrays: dict, complaint: str) -> None:
        assert complaint in fails("select", saved(tmp_path / "t.npz", **arrays), "--method", "idpruner")


class TestOutputs:
    def test_folder_that_is_missing_or_a_file(self, photo: Path, tmp_path: Path) -> None:
        assert "--out: there is no folder" in fails("select", photo, "--out", tmp_path / "none" / "o.png")
        assert "--json: there is no folder" in fails("select", photo, "--json", photo / "o.json")

    def test_folder_in_the_way(self, photo: Path, tmp_path: Path) -> None:
        assert "not a regular file" in fails("select", photo, "--json", tmp_path)

    def test_wrong_suffix(self, photo: Path, tmp_path: Path) -> None:
        assert "--out must end in .png" in fails("select", photo, "--out", tmp_path / "o.jpg")

    def test_the_input_is_never_overwritten(self, photo: Path) -> None:
        before = photo.read_bytes()
        assert "also the input" in fails("select", photo, "--out", photo)
        assert "also the input" in fails("select", photo, "--json", photo.parent / "." / photo.name)
        assert photo.read_bytes() == before

    def test_nothing_is_written_when_a_check_fails(self, photo: Path, tmp_path: Path) -> None:
        fails("select", photo, "--out", tmp_path / "o.png", "--json", tmp_path / "none" / "o.json")
        assert os.listdir(tmp_path) == ["photo.png"]

    @pytest.mark.parametrize("step", ["write_bytes", "replace"])
    def test_no_half_written_output(self, photo: Path, tmp_path: Path, monkeypatch, step: str) -> None:
        """A full disk in the middle of writing leaves the old file whole and no temporary one."""

        def full_disk(path: Path, data: bytes) -> int:
            with open(path, "wb") as file:
                file.write(data[:10])
            raise OSError(28, "No space left on device")

        def refused(*_: object) -> None:
            raise OSError(13, "Permission denied")

        out = tmp_path / "o.png"
        out.write_bytes(b"the old picture")
        target = (Path, "write_bytes", full_disk) if step == "write_bytes" else (os, "replace", refused)
        monkeypatch.setattr(*target)
        assert f"cannot write {out}" in fails("select", photo, "--out", out, *REFERENCE)
        monkeypatch.undo()
        assert out.read_bytes() == b"the old picture"
        assert sorted(os.listdir(tmp_path)) == ["o.png", "photo.png"]

    def test_a_link_stays_a_link(self, photo: Path, tmp_path: Path) -> None:
        (tmp_path / "real.png").touch()
        (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
        assert run("select", photo, "--out", tmp_path / "link.png", *REFERENCE).exit_code == 0
        assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").stat().st_size > 0


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch) -> None:
        photographs = (
            photos.Photo("cat", "chelsea.png", (6, 6)),
            photos.Photo("coffee", "coffee.png", (6, 8)),
        )
        monkeypatch.setattr(demo, "DEMO_PHOTOS", photographs)
        monkeypatch.setattr(demo, "_DIM", 32)

    def test_picture_and_table(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("demo", "--out", "new/folder", *REFERENCE)
        assert result.exit_code == 0, result.output
        assert is_plain(result.stdout)
        picture = tmp_path / "new" / "folder" / demo.PICTURE
        with Image.open(picture) as image:
            image.load()
            assert image.width > 600 and image.height > 1200
        assert os.listdir(picture.parent) == [demo.PICTURE]
        assert "stand in for a model's" in result.stdout
        rows = [line.split() for line in result.stdout.splitlines() if line.endswith(("reference", "reference "))]
        assert [row[0] for row in rows] == ["Top-k", "DivPrune", "CDPruner", "IDPruner", "D2Pruner"] * 4
        assert [row[2:4] for row in rows[::5]] == [["36", "9"], ["36", "4"], ["48", "12"], ["48", "5"]]
        assert all(float(row[4]) > 0 and 0 < float(row[5].rstrip("%")) <= 100 for row in rows)
        # by definition nothing keeps more importance than the top k
        for block in range(0, 20, 5):
            kept = [float(row[5].rstrip("%")) for row in rows[block : block + 5]]
            assert max(kept) == kept[0]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_backend_that_cannot_run(self, tmp_path: Path) -> None:
        result = run("demo", "--out", tmp_path / "new", "--backend", "cuda")
        assert result.exit_code == 2 and "backend='cuda' cannot run" in result.stderr
        assert not (tmp_path / "new" / demo.PICTURE).exists()

    def test_folder_cannot_be_made(self, photo: Path) -> None:
        assert "--out" in fails("demo", "--out", photo / "folder")

    def test_photograph_that_is_not_shipped(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(demo, "DEMO_PHOTOS", (photos.Photo("lily", "lily.tif", (4, 4)),))
        assert run("demo", "--out", tmp_path).exit_code == 2

    def test_every_photograph_is_in_the_wheel(self) -> None:
        assert {photos.load_photo(photo.file).dtype for photo in photos.DEMO_PHOTOS} == {np.dtype(np.uint8)}


class TestInfo:
    def test_says_what_runs_and_why_the_rest_does_not(self) -> None:
        result = run("info")
        assert result.exit_code == 0, result.output
        assert is_plain(result.stdout)
        words = " ".join(result.stdout.split())
        assert fp.__version__ in words and torch.__version__ in words
        for name, status in fp.backends().items():
            assert f"{name} {status}" in words

    def test_shows_the_architectures_of_the_cuda_library(self, monkeypatch) -> None:
        facts = {"compiler": "GNU 13.2", "cuda_architectures": ["80", "90a"], "cuda_missing": None}
        monkeypatch.setattr("flashprune.native.build_facts", lambda: facts)
        words = " ".join(run("info").stdout.split())
        assert "cuda architectures 80, 90a" in words and "compiler GNU 13.2" in words


class TestPhotos:
    def test_features_repeat_and_have_full_rank(self) -> None:
        image = photos.crop_to_grid(photos.load_photo("coffee.png"), (12, 16))
        first, again = (photos.patch_features(image, (12, 16), 256) for _ in range(2))
        assert torch.equal(first, again)
        assert first.shape == (192, 256) and first.dtype == torch.float32
        assert int(torch.linalg.matrix_rank(first.double())) == 192

    def test_importance_is_a_distribution(self) -> None:
        importance = photos.stand_in_importance(photos.load_photo("chelsea.png"), (9, 7))
        assert importance.shape == (63,) and bool((importance > 0).all())
        assert float(importance.sum()) == pytest.approx(1)

    @pytest.mark.parametrize("colour", [0, 255])
    def test_a_blank_image_has_finite_features(self, colour: int) -> None:
        image = np.full((40, 40, 3), colour, dtype=np.uint8)
        assert bool(photos.patch_features(image, (4, 4), 16).isfinite().all())
        assert bool(photos.stand_in_importance(image, (4, 4)).isfinite().all())

    @pytest.mark.parametrize("grid", [(0, 4), (4, -1)])
    def test_grid_must_be_positive(self, grid: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="grid must be positive"):
            photos.patch_features(np.zeros((8, 8, 3), dtype=np.uint8), grid, 8)

    @pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
    def test_image_must_be_rgb_bytes(self, image: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"image must be uint8 \[height, width, 3\]"):
            photos.stand_in_importance(image, (2, 2))

    def test_crop_has_the_grids_aspect_ratio(self) -> None:
        assert photos.crop_to_grid(np.zeros((400, 600, 3), np.uint8), (24, 24)).shape == (400, 400, 3)
        assert photos.crop_to_grid(np.zeros((512, 512, 3), np.uint8), (48, 64)).shape == (384, 512, 3)

    def test_heat_map_survives_what_is_not_finite(self) -> None:
        heat = draw.heat_map(torch.tensor([0.0, float("nan"), float("inf"), 1.0]), (2, 2), (3, 3))
        assert heat.shape == (6, 6, 3) and heat[5, 5].sum() > heat[0, 0].sum()


class TestCommand:
    """The installed command as a process: exit codes, streams, and what happens without the extra."""

    @staticmethod
    def call(*code: str) -> subprocess.CompletedProcess[str]:
        package = Path(fp.__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        environment.pop("COLUMNS", None)
        command = [sys.executable, *code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def test_version(self) -> None:
        result = run("--version")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"flashprune {fp.__version__}\n", "")

    @pytest.mark.parametrize("module", ["flashprune", "flashprune.cli"])
    def test_wrong_input(self, module: str, tmp_path: Path) -> None:
        done = self.call("-m", module, "select", str(tmp_path / "none.png"))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"flashprune: error: there is no file {tmp_path / 'none.png'}\n"

    @pytest.mark.parametrize("package", ["typer", "PIL"])
    def test_without_the_extra(self, package: str, photo: Path) -> None:
        code = (
            f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = ['select', {str(photo)!r}]\n"
            "from flashprune.cli import main; main()"
        )
        done = self.call("-c", code)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"flashprune: error: {package} is not installed; run: pip install flashprune[cli]\n"

    def test_importing_the_library_does_not_load_the_extra(self) -> None:
        code = "import sys, flashprune, flashprune.cli; print(sorted({'typer', 'rich', 'PIL'} & set(sys.modules)))"
        assert self.call("-c", code).stdout == "[]\n"

    @pytest.mark.parametrize("command", [[], ["demo"], ["select"], ["info"], ["validate"]])
    def test_help_is_plain(self, command: list[str]) -> None:
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert is_plain(result.stdout)
        assert command in ([], ["info"]) or f"flashprune {command[0]} " in result.stdout.split("Example")[1]


def test_every_method_and_backend_name_is_offered() -> None:

    assert tuple(commands.MethodName.__members__) == tuple(runs.METHODS) == METHODS
    assert {"auto", *fp.backends()} == set(commands.BackendName.__members__)
    assert set(validate.BACKENDS) == set(fp.backends())


def test_png_bytes_are_a_png() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert files.png_bytes(pixels).startswith(b"\x89PNG\r\n")
