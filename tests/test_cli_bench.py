"""`flashprune bench`: files that parse or none, exit codes, and failures that do not end the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flashprune as fp
from flashprune.cli import app
from flashprune.cli import bench as command

pytest.importorskip("flashprune.benchmarks", reason="a checkout that is not installed")

from flashprune.benchmarks import bench_maxmin, floor, machine
from flashprune.benchmarks.peers import nms_mis

FILES = {"results.json", "results.md", "latency.png", "latency.svg", "report.html"}
# maxmin and mis: the only selectors whose peers need no compiler
QUICK = ("--backend", "reference", "--dim", 8, "--keep", 0.25, "--seconds", 0, "--no-memory")


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch) -> None:
    monkeypatch.setattr(floor, "COPIED", {"cpu": 1 << 16, "cuda": 1 << 20})
    monkeypatch.setattr(floor, "SIDE", {"cpu": 64, "cuda": 256})


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flashprune: error: "), result.output
    return lines[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One run's folder."""
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "COPIED", {"cpu": 1 << 16, "cuda": 1 << 20})
        patch.setattr(floor, "SIDE", {"cpu": 64, "cuda": 256})
        result = run("--op", "maxmin,topk", "--tokens", "24,48", *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() and len(line) <= 80 for line in result.stdout.splitlines()[:-1]), result.stdout
    assert "…" not in result.stdout
    return out


