"""`flashprune view`: what it shows is what the model kept and answered, the page works offline, and what is refused."""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models
from tests import vlm

import flashprune as fp
from flashprune.cli import app, draw, files, page
from flashprune.cli.models import load, prompt_inputs
from flashprune.cli.photos import load_photo, photo_path
from flashprune.cli.planes import panels
from flashprune.cli.view import PAGE, PICTURE, Answer, agreement
from flashprune.integrations.transformers import Item, prune
from flashprune.integrations.transformers.profiling import Variant, selection_of

PHOTO = photo_path("rocket.jpg")
PROMPT = "Describe the image."
TILED = ("llava_next", "llava_onevision", "internvl")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("llava", "qwen2_5_vl", *TILED)
    for family in families:
        tiny_models.save(family, root / family)
    return {family: root / family for family in families}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["view", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def views(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that one run each wrote: with every default, and for an image in tiles."""
    root = tmp_path_factory.mktemp("views")
    runs = {
        "qwen2_5_vl": ("--runs", 1, "--tokens", 8),
        "llava_next": ("--runs", 1, "--tokens", 8, "--method", "topk,fastv", "--keep", 0.1, "--keep", "40,100%"),
    }
    for family, options in runs.items():
        result = run("--model", folders[family], "--image", PHOTO, *options, "--out", root / "new" / family)
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-2]) and "…" not in result.stdout
        assert result.stdout.count("differs from token") + result.stdout.count("the same 8 tokens") > 3
    return {family: root / "new" / family for family in runs}


class Elements(HTMLParser):
    """Every element with its attributes, and the text in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts[-1] += data


def data_of(folder: Path) -> dict[str, Any]:
    return json.loads(Elements((folder / PAGE).read_text()).scripts[0])


def cells(mask: str, count: int) -> list[int]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(mask), dtype=np.uint8))
    assert not bits[count:].any()
    return bits[:count].nonzero()[0].tolist()


