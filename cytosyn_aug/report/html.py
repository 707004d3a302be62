"""One HTML file that holds all it shows: text, tables, pictures and plots, on screen and on paper.

It asks nothing of a network and runs no script, and says so to the browser, which then refuses both
even to what would slip in with a name. Whatever is no `Html` yet is escaped; characters that do not
print, or turn the direction of text, are shown as their codes.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

PICTURE_PX = 224
_JPEG_QUALITY = 90
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Return anything as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def printable(text: str) -> str:
    r"""Return text with what does not print as its code: a line break as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(name: str, most: int = 44) -> Html:
    """Return a name that fits, its middle left out; all of it shows when pointed at."""
    name = printable(name)
    if len(name) <= most:
        return Html(html.escape(name))
    head = most // 3
    short = f"{name[:head]}...{name[head + 3 - most :]}"
    return Html(f'<span title="{html.escape(name, quote=True)}">{html.escape(short)}</span>')


def paragraph(text: object, kind: str = "") -> Html:
    """Return a paragraph, with a class of the style sheet."""
    return Html(f"<p{_kind(kind)}>{escaped(text)}</p>")


def heading(text: object) -> Html:
    """Return a heading inside of a section."""
    return Html(f"<h3>{escaped(text)}</h3>")


def code(value: object) -> Html:
    """Return something that is meant letter by letter."""
    return Html(f"<code>{escaped(value)}</code>")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """Return a table; None becomes a dash, and columns of numbers stand right."""
    rows = list(rows)
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    is_right = [all(map(_is_number, column)) for column in columns]
    head = _row(header, is_right, "th")
    body = "".join(_row(row, is_right, "td") for row in rows)
    return Html(
        f'<div class="wide"><table{_kind(kind)}><thead>{head}</thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def picture(pixels: np.ndarray, alt: str, side_px: int = PICTURE_PX) -> Html:
    """Return an image, embedded as JPEG whose colour has full resolution.

    Args:
        pixels: uint8 [H, W, 3].
        alt: What it shows, read out instead.
        side_px: Larger images are reduced until their longer side is this.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    content = base64.b64encode(stream.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    label = html.escape(printable(alt), quote=True)
    return Html(f'<img {size} alt="{label}" src="data:image/jpeg;base64,{content}">')


def missing(reason: str) -> Html:
    """Return what stands where there is no picture."""
    return Html(f'<div class="missing"><span>{escaped(reason)}</span></div>')


def figure(content: object, caption: object, kind: str = "") -> Html:
    """Return something with a caption, kept on one page of paper."""
    return Html(
        f"<figure{_kind(kind)}>{escaped(content)}<figcaption>{escaped(caption)}</figcaption>"
        "</figure>"
    )


def group(parts: Iterable[object], kind: str) -> Html:
    """Return parts in one box of a class of the style sheet."""
    return Html(f"<div{_kind(kind)}>{joined(parts)}</div>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Return parts one after the other."""
    return Html(between.join(map(escaped, parts)))


def section(title: str, parts: Iterable[object]) -> Html:
    """Return a section with a heading that the list of contents leads to."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return Html(f'<section id="{name}"><h2>{escaped(title)}</h2>{joined(parts)}</section>')


def whole_page(title: str, opening: Iterable[object], sections: Sequence[tuple[str, Html]]) -> str:
    """Return a page.

    Args:
        title: Of the page.
        opening: What stands before the sections.
        sections: Title and content of each; those without content are left out.
    """
    present = [(name, content) for name, content in sections if content]
    made = [section(name, [content]) for name, content in present]
    links = "".join(
        f'<a href="#{part.split(chr(34))[1]}">{escaped(name)}</a>'
        for (name, _), part in zip(present, made, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escaped(title)}</h1>{joined(opening)}<nav>{links}</nav></header>"
        f"<main>{joined(made)}</main></body></html>\n"
    )


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, str]]:  # Any: JSON
    """Yield what nested settings say, each under its path: `recipe.edit.steps`."""
    if isinstance(value, dict):
        for key in value:
            yield from flattened(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        for number, entry in enumerate(value):
            yield from flattened(entry, f"{path}[{number}]")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _row(cells: Sequence[object], is_right: Sequence[bool], tag: str) -> str:
    made = []
    for cell, right in zip(cells, is_right, strict=True):
        text = "-" if cell is None else escaped(cell)
        made.append(f"<{tag}{_kind('number' if right else '')}>{text}</{tag}>")
    return f"<tr>{''.join(made)}</tr>"


def _is_number(cell: object) -> bool:
    if cell is None:
        return True
    text = str(cell)
    is_plain = not isinstance(cell, Html) and text.strip("-+%.,0123456789e") == ""
    return is_plain and any(c.isdigit() for c in text)


def _kind(name: str) -> str:
    return f' class="{name}"' if name else ""


_STYLE = """
:root{--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--paper:#fff;--tint:#f6f5f8;--brand:#6d3b7d}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
color:var(--ink);background:var(--paper);max-width:78rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem;padding-top:.7rem;border-top:2px solid var(--brand)}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.35rem 0;max-width:60rem;overflow-wrap:anywhere}
.lead{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0 0;font-size:.9rem}
nav a{color:var(--brand)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.4rem,1fr));gap:.6rem;
margin:1rem 0}
.card{background:var(--tint);border-radius:.5rem;padding:.55rem .75rem}
.card b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.82rem}
.note{border-left:4px solid #b38600;background:#fdf8ea;padding:.45rem .8rem;margin:.4rem 0;
max-width:none}
.bad{border-color:#b91c1c;background:#fdf0ef}
.good{border-color:#15803d;background:#effaf2}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1rem 1.1rem;
margin:.8rem 0}
.grid.single{grid-template-columns:repeat(auto-fill,minmax(10rem,1fr))}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:.5rem 1rem;
align-items:center;margin:.4rem 0}
figure{margin:0;break-inside:avoid}
figcaption{font-size:.82rem;line-height:1.4;color:var(--soft);margin-top:.25rem;
overflow-wrap:anywhere}
figcaption b{color:var(--ink);font-weight:600}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:3px}
.pair img,.single img,.matrix img{width:100%;height:auto;display:block;border-radius:2px}
.missing{display:flex;align-items:center;justify-content:center;aspect-ratio:1;padding:.5rem;
background:var(--tint);color:var(--soft);font-size:.8rem;text-align:center;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.88rem;max-width:100%}
th,td{padding:.28rem .9rem .28rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:600}
th{overflow-wrap:break-word}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums}
td.number{white-space:nowrap}
td:first-child{min-width:7rem}
tr{break-inside:avoid}
thead{display:table-header-group}
.matrix{table-layout:fixed;width:100%;min-width:calc(var(--columns)*6.5rem);
max-width:calc(var(--columns)*13.5rem)}
.columns-2{--columns:2}.columns-3{--columns:3}.columns-4{--columns:4}.columns-5{--columns:5}.columns-6{--columns:6}.columns-7{--columns:7}
.matrix td,.matrix th{padding:0 .35rem .5rem 0;border:0}
.matrix small{display:block;color:var(--soft);line-height:1.35}
.plot{width:100%;height:auto;font:13px system-ui,sans-serif;display:block}
.plot text{fill:#4b5563}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.85rem}
.legend span{display:inline-flex;align-items:center;gap:.4rem}
.swatch{display:inline-block;width:2.6rem;height:1.1rem;border-radius:3px;vertical-align:-.2rem}
code{font:.85em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media print{
@page{size:A4;margin:13mm 12mm}
body{font-size:11.5px;max-width:none;padding:0;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
nav{display:none}
h2{break-after:avoid;margin-top:1.4rem}
h3,.lead,.legend{break-after:avoid}
.wide{overflow:visible}
.matrix{min-width:0;max-width:calc(var(--columns)*2.7cm)}
.matrix thead{display:table-row-group}
.grid{grid-template-columns:repeat(3,1fr);gap:.6rem}
.grid.single{grid-template-columns:repeat(6,1fr)}
.plots{grid-template-columns:repeat(4,1fr);gap:.3rem;break-inside:avoid}
.cards{grid-template-columns:repeat(5,1fr)}
}
"""