def test_results_hold_the_raw_samples_and_where_they_come_from(results):
    assert {path.name for path in results.iterdir()} == FILES
    found = json.loads((results / "results.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["flashprune"] == fp.__version__
    assert found["machine"]["commit"] == machine.commit() and found["machine"]["cpu"]
    assert set(found["measured"]) == {"bandwidth", "matrix_rate", "launch"}
    assert [(row["case"]["op"], row["case"]["n"], row["case"]["k"]) for row in found["rows"]] == [
        ("maxmin", 24, 6), ("maxmin", 48, 12), ("topk", 24, 6), ("topk", 48, 12),
    ]  # fmt: skip
    for row in found["rows"]:
        assert all(v["status"] == "timed" and len(v["seconds"]) >= 3 for v in row["variants"]), row
        assert row["floor"]["seconds"] > 0 and row["floor"]["prefill"] > 0
    names = [variant["name"] for variant in found["rows"][0]["variants"]]
    assert names == ["flashprune", "DivPrune loop", "AngelSlim loop", "[N,D]×[D,K] product"]


def test_the_picture_has_a_line_a_variant_and_the_floor(results):
    with Image.open(results / "latency.png") as image:
        image.verify()
        assert image.width > 500
    svg = (results / "latency.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("maxmin", "topk", "DivPrune loop", "flashprune reference", "floor:", "7B"):
        assert text in svg, text


def test_the_report_needs_nothing_else(results):
    text = (results / "report.html").read_text()
    HTMLParser().feed(text)
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?((?!#)[^"'> ]+)""", text)
    assert outside == [] and "<script" not in text and "@import" not in text
    assert text.count("<svg") == 1 and "DivPrune loop" in text and "maxmin" in text


def test_markdown_has_a_row_a_variant(results):
    lines = (results / "results.md").read_text().splitlines()
    assert sum(line.startswith("| maxmin") for line in lines) == 2 * 4
    assert sum(line.startswith("| topk") for line in lines) == 2 * 2


def compared(results: Path, tmp_path: Path, factor: float, *more: object):
    """A run against the results with ours `factor` times as slow as it was."""
    found = json.loads((results / "results.json").read_text())
    for row in found["rows"]:
        for variant in row["variants"]:
            variant["seconds"] = [factor * seconds for seconds in variant["seconds"]]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(found))
    return run("--op", "topk", "--tokens", "48", *QUICK, "--compare", old, *more)


def test_compare_passes_what_is_as_fast(results, tmp_path):
    result = compared(results, tmp_path, 1e6)
    assert result.exit_code == 0 and "none of ours is slower" in result.stdout, result.output


def test_compare_exits_1_on_what_is_slower(results, tmp_path):
    result = compared(results, tmp_path, 1e-6, "--ratio", 1.5)
    assert result.exit_code == 1 and "1 slower than 1.5 ×" in result.stdout, result.output
    assert "SLOWER" in result.stdout


def test_compare_refuses_what_cannot_be_compared(results, tmp_path):
    assert "no such file" in fails("--op", "topk", "--tokens", 8, "--compare", tmp_path / "none.json").lower()
    for text in ("{", "[]", '{"format": "other"}', '{"format": "flashprune-bench/1", "rows": [{}]}'):
        (tmp_path / "bad.json").write_text(text)
        fails("--op", "topk", "--tokens", 8, "--compare", tmp_path / "bad.json")
    result = run("--op", "topk", "--tokens", 9, *QUICK, "--compare", results / "results.json")
    assert result.exit_code == 2 and "no case in common" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "mmr,nms"), "--op must be one of mmr, mis"),
        (("--tokens", "many"), "--tokens must be whole numbers"),
        (("--tokens", "1.5"), "--tokens must be whole numbers"),
        (("--tokens", "0"), "--tokens must be at least 1, got 0"),
        (("--tokens", "8", "--dim", "0"), "--dim must be at least 1, got 0"),
        (("--tokens", "8", "--batch", "-1", "--op", "mis"), "--batch must be at least 1, got -1"),
        (("--tokens", "8", "--keep", "9"), "--keep must give 1 to N=8 tokens, got 9"),
        (
            ("--tokens", "8", "--keep", "0"),
            "--keep must be a share above 0 and up to 1.0, or a count of 1 or more; got 0",
        ),
        (("--keep", "nan"), "or a count of 1 or more; got nan"),
        (("--keep", "0.1,1.5"), "or a count of 1 or more; got 1.5"),
        (("--keep", "2.0"), "or a count of 1 or more; got 2.0"),
        (("--keep", "-0.5"), "or a count of 1 or more; got -0.5"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got int8"),
        (("--preset", "gpt"), "--preset must be one of llava-1.5"),
        (("--preset", "llava-1.5", "--tokens", "8"), "--preset sets tokens"),
        (("--seconds", "-1"), "--seconds must be a number of at least 0"),
        (("--backend", "triton"), "--backend triton does not serve --device cpu"),
        (("--out", "/proc/nowhere"), "--out /proc/nowhere"),
    ],
)
def test_wrong_options_are_one_line(arguments, message):
    assert message in fails(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line():
    assert "torch finds no GPU" in fails("--device", "cuda")


def test_a_size_that_cannot_be_is_a_row_and_the_rest_goes_on(tmp_path):
    result = run("--op", "topk", "--tokens", "0,24", *QUICK, "--out", tmp_path)
    assert result.exit_code == 1
    assert "FAILED, not timed: topk 0 / 1 / 0: flashprune: tokens must be at least 1, got 0" in result.stdout
    first, second = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert first["variants"][0]["status"] == "failed" and second["variants"][0]["status"] == "timed"
    assert "FAILED" in (tmp_path / "results.md").read_text() and "Not timed" in (tmp_path / "report.html").read_text()


def test_inputs_that_do_not_fit_are_a_row():
    result = run("--op", "maxmin", "--tokens", "24,1000000000000", *QUICK)
    assert result.exit_code == 1, result.output
    assert "out of memory: the inputs need about" in result.stdout
    assert result.stdout.count("DivPrune loop") == 1


def test_a_peer_that_is_wrong_is_reported_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(nms_mis, "mis_sweep", lambda x, importance, k: importance.argsort()[:k])
    result = run("--op", "mis", "--tokens", 24, *QUICK, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    status = {variant["name"]: variant["status"] for variant in row["variants"]}
    assert status.pop("NMS sweep") == "failed" and set(status.values()) == {"timed"}
    assert "FAILED, not timed: mis 24 / 8 / 6: NMS sweep: " in result.stdout


def test_flashprune_wrong_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(bench_maxmin.fp, "maxmin_select", lambda x, k, **settings: torch.arange(k))
    assert run("--op", "maxmin", "--tokens", 24, *QUICK).exit_code == 1


def test_a_slow_variant_is_left_out_at_more_tokens(tmp_path):
    result = run("--op", "maxmin", "--tokens", "24,48", *QUICK, "--limit", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    first, second = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {variant["status"] for variant in first["variants"]} == {"timed"}
    assert {variant["status"] for variant in second["variants"]} == {"left out"}
    assert "left out: maxmin 48 / 8 / 12: DivPrune loop: about" in result.stdout


def test_no_peers_means_flashprune_alone(tmp_path):
    assert run("--op", "maxmin", "--tokens", 24, *QUICK, "--no-peers", "--out", tmp_path).exit_code == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [variant["name"] for variant in row["variants"]] == ["flashprune"]


def test_batches_dtypes_and_several_backends(native, tmp_path):
    sizes = ("--tokens", 24, "--dim", 8, "--keep", "0.25,3", "--batch", "1,3", "--dtype", "bf16")
    options = ("--backend", "cpu,reference", "--seconds", 0, "--no-memory", "--no-peers", "--out", tmp_path)
    result = run("--op", "mmr", *sizes, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    cases = [(row["case"]["images"], row["case"]["k"], row["case"]["dtype"]) for row in rows]
    assert cases == [(1, 6, "bfloat16"), (1, 3, "bfloat16"), (3, 6, "bfloat16"), (3, 3, "bfloat16")]
    assert {v["name"] for row in rows for v in row["variants"]} == {"flashprune", "flashprune reference"}


def test_a_preset_shows_what_pruning_saves(native, tmp_path):
    options = ("--seconds", 0, "--no-memory", "--no-peers", "--out", tmp_path)
    result = run("--preset", "llava-1.5", "--op", "d2pruner", *options)
    assert result.exit_code == 0, result.output
    _, high = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (high["case"]["n"], high["case"]["k"], high["saving"]["full_layers"]) == (576, 128, 2)
    assert 0.722 < 1 - high["saving"]["flops_after"] / high["saving"]["flops_before"] < 0.762
    assert "What pruning saves" in result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_each_variant(tmp_path):
    options = ("--backend", "reference", "--seconds", 0, "--out", tmp_path)
    assert run("--op", "maxmin", "--tokens", 600, "--dim", 8, "--keep", 2, *options).exit_code == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    peaks = {variant["name"]: variant.get("peak_bytes") for variant in row["variants"]}
    assert peaks["DivPrune loop"] >= 4 * 600**2 and peaks["[N,D]×[D,K] product"] is None


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    began = command.sweep.Sweep.row

    def row(self, case):
        if case.n == 48:
            raise KeyboardInterrupt
        return began(self, case)

    monkeypatch.setattr(command.sweep.Sweep, "row", row)
    result = run("--op", "topk", "--tokens", "24,48,96", *QUICK, "--out", tmp_path)
    assert result.exit_code == 130
    assert "interrupted: 1 of 3 cases were raced" in result.stderr
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1


@pytest.mark.parametrize("where", ["floor.measure", "sweep.Sweep.row"])
def test_a_run_that_is_interrupted_at_once_leaves_what_was_there(monkeypatch, tmp_path, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "results.json").write_text("earlier")
    monkeypatch.setattr(f"{command.floor.__package__}.{where}", interrupted)
    result = run("--op", "topk", "--tokens", "24", *QUICK, "--out", tmp_path)
    assert result.exit_code == 130
    assert (tmp_path / "results.json").read_text() == "earlier"


@pytest.mark.parametrize(("keep", "k"), [("1.0", 24), ("1", 1), ("50%", 12), ("7", 7)])
def test_keep_means_what_it_means_elsewhere(tmp_path, keep, k):
    options = [option for option in QUICK if option not in ("--keep", 0.25)]
    result = run("--op", "topk", "--tokens", "24", *options, "--keep", keep, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["case"]["k"] == k


def test_a_file_that_cannot_be_written_leaves_none_half_written(monkeypatch, tmp_path):
    (tmp_path / "latency.svg").mkdir()
    result = run("--op", "topk", "--tokens", 24, *QUICK, "--out", tmp_path)
    assert result.exit_code == 2 and "latency.svg" in result.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    json.loads((tmp_path / "results.json").read_text())


def test_module_of_a_checkout_is_the_command():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--op", "nms"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("flashprune: error: --op must be one of mmr")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_everything_is_timed(tmp_path):
    sizes = ("--tokens", "64,2048", "--dim", 64, "--batch", "1,3", "--seconds", 0)
    result = run("--device", "cuda", "--op", "maxmin,mis,topk,importance,idpruner,d2pruner", *sizes, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        for variant in row["variants"]:
            assert variant["status"] == "timed" and variant["peak_bytes"] >= 0, (row["case"], variant)
            assert "L2" in variant["how"]