class TestFigures:
    def test_two_files_and_nothing_else(self, views: dict[str, Path]) -> None:
        for folder in views.values():
            assert {path.name for path in folder.iterdir()} == {PICTURE, PAGE}
            assert (folder / PAGE).stat().st_size < 400_000
            with Image.open(folder / PICTURE) as image:
                image.verify()

    @pytest.mark.filterwarnings("ignore:d2pruner without prior")
    def test_the_page_shows_what_the_model_kept_and_answered(
        self, views: dict[str, Path], folders: dict[str, Path]
    ) -> None:
        found = data_of(views["qwen2_5_vl"])
        model, processor = load(str(folders["qwen2_5_vl"]))
        inputs = prompt_inputs(processor, [Image.fromarray(load_photo("rocket.jpg"))], PROMPT)
        settings = {"topk": {"importance": "received_attention"}, "idpruner": {"importance": "received_attention"}}
        assert found["panels"] == [{"rows": 8, "columns": 12}]
        assert cells(found["whole"]["masks"][0], 96) == list(range(96))
        assert [one["method"] for one in found["pruned"][::3]] == ["divprune", "d2pruner", "fastv", "topk", "idpruner"]
        for one in found["pruned"]:
            with prune(model, one["method"], float(one["keep"]), **settings.get(one["method"], {})) as handle:
                ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert handle.last is not None
            assert cells(one["masks"][0], 96) == handle.last.kept[0].tolist()
            assert one["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert (one["tokens"], one["kept"]) == (96, fp.budget(96, float(one["keep"])))
            assert one["answer"].startswith(one["shared"]) and found["whole"]["answer"].startswith(one["shared"])

    def test_the_panels_of_tiles_hold_all_but_newlines(self, views: dict[str, Path]) -> None:
        found = data_of(views["llava_next"])
        grids = [panel["rows"] * panel["columns"] for panel in found["panels"]]
        assert grids == [60, 25] and found["whole"]["tokens"] == 60 + 6 + 25
        for one in found["pruned"]:
            shown = sum(len(cells(mask, count)) for mask, count in zip(one["masks"], grids, strict=True))
            assert shown <= one["kept"] <= shown + 6
            assert one["kept"] == {"0.1": 9, "40": 40, "1.0": 91}[one["keep"]]

    def test_keeping_all_changes_nothing(self, views: dict[str, Path]) -> None:
        found = data_of(views["llava_next"])
        for one in (one for one in found["pruned"] if one["keep"] == "1.0"):
            assert one["agreement"] == "the same 8 tokens"
            assert (one["answer"], one["cache"]) == (found["whole"]["answer"], found["whole"]["cache"])
            assert one["masks"] == found["whole"]["masks"]

    def test_the_picture_is_drawn_of_the_same_cells(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[tuple[list[int], np.ndarray]] = []
        pasted: list[np.ndarray] = []
        dim, sheet = draw.dim_dropped, draw.sheet

        def noted(image: Any, grid: Any, kept: Any, cell: Any) -> Any:
            drawn.append((kept.tolist(), dim(image, grid, kept, cell)))
            return drawn[-1][1]

        def laid_out(title: Any, note: Any, rows: Any, groups: Any) -> Any:
            assert [row.label for row in rows] == ["DivPrune", "FastV"]
            pasted.extend(panel.pixels for column in groups[0].columns for panel in column.panels)
            return sheet(title, note, rows, groups)

        monkeypatch.setattr(draw, "dim_dropped", noted)
        monkeypatch.setattr(draw, "sheet", laid_out)
        options = ("--method", "divprune,fastv", "--keep", "0.25,8", "--runs", 1, "--tokens", 1)
        assert run("--model", folders["llava"], "--image", PHOTO, *options, "--out", tmp_path).exit_code == 0
        found = data_of(tmp_path)
        every = {(one["method"], one["keep"]): cells(one["masks"][0], 64) for one in found["pruned"]}
        order = [("divprune", "0.25"), ("fastv", "0.25"), ("divprune", "8"), ("fastv", "8")]
        assert [kept for kept, _ in drawn] == [list(range(64)), *(every[one] for one in order)]
        whole, *pruned = (pixels for _, pixels in drawn)
        assert all(one is other for one, other in zip(pasted, (whole, whole, *pruned), strict=True))


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize("family", ["llava", *TILED])
def test_the_panels_cover_what_the_model_saw(folders: dict[str, Path], family: str, portrait: bool) -> None:
    """The pixels of the processor's output, tiles put together, are those of the panel's part of the image."""
    image = Image.fromarray(load_photo("rocket.jpg")).crop((0, 0, 500, 300))
    image = image.rotate(90, expand=True) if portrait else image
    model, processor = load(str(folders[family]))
    inputs = prompt_inputs(processor, [image], PROMPT)
    item = selection_of(model, inputs, Variant("divprune", 1.0)).items[0][0]
    found = panels(family, processor, image.size, item)
    assert sum((one.cells >= 0).sum() for one in found) == len(item) - (item.positions[:, 2] >= found[0].grid[1]).sum()
    for one in found:
        shown = one.cells[one.cells >= 0]
        assert sorted(shown.tolist()) == list(range(one.grid[0] * one.grid[1]))
    mean, std = (np.array(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    tiles = inputs["pixel_values"].numpy().reshape(-1, *inputs["pixel_values"].shape[-3:])
    tiles = (tiles.transpose(0, 2, 3, 1) * std + mean) * 255
    if family == "internvl":
        rows, columns = (side // 4 for side in found[0].grid)
        grid = tiles[:-1].reshape(rows, columns, *tiles.shape[1:])
        seen = [grid.transpose(0, 2, 1, 3, 4).reshape(rows * 112, columns * 112, 3), tiles[-1]]
    else:
        seen = [tiles[0]]  # the base image is the last panel of those that have tiles
    for pixels, panel in zip(seen, found[-len(seen) :], strict=True):
        size = (pixels.shape[1], pixels.shape[0])
        part = panel.picture(image, 10_000).resize(size, Image.Resampling.BICUBIC)
        assert abs(np.asarray(part) - pixels).mean() < 1.5


WHOLE = ("mistral3", "lighton_ocr", "paligemma", "video_llama_3", "deepseek_vl", "deepseek_vl_hybrid", "vipllava")
CUT = ("qianfan_ocr", "aya_vision", "cohere2_vision", "ovis2", "idefics3", "smolvlm", "llava_next_video")


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize("family", [family for family in (*WHOLE, *CUT) if family in vlm.MORE])
def test_the_panels_of_further_families(family: str, portrait: bool) -> None:
    """Every token is in one cell of one panel, and the tiles that the model saw are where the panel has them."""
    image = Image.fromarray(load_photo("rocket.jpg")).crop((0, 0, 500, 300))
    image = image.rotate(90, expand=True) if portrait else image
    model, processor = vlm.built(family)
    inputs = prompt_inputs(processor, [image], PROMPT)
    item = functools.reduce(Item.joined, selection_of(model, inputs, Variant("divprune", 1.0)).items[0])
    found = panels(family, processor, image.size, item)
    assert len(found) == (2 if family in CUT else 1)
    for one in found:
        shown = one.cells[one.cells >= 0]
        assert sorted(shown.tolist()) == list(range(one.grid[0] * one.grid[1]))
    newlines = int((item.positions[:, 2] >= found[0].grid[1]).sum()) if family == "llava_next_video" else 0
    assert sum(int((one.cells >= 0).sum()) for one in found) == len(item) - newlines
    if family in ("lighton_ocr", "mistral3", "video_llama_3", "llava_next_video"):
        return
    mean, std = (np.array(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    tiles = inputs["pixel_values"].numpy().reshape(-1, *inputs["pixel_values"].shape[-3:])
    tiles = (tiles.transpose(0, 2, 3, 1) * std + mean) * 255
    seen = [tiles[0] if family in WHOLE or family == "ovis2" else tiles[-1]]
    if family in CUT:
        side = len(tiles[0])
        rows, columns = (count // 4 for count in found[0].grid)
        grid = (tiles[1:] if family == "ovis2" else tiles[:-1]).reshape(rows, columns, *tiles.shape[1:])
        seen.insert(0, grid.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3))
    for pixels, panel in zip(seen, found, strict=True):
        size = (pixels.shape[1], pixels.shape[0])
        part = np.asarray(panel.picture(image, 10_000).resize(size, Image.Resampling.BICUBIC))
        inside = (part > 0).any(-1)  # not what is padded
        assert abs(part - pixels)[inside].mean() < 6


class TestPage:
    def test_it_needs_nothing_else(self, views: dict[str, Path]) -> None:
        text = (views["qwen2_5_vl"] / PAGE).read_text()
        elements = Elements(text)
        sources = [attributes["src"] for _, attributes in elements.found if "src" in attributes]
        assert len(sources) == 1 and all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
        assert not any("href" in attributes for _, attributes in elements.found)
        assert not re.search(r"https?:|@import|url\(", text) and "default-src 'none'" in text
        tags = [tag for tag, _ in elements.found]
        assert tags.count("tr") == 1 + 16 + 2 * 3 and tags.count("script") == 2

    def test_every_control_has_a_name(self, views: dict[str, Path]) -> None:
        elements = Elements((views["qwen2_5_vl"] / PAGE).read_text()).found
        radios = [attributes for tag, attributes in elements if tag == "input" and attributes["type"] == "radio"]
        assert [radio["value"] for radio in radios] == ["divprune", "d2pruner", "fastv", "topk", "idpruner"]
        assert ("label", {"for": "keep"}) in elements and "legend" in [tag for tag, _ in elements]
        assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")

    def test_hostile_text_stays_text(self) -> None:
        hostile = "</script x><!-- <script ></script><script>alert(1)</script><img src=x onerror='alert(2)'>\" & <!--"
        entry = {name: hostile for name in ("label", "keep", "keep_label", "prefill", "cache", "answer", "agreement")}
        entry |= {"tokens": 4, "kept": 2, "shared": "", "masks": ["wA=="]}
        panel = {"name": hostile, "rows": 2, "columns": 2, "source": "data:image/jpeg;base64,"}
        found = {"model": hostile, "image": hostile, "prompt": hostile, "measured": hostile, "panels": [panel]}
        text = page.html(found | {"whole": entry | {"method": ""}, "pruned": [entry | {"method": hostile}]})
        elements = Elements(text)
        tags = [tag for tag, _ in elements.found]
        assert tags.count("script") == 2 and tags.count("img") == 1
        assert "<" not in elements.scripts[0]  # browsers end a script sooner than this parser does
        assert json.loads(elements.scripts[0])["pruned"][0]["answer"] == hostile


def test_what_agrees() -> None:
    def answer(*ids: int) -> Answer:
        return Answer(torch.tensor(ids, dtype=torch.int64), "")

    whole = answer(1, 2, 3)
    others = (answer(1, 2, 3), answer(1, 5, 4), answer(1, 2), answer())
    assert [whole.equal(other) for other in others] == [3, 1, 2, 0]
    assert agreement(answer(1, 2, 3), whole) == "the same 3 tokens"
    assert agreement(answer(1, 5, 3), whole) == "differs from token 2 on"
    assert agreement(answer(1, 2), whole) == "differs from token 3 on"


class TestFiles:
    def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        text, out = tmp_path / "text.txt", tmp_path / "out"
        text.write_text("no image")
        taken = tmp_path / "taken"
        (taken / PAGE).mkdir(parents=True)
        wrong: list[tuple[Sequence[object], str]] = [
            (("--model", tmp_path / "none"), "none"),
            (("--image", tmp_path / "none.png"), "there is no file"),
            (("--image", text), "is not an image"),
            (("--method", "best"), "--method must be of"),
            (("--keep", "2.5"), "--keep must be"),
            (("--importance", "magic"), "--importance must be"),
            (("--prior", tmp_path / "none"), "none"),
            (("--method", "divprune", "--scorer", text), "--scorer is not used"),
            (("--scorer", text), "not a safetensors file"),
            (("--out", text), "--out: cannot make the folder"),
            (("--out", text / "deeper"), "--out: cannot make the folder"),
            (("--out", taken), "is not a regular file"),
        ]
        before = sorted(tmp_path.rglob("*"))
        for options, said in wrong:
            result = run("--model", folders["llava"], "--image", PHOTO, "--out", out, *options)
            assert result.exit_code == 2, (options, result.output)
            line = result.stderr.splitlines()[-1]
            assert line.startswith("flashprune: error: ") and said in line, (options, line)
            assert result.stdout == "" and sorted(tmp_path.rglob("*")) == before

    def test_an_output_in_the_way_of_the_image(self, folders: dict[str, Path], tmp_path: Path) -> None:
        image = tmp_path / PICTURE
        shutil.copy(PHOTO, image)
        result = run("--model", folders["llava"], "--image", image, "--out", tmp_path)
        assert result.exit_code == 2 and "is also the input" in result.stderr
        assert image.read_bytes() == PHOTO.read_bytes()

    def test_old_files_are_replaced_whole_or_not_at_all(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in (PICTURE, PAGE):
            (tmp_path / name).write_text("old")
        options = ("--model", folders["llava"], "--image", PHOTO, "--out", tmp_path)
        quick = ("--method", "divprune", "--keep", 4, "--runs", 1, "--tokens", 1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "png_bytes", lambda image: 1 / 0)
            assert isinstance(run(*options, *quick).exception, ZeroDivisionError)
        assert [(tmp_path / name).read_text() for name in (PICTURE, PAGE)] == ["old", "old"]
        assert run(*options, *quick).exit_code == 0
        assert {path.name for path in tmp_path.iterdir()} == {PICTURE, PAGE}
        assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / PAGE).read_text().endswith("</html>\n")


PROBE = """<script>
const report = document.createElement("pre");
const look = () => {
  const canvas = document.getElementById("panel-0"), context = canvas.getContext("2d"), drawn = [];
  for (let row = 0; row < 8; row++) for (let column = 0; column < 12; column++) {
    const at = [Math.floor((column + 0.5) * canvas.width / 12), Math.floor((row + 0.5) * canvas.height / 8)];
    if (context.getImageData(...at, 1, 1).data[3] > 0) drawn.push(row * 12 + column);
  }
  return { drawn, kept: document.getElementById("kept").textContent, hash: location.hash,
    title: document.getElementById("title").textContent, answer: document.getElementById("answer").textContent,
    row: document.querySelector("tr[aria-current]").dataset.method,
    checked: document.querySelector("input[name=method]:checked").value,
    spoken: document.getElementById("keep").getAttribute("aria-valuetext") };
};
addEventListener("load", () => {
  const slider = document.getElementById("keep"), seen = [look()];
  slider.value = 3; slider.dispatchEvent(new Event("input")); seen.push(look());
  document.querySelector("input[value=divprune]").click(); seen.push(look());
  slider.value = 0; slider.dispatchEvent(new Event("input")); seen.push(look());
  report.id = "report"; report.textContent = JSON.stringify(seen); document.body.append(report);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_switch_and_the_slider_in_a_browser(views: dict[str, Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    probed.write_text((views["qwen2_5_vl"] / PAGE).read_text().replace("</body>", PROBE))
    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
    flags = [f"--{flag}" for flag in ("headless", "no-sandbox", *quiet, "disable-component-update", "dump-dom")]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    url = f"{probed.as_uri()}#method=fastv&keep=0.25"
    done = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:]
    seen = json.loads(unescape(match[1]))
    found = data_of(views["qwen2_5_vl"])
    entries = {(one["method"], one["keep"]): one for one in found["pruned"]}
    shown = [entries["fastv", "0.25"], entries["fastv", "0.1"], entries["divprune", "0.1"], found["whole"]]
    for state, entry in zip(seen, shown, strict=True):
        assert state["drawn"] == cells(entry["masks"][0], 96)
        assert state["kept"] == state["spoken"] and state["kept"].endswith(f": {entry['kept']} of 96")
        assert state["answer"] == (entry["answer"] or "(nothing)") and state["row"] == entry["method"]
        assert state["title"] == (f"{entry['label']}, {entry['keep_label']}" if entry["method"] else "All tokens")
    assert [state["checked"] for state in seen] == ["fastv", "fastv", "divprune", "divprune"]
    hashes = ["fastv&keep=0.25", "fastv&keep=0.1", "divprune&keep=0.1", "divprune&keep=all"]
    assert [state["hash"] for state in seen] == [f"#method={hash}" for hash in hashes]
