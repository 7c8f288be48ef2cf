"""One self-contained page of figures and tables: no network, readable on a phone, light and dark."""
from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #ffffff; --line: #d5d5d5; --soft: #f4f4f4; --warn: #fff4d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --page: #16181b; --line: #3b3f45; --soft: #22262b; --warn: #40361a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
figure { margin: 1rem 0 } img { display: block; width: 100%; height: auto; background: #fff; border-radius: .5rem }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap } thead { background: var(--soft) }
th:first-child, td:first-child { text-align: left } tr + tr { border-top: 1px solid var(--line) }
.warning { background: var(--warn); border-radius: .5rem; padding: .6rem .8rem; margin: .6rem 0 }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, figures (title, PNG bytes) and tables (header, rows)."""

    heading: str
    text: str
    figures: Sequence[tuple[str, bytes]] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]]]] = ()


def table_html(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is wider than the screen."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape('-' if cell is None else str(cell))}</td>" for cell in row)
                   + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure_html(title: str, png: bytes) -> str:
    """An inlined picture; its title is what a reader without eyes hears."""
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>'


def section_html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>", f"<p>{html.escape(section.text)}</p>",
             *(figure_html(*figure) for figure in section.figures), *(table_html(*table) for table in section.tables)]
    return "<section>" + "\n".join(parts) + "</section>"


def page(title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document."""
    notes = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{notes}"
            + "\n".join(section_html(section) for section in sections) + "</body></html>\n")
