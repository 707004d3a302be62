"""Tables of tiles: .csv or .parquet with a path a row, and any of label, slide, x, y, mask, mpp.

A path is that of a tile's image or, with x and y, of a slide: then the tile is cut there, with its
upper left corner at that pixel of level 0, whatever it shows. A .tif with x and y is a slide if it
is tiled, and a tile with a known place if not: files of both kinds have that name, and only their
headers are looked at. Paths are relative to the table's folder; results of absolute ones go by what
follows their common folder. An mpp is in microns per pixel: a slide's goes before what the slide
states; a tile's must be that of the run, which edits all tiles at one scale. No image is opened
here, and no torch.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import openslide
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cytosyn_aug.image_files import MAX_PIXELS, TILE_SUFFIXES
from cytosyn_aug.listing import Item, Listing, corner, make_listing, output_stem
from cytosyn_aug.slides import SLIDE_SUFFIXES

EITHER_SUFFIXES = tuple(s for s in SLIDE_SUFFIXES if s in TILE_SUFFIXES)
_MAX_SLIDES = 65_536  # remembered, for tables whose rows go to and fro
_PATH_COLUMNS = ("path", "file", "filename", "image")


def list_table(file: Path) -> Listing:
    """List the tiles of a table, in its order.

    Raises:
        ValueError: It cannot be read, or lacks a column of paths.
    """
    return make_listing("table", file.parent, _items(file.parent, _read_columns(file)))


def list_slide_table(file: Path, mpp: float | None = None) -> Listing:
    """List the slides of a table, whole, in its order.

    Args:
        file: Table with paths of slides, and any of label, slide, mpp.
        mpp: Scale of slides whose row states none.

    Raises:
        ValueError: It cannot be read, lacks a column of paths, or has places on slides.
    """
    table = _read_columns(file)
    if "x" in table or "y" in table:
        raise ValueError(f"{file} has x and y, expected whole slides; leave those columns out")
    return make_listing("slides", file.parent, _whole_slides(file.parent, table, mpp))


def _whole_slides(
    folder: Path,
    table: dict[str, list[Any]],  # Any: cells
    mpp: float | None,
) -> Iterator[Item]:
    for name, stem, cells in _rows(table):
        size, error = _size(folder / name)
        if os.path.splitext(name)[1].lower() not in SLIDE_SUFFIXES:
            error = f"is no slide, expected {', '.join(SLIDE_SUFFIXES)}"
        yield Item(
            name,
            stem,
            label=cells.get("label", ""),
            slide=cells.get("slide") or stem,
            file=name,
            size=size,
            mpp=mpp if cells.get("mpp") is None else cells["mpp"],
            error=error,
        )


def _rows(
    table: dict[str, list[Any]],  # Any: cells
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each row's path, the stem of its results, and its other cells."""
    absolute = {os.path.dirname(name) for name in table["path"] if os.path.isabs(name)}
    shared = os.path.commonpath(absolute) if absolute else ""
    for row, name in enumerate(table["path"]):
        stem = output_stem(os.path.relpath(name, shared) if os.path.isabs(name) else name)
        yield name, stem, {n: column[row] for n, column in table.items() if n != "path"}


def _items(folder: Path, table: dict[str, list[Any]]) -> Iterator[Item]:  # Any: cells
    sizes: dict[str, tuple[int, str]] = {}  # of slides, which come in many rows
    is_cut = lru_cache(_MAX_SLIDES)(partial(is_slide, has_place="x" in table))
    for name, stem, cells in _rows(table):
        if is_cut(folder / name):
            if name not in sizes:
                sizes[name] = _size(folder / name)
            yield _slide_item(name, stem, cells, *sizes[name])
            continue
        slide, x, y = corner(name)
        size, error = _size(folder / name)
        item = Item(name, stem, slide=slide, x=x, y=y, size=size, error=error)._replace(**cells)
        if item.mask and not error and not (folder / item.mask).is_file():
            item = item._replace(error=f"has a mask that is not there: {item.mask}")
        yield item


def _slide_item(name: str, stem: str, cells: dict[str, Any], size: int, error: str) -> Item:
    item = Item(name, slide=stem, file=name, size=size, error=error)._replace(**cells)
    if item.x is None or item.y is None:
        return item._replace(error=error or "is a slide, and its row lacks x or y")
    return item._replace(stem=f"{stem}/{item.x}_{item.y}")


def _read_columns(file: Path) -> dict[str, list[Any]]:  # Any: cells
    """Return the columns that are known, paths under `path`, as strings or whole numbers."""
    try:
        table = pq.read_table(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
        twice = sorted({n for n in table.column_names if table.column_names.count(n) > 1})
        if twice:
            raise ValueError(f"{file} has several columns {', '.join(twice)}; leave one of each")
        path = next((n for n in _PATH_COLUMNS if n in table.column_names), None)
        if path is None:
            raise ValueError(
                f"{file} has columns {', '.join(table.column_names)}, expected one of "
                f"{', '.join(_PATH_COLUMNS)}"
            )
        columns = {"path": pc.fill_null(table[path].cast(pa.string()), "").to_pylist()}
        for name in ("label", "slide", "mask"):
            if name in table.column_names:
                columns[name] = pc.fill_null(table[name].cast(pa.string()), "").to_pylist()
        for name in ("x", "y"):
            if name in table.column_names:
                columns[name] = table[name].cast(pa.int64()).to_pylist()
        if "mpp" in table.column_names:
            columns["mpp"] = table["mpp"].cast(pa.float64()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as a table: {error}; write it anew") from error
    return columns


def _read_csv(file: Path) -> pa.Table:
    """Read names and labels as they stand: "01" is no number."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        header = next(csv.reader(stream), [])
    texts = {n: pa.string() for n in header if n not in ("x", "y", "mpp")}
    return pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
    )


def is_slide(file: Path, *, has_place: bool) -> bool:
    """Return whether a file in a table is a slide, and not the image of a tile.

    Args:
        file: Its path; need not exist.
        has_place: Whether the table says x and y, without which a TIFF is a tile.
    """
    suffix = file.suffix.lower()
    if suffix not in EITHER_SUFFIXES:
        return suffix in SLIDE_SUFFIXES
    # OpenSlide takes any TIFF for a slide that is stored in tiles.
    return has_place and openslide.OpenSlide.detect_format(file) is not None


def looks_like_slide(file: Path) -> bool:
    """Return whether a TIFF is stored in tiles, and larger than a tile may be."""
    if openslide.OpenSlide.detect_format(file) is None:
        return False
    try:
        with openslide.OpenSlide(file) as slide:
            width, height = slide.dimensions
    except openslide.OpenSlideError:
        return False
    return width * height > MAX_PIXELS


def _size(file: Path) -> tuple[int, str]:
    try:
        return file.stat().st_size, ""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return -1, f"cannot be opened: {reason}"
