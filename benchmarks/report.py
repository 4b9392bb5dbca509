"""report.html: the picture and all figures in one file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from . import table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e22; background: #fafaf8; margin: 2rem auto; max-width: 84rem;
       padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p { max-width: 62rem }
svg { width: 100%; height: auto; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e4e6ea; vertical-align: top }
th { border-bottom: 1px solid #8a8f99 } tr.ours { font-weight: 600 } .scroll { overflow-x: auto }
"""


def html(found: dict[str, Any], svg: bytes) -> str:
    rows = found["rows"]
    sections = [
        ("Latency", table.COLUMNS, [cells for row in rows for cells in table.rows_of(row)]),
        ("Ratios that were wanted", table.GOALS, table.goals(rows)),
        ("What pruning saves in the LLM (arithmetic)", table.SAVINGS, table.savings(rows)),
        ("Memory", table.MEMORY, table.memory(rows)),
    ]
    body = [_section(title, columns, list(cells)) for title, columns, cells in sections]
    lines = [f"<li>{escape(line)}</li>" for line in table.problems(rows)]
    problems = f"<h2>Not timed</h2><ul>{''.join(lines)}</ul>" if lines else ""
    legend = "".join(f"<p>{escape(line)}</p>" for line in table.LEGEND)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>flashprune bench</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        f"<h1>Selection latency against token count</h1>\n<p>{escape(table.heading(found))}</p>\n{inline(svg)}\n"
        f"{legend}{''.join(body)}{problems}\n</body></html>\n"
    )


def inline(svg: bytes) -> str:
    """The picture without what only a file of its own may begin with."""
    text = svg.decode()
    return text[text.index("<svg") :]


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr{' class=ours' if 'flashprune' in row else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<h2>{escape(title)}</h2>\n<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n'
