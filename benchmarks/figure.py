"""Latency against token count: one panel an op, log–log, a line a backend and peer, with the floor drawn in."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .race import OURS, PRODUCTS

COLUMNS = 3
OURS_COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#7f8c8d")
PEER_COLOURS = ("#1f6fb4", "#2a9d5c", "#17a2a8", "#9a7d0a", "#5b5ea6")
INK, FAINT = "#1c1e22", "#8a8f99"
FLOOR, READ = "floor: every token × every pick, or reading once", "reading the inputs once"
PREFILL = "1 % of a 7B model's prefill (arithmetic)"
YARDSTICKS = (FLOOR, READ, PREFILL)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flashprune",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def panels(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each op the rows that differ in N alone: of all such groups the one with the most sizes."""
    groups: dict[str, dict[tuple, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        case = row["case"]
        if row["floor"] and any(variant["status"] == "timed" for variant in row["variants"]):
            key = (case["d"], round(case["k"] / case["n"], 2), case["images"], case["data"], case["dtype"])
            groups[case["op"]][key].setdefault(case["n"], row)
    largest = {op: max(found.values(), key=len) for op, found in groups.items()}
    return {op: [found[n] for n in sorted(found)] for op, found in largest.items()}


def draw(found: dict[str, Any]) -> tuple[bytes, bytes]:
    """The picture as PNG and as SVG."""
    drawn = panels(found["rows"])
    with rc_context(STYLE):
        count = max(1, len(drawn))
        columns = min(COLUMNS, count)
        lines = -(-count // columns)
        picture = Figure(figsize=(4.4 * columns + 0.4, 3.9 * lines + 0.7), layout="constrained")
        axes = picture.subplots(lines, columns, squeeze=False).flatten()
        for (op, rows), panel in zip(drawn.items(), axes, strict=False):
            _panel(panel, op, rows)
        for spare in axes[len(drawn) :]:
            spare.set_axis_off()
        if not drawn:
            axes[0].text(0.5, 0.5, "nothing was timed", ha="center", color=FAINT)
        facts = found["machine"]
        device = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
        _legend_of_lines(picture, list(axes[: len(drawn)]))
        picture.suptitle(
            f"Selection latency against token count · {device} · torch {facts['torch']} · {facts['date']}, commit "
            f"{facts['commit']}",
            fontsize=10, color=INK,
        )  # fmt: skip
        return _saved(picture, "png", dpi=110), _saved(picture, "svg", metadata={"Date": None})


def _panel(axes: Axes, op: str, rows: list[dict[str, Any]]) -> None:
    case = rows[0]["case"]
    names = list(dict.fromkeys(v["name"] for row in rows for v in row["variants"] if v["kind"] != "yardstick"))
    ours = [name for name in names if name.startswith(OURS)]
    peers = [name for name in names if name not in ours]
    colours = {**dict(zip(ours, OURS_COLOURS * 2, strict=False)), **dict(zip(peers, PEER_COLOURS * 2, strict=False))}
    for name in [*peers, *ours]:
        points = [(row["case"]["n"], v["seconds"]) for row in rows for v in row["variants"] if _is(v, name)]
        if not points:
            continue
        tokens = [n for n, _ in points]
        middle = [1e3 * median(seconds) for _, seconds in points]
        low = [1e3 * min(seconds) for _, seconds in points]
        high = [1e3 * max(seconds) for _, seconds in points]
        label = f"{OURS} {rows[0]['backend']}" if name == OURS else name
        wide = name in ours
        axes.plot(tokens, middle, marker="o", ms=4 if wide else 3, lw=2.2 if wide else 1.3, color=colours[name],
                  label=label, zorder=3 if wide else 2)  # fmt: skip
        axes.fill_between(tokens, low, high, color=colours[name], alpha=0.15, lw=0)
    _lines(axes, rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [row["case"]["n"] for row in rows]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30 if len(ticks) > 4 else 0)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens N")
    axes.set_ylabel("ms")
    heads = f"{case['heads']} heads of {case['d']}" if case["heads"] > 1 else f"D = {case['d']}"
    images = f", {case['images']} images" if case["images"] > 1 else ""
    heads = "scores" if case["op"] == "topk" else heads
    share = "" if case["heads"] > 1 else f", K = {case['k'] / case['n']:.0%} of N"
    axes.set_title(f"{op}: {heads}{share}{images}, {case['dtype']}", fontsize=9.5, color=INK, loc="left")
    axes.grid(True, which="major", color="#e4e6ea", lw=0.6)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.12)  # room for the names
    lines, labels = axes.get_legend_handles_labels()
    own = [(line, label) for line, label in zip(lines, labels, strict=True) if label not in YARDSTICKS]
    axes.legend(*zip(*own, strict=True), fontsize=7.5, loc="upper left", edgecolor="none", framealpha=0.85)


def _legend_of_lines(picture: Figure, panels: list[Axes]) -> None:
    """What all panels share, once, below them."""
    found = {}
    for panel in panels:
        found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    shared = {label: found[label] for label in YARDSTICKS if label in found}
    if shared:
        picture.legend(list(shared.values()), list(shared), loc="outside lower center", ncols=3, frameon=False)


def _lines(axes: Axes, rows: list[dict[str, Any]]) -> None:
    tokens = [row["case"]["n"] for row in rows]
    floor = [1e3 * row["floor"]["seconds"] for row in rows]
    read = [1e3 * (row["floor"]["read"] + row["floor"]["launch"]) for row in rows]
    axes.plot(tokens, floor, ls="--", lw=1.2, marker="_", color=INK, label=FLOOR)
    if any(row["floor"]["products"] > row["floor"]["read"] for row in rows):
        axes.plot(tokens, read, ls=":", lw=1, marker="_", color=INK, label=READ)
    if all("prefill" in row["floor"] for row in rows):
        prefill = [10 * row["floor"]["prefill"] for row in rows]
        axes.plot(tokens, prefill, ls="-.", lw=1, marker="_", color=FAINT, label=PREFILL)


def _is(variant: dict[str, Any], name: str) -> bool:
    return variant["name"] == name and variant["status"] == "timed" and name != PRODUCTS


def _saved(picture: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
