"""The page of `flashprune view`: one file that needs nothing else, with a switch of methods and a slider of keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e22; --paper: #fafaf8; --faint: #5c616b; --line: #d8dade;
        --grey: #d4d6db; --accent: #0b57d0; --mark: #ffd8a8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --paper: #17181b; --faint: #a3a8b2; --line: #3a3d44;
        --grey: #2b2d33; --accent: #8ab4f8; --mark: #7a4a12 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       padding: 1rem; max-width: 72rem }
p, td.answer { overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .3rem } h2 { font-size: 1.05rem; margin: 0 0 .3rem } p { margin: .2rem 0 }
.faint { color: var(--faint); font-size: .9rem }
form { display: none; position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .5rem 0 .7rem;
       border-bottom: 1px solid var(--line); margin-bottom: 1rem }
.js form { display: block }
fieldset { border: 0; padding: 0; margin: 0 0 .4rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
legend { float: left; margin-right: 1rem; padding: .15rem 0; font-weight: 600 }
fieldset label { padding: .15rem 0; cursor: pointer }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem 1rem; font-weight: 600 }
.slider input { flex: 1 1 12rem; min-width: 10rem; height: 1.8rem; accent-color: var(--accent) }
.slider output { flex: 0 1 13rem; font-weight: 400; font-variant-numeric: tabular-nums }
input:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure { margin: 0; max-width: min(100%, 34rem) }
.picture { position: relative; display: inline-block; background: var(--grey); line-height: 0 }
.picture img { max-width: 100%; max-height: 75vh } .js .picture img { filter: grayscale(1); opacity: .22 }
.picture canvas { position: absolute; inset: 0; width: 100%; height: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
         margin: 1rem 0 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem }
.answer { white-space: pre-wrap; min-height: 3em } mark { background: var(--mark); color: inherit }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap }
td.answer { min-width: 18rem; white-space: pre-wrap }
tr[aria-current] td { background: color-mix(in srgb, var(--accent) 14%, transparent) }
.only-js { display: none } .js .only-js { display: block } .js .no-js { display: none }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const methods = [...new Set(data.pruned.map((one) => one.method))];
const of = (method) => [data.whole,
  ...data.pruned.filter((one) => one.method === method).sort((a, b) => b.kept - a.kept)];
const slider = find("keep");
let method = methods[0];

function paint(canvas, panel, mask) {
  const image = canvas.previousElementSibling;
  if (!image.complete || !image.naturalWidth) return;
  const { naturalWidth: width, naturalHeight: height } = image;
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const bits = atob(mask);
  let kept = 0;
  for (let cell = 0; cell < panel.rows * panel.columns; cell++) {
    if (!(bits.charCodeAt(cell >> 3) & (128 >> (cell & 7)))) continue;
    kept++;
    const row = Math.floor(cell / panel.columns), column = cell % panel.columns;
    const x = Math.round((column * width) / panel.columns), y = Math.round((row * height) / panel.rows);
    const w = Math.round(((column + 1) * width) / panel.columns) - x;
    const h = Math.round(((row + 1) * height) / panel.rows) - y;
    context.drawImage(image, x, y, w, h, x, y, w, h);
  }
  canvas.closest("figure").querySelector("output").textContent = `: ${kept} kept`;
}

function answer(target, one) {
  target.replaceChildren(one.shared);
  if (one.answer.length > one.shared.length) {
    const rest = document.createElement("mark");
    rest.textContent = one.answer.slice(one.shared.length);
    target.append(rest);
  }
  if (!one.answer) target.replaceChildren("(nothing)");
}

function show() {
  const entries = of(method), one = entries[slider.value], pruned = one.method !== "";
  const text = `${pruned ? one.keep_label : "all"}: ${one.kept} of ${one.tokens}`;
  find("kept").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  data.panels.forEach((panel, index) => paint(find(`panel-${index}`), panel, one.masks[index]));
  find("title").textContent = pruned ? `${one.label}, ${one.keep_label}` : "All tokens";
  answer(find("answer"), one);
  find("agreement").textContent = pruned ? `Beside the answer without pruning: ${one.agreement}.` : "";
  for (const name of ["kept", "prefill", "cache"]) find(`now-${name}`).textContent = one[name];
  document.querySelectorAll("tr[data-method]").forEach((row) =>
    row.dataset.method === one.method && row.dataset.keep === one.keep
      ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current"));
}

function remember() {
  const one = of(method)[slider.value];
  const place = new URLSearchParams({ method, keep: one.method ? one.keep : "all" });
  history.replaceState(null, "", `#${place}`);
}

function recall() {
  const place = new URLSearchParams(location.hash.slice(1));
  if (methods.includes(place.get("method"))) method = place.get("method");
  const entries = of(method);
  const found = entries.findIndex((one) => (one.method ? one.keep : "all") === place.get("keep"));
  slider.max = entries.length - 1;
  slider.value = found >= 0 ? found : Math.min(1, entries.length - 1);
  document.querySelectorAll("input[name=method]").forEach((input) => (input.checked = input.value === method));
  show();
}

document.documentElement.classList.add("js");
document.querySelectorAll("input[name=method]").forEach((input) =>
  input.addEventListener("change", () => { method = input.value; show(); remember(); }));
slider.addEventListener("input", () => { show(); remember(); });
document.querySelectorAll(".picture img").forEach((image) => image.addEventListener("load", show));
find("controls").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", recall);
recall();
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_FIGURES = (("Visual tokens", "kept"), ("Prefill, ms (range)", "prefill"), ("Key-value cache", "cache"))


def html(found: Mapping[str, Any]) -> str:
    """The page.

    `found`: `model`, `image`, `prompt` and `measured`, texts; `panels`: `name`, `rows`, `columns`, and `source`, an
    image as a data URI; `whole`, and `pruned`, a list of the same: `method` ("" for whole), `label`, `keep`,
    `keep_label`, `tokens`, `kept`, `prefill`, `cache`, `answer`, `shared` (what it begins with like that of the whole),
    `agreement`, and `masks`, one for each panel: a bit a token, as base64.
    """
    whole, pruned = found["whole"], found["pruned"]
    data = json.dumps({name: found[name] for name in ("whole", "pruned")} | {"panels": _grids(found["panels"])})
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>flashprune view</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>{STYLE}</style></head>\n<body>\n'
        f"<h1>What pruning keeps</h1>\n<p>{escape(found['model'])} on {escape(found['image'])}</p>\n"
        f"<p>Prompt: {escape(found['prompt'])}</p>\n{_controls(pruned)}\n"
        f'<div class="panels">{"".join(_panel(i, panel) for i, panel in enumerate(found["panels"]))}</div>\n'
        f"{_cards(whole)}\n{_table([whole, *pruned])}\n"
        f'<p class="faint">{escape(found["measured"])} Answers are generated greedily.</p>\n'
        f'<script type="application/json" id="data">{_inert(data)}</script>\n<script>{SCRIPT}</script>\n'
        "</body></html>\n"
    )


def _inert(data: str) -> str:
    """JSON that cannot end the script element which holds it, whatever a model answers."""
    return data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _grids(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: panel[name] for name in ("rows", "columns")} for panel in panels]


def _controls(pruned: Sequence[Mapping[str, Any]]) -> str:
    labels = {one["method"]: one["label"] for one in pruned}
    choices = "".join(
        f'<label><input type="radio" name="method" value="{escape(name)}"> {escape(label)}</label>\n'
        for name, label in labels.items()
    )
    return (
        f'<form id="controls"><fieldset><legend>Method</legend>\n{choices}</fieldset>\n'
        '<div class="slider"><label for="keep">Fewer tokens</label>'
        '<input type="range" id="keep" min="0" max="1" step="1" value="1"><output id="kept" for="keep"></output>'
        "</div></form>"
    )


def _panel(index: int, panel: Mapping[str, Any]) -> str:
    what = f"{panel['name']}, {panel['rows']} x {panel['columns']} tokens"
    return (
        f'<figure><div class="picture"><img src="{escape(panel["source"])}" alt="the image: {escape(what)}">'
        f'<canvas id="panel-{index}" role="img" aria-label="the tokens that are kept"></canvas></div>'
        f'<figcaption class="faint">{escape(what)}<output></output></figcaption></figure>'
    )


def _cards(whole: Mapping[str, Any]) -> str:
    before = "".join(f"<tr><th>{name}</th><td>{escape(str(whole[key]))}</td></tr>" for name, key in _FIGURES)
    now = "".join(f'<tr><th>{name}</th><td id="now-{key}"></td></tr>' for name, key in _FIGURES)
    return (
        f'<div class="cards"><section class="card"><h2>Without pruning</h2><table>{before}</table>'
        f'<p class="answer">{escape(whole["answer"]) or "(nothing)"}</p></section>\n'
        f'<section class="card only-js" aria-live="polite"><h2 id="title"></h2><table>{now}</table>'
        '<p class="answer" id="answer"></p><p class="faint" id="agreement"></p></section></div>'
    )


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = "\n".join(
        f'<tr data-method="{escape(one["method"])}" data-keep="{escape(one["keep"])}"><td>{escape(one["label"])}</td>'
        f"<td>{escape(one['keep_label']) if one['method'] else 'all'}</td><td>{one['kept']}</td>"
        f"<td>{escape(one['prefill'])}</td><td>{escape(one['cache'])}</td>"
        f'<td class="answer">{escape(one["answer"])}</td>'
        f"<td>{escape(one['agreement']) if one['method'] else ''}</td></tr>"
        for one in entries
    )
    heads = "".join(
        f"<th>{name}</th>" for name in ("Method", "Keep", *(name for name, _ in _FIGURES), "Answer", "Agreement")
    )
    return (
        f'<p class="no-js">The switch and the slider need JavaScript; all figures are in the table.</p>\n'
        f'<details open><summary>All figures</summary><div class="scroll"><table><tr>{heads}</tr>\n{rows}</table></div>'
        "</details>"
    )
