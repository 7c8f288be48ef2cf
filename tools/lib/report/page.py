"""One self-contained page of figures and tables: no network, readable on a phone, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from lib.plots import DARK, LIGHT, Theme

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # header, rows


def variables(theme: Theme) -> str:
    """A theme as the page's variables; the colour that shows that a table goes on is its ink, thinned."""
    return (
        f"--ink: {theme.ink}; --page: {theme.page}; --line: {theme.line}; --soft: {theme.soft}; "
        f"--warn: {theme.warn}; --more: {theme.ink}66"
    )


# A table that is wider than the screen scrolls by itself: a shadow stands at the side where it goes on (two covers
# that move with the content hide it at the ends), and its scroll bar stays.
STYLE = (
    f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.2rem 0 0 }
p { max-width: 46rem } .opening { font-size: 1.1rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem }
figure { margin: 0; max-width: 32rem } img { display: block; width: 100%; height: auto }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0;
  scrollbar-width: thin; scrollbar-color: var(--more) transparent;
  background: linear-gradient(90deg, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(90deg, var(--more), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(270deg, var(--more), transparent) right / 1rem 100% no-repeat scroll, var(--page) }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap }
thead tr { border-bottom: 2px solid var(--line) }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem }
tr + tr { border-top: 1px solid var(--line) }
.warning { background: var(--warn); border-radius: .5rem; padding: .6rem .8rem; margin: .6rem 0 }
"""
)


@dataclass(frozen=True)
class Picture:
    """A figure as PNG in both themes; its title is what a reader without eyes hears."""

    title: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Section:
    """A heading, a text, pictures and tables."""

    heading: str
    text: str
    pictures: Sequence[Picture]
    tables: Sequence[Table] = ()


def table_html(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is wider than the screen, with the keyboard as well."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape('-' if cell is None else str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture_html(picture: Picture) -> str:
    """An inlined picture, the dark one where the reader's screen is dark."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.light, picture.dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(picture.title)}" src="{light}"></picture></figure>'
    )


def section_html(section: Section) -> str:
    parts = [
        f"<h2>{html.escape(section.heading)}</h2>",
        f"<p>{html.escape(section.text)}</p>",
        f'<div class="figures">{"".join(map(picture_html, section.pictures))}</div>',
        *(table_html(*table) for table in section.tables),
    ]
    return "<section>" + "\n".join(parts) + "</section>"


def page(title: str, opening: Sequence[str], warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document; warnings come before everything that they are about."""
    lines = [f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings]
    lines += [f'<p class="opening">{html.escape(line)}</p>' for line in opening]
    lines += map(section_html, sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>" + "\n".join(lines) + "</body></html>\n"
    )
