"""Rendering of pages from the templates in `templates/`: one HTML file that holds all it shows.

Every value is escaped, and characters that do not print, or turn the direction of text, are shown
as their codes. A page asks nothing of a network and runs no script, and says so to the browser,
which then refuses both even to what would slip in with a name.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

PICTURE_PX = 224
_JPEG_QUALITY = 90


def render(template: str, **values: object) -> Markup:
    """Return a template filled with values, whose last line break is left out.

    Args:
        template: Path of a file in `templates/`.
        values: Variables of the template; what is no `Markup` is escaped.
    """
    return Markup(ENVIRONMENT.get_template(template).render(values))


def render_page(
    title: str,
    sections: Iterable[tuple[str, Markup]],
    template: str = "page.html.j2",
    **values: object,
) -> str:
    """Return a whole page.

    Args:
        title: Title of the page.
        sections: Title and content of each section; those without content are left out.
        template: Page template, which extends `page.html.j2`.
        values: More variables of the template.
    """
    shown = [(name, content) for name, content in sections if content]
    return f"{render(template, title=title, sections=shown, **values)}\n"


class EmbeddedImage(NamedTuple):
    """An image as part of a page, or why there is none.

    Attributes:
        uri: JPEG whose colour has full resolution, as a data URI; "" if there is none.
        width_px: Width at which it is shown.
        height_px: Height at which it is shown.
        problem: Half a sentence; "" with an image.
    """

    uri: str
    width_px: int
    height_px: int
    problem: str


def embed(
    pixels: np.ndarray | None, problem: str = "not at hand", side_px: int = PICTURE_PX
) -> EmbeddedImage:
    """Return an image in the form in which a page holds it.

    Args:
        pixels: uint8 [H, W, 3]; None if there is no image.
        problem: Why there is none.
        side_px: Larger images are reduced until their longer side is this.
    """
    if pixels is None:
        return EmbeddedImage("", 0, 0, problem)
    image = Image.fromarray(pixels)
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    content = base64.b64encode(stream.getvalue()).decode()
    return EmbeddedImage(f"data:image/jpeg;base64,{content}", image.width, image.height, "")


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


def own_version() -> str:
    """Return the version of this package, or that it is not installed."""
    try:
        return version("cytosyn-aug")
    except PackageNotFoundError:
        return "from a checkout"


def printable(value: object) -> str:
    r"""Return text with what does not print as its code: a line break as `\n`.

    `Markup` is returned as it is: its line breaks are those of a template.
    """
    text = value if isinstance(value, str) else str(value)
    if isinstance(text, Markup) or text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(name: str, most: int = 44) -> str:
    """Return a name that fits, its middle left out."""
    if len(name) <= most:
        return name
    head = most // 3
    return f"{name[:head]}...{name[head + 3 - most :]}"


def number_columns(rows: Sequence[Sequence[object]], first_is_name: bool) -> list[bool]:
    """Return whether each column of a table holds numbers, which stand right.

    Args:
        rows: Cells of the table.
        first_is_name: Whether the first column holds names, although they may look like numbers.
    """
    are_numbers = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
    return [False, *are_numbers[1:]] if first_is_name else are_numbers


def _is_number(cell: object) -> bool:
    if cell is None:
        return True
    text = str(cell)
    return text.strip("-+%.,0123456789e") == "" and any(c.isdigit() for c in text)


def _anchor(title: str) -> str:
    """Return the name of a section, which the list of contents leads to."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=printable,
)
ENVIRONMENT.filters |= {
    "anchor": _anchor,
    "number_columns": number_columns,
    "printable": printable,
    "shortened": shortened,
    "px": "{:.1f}".format,
    "rounded": "{:,.{}f}".format,
}
