"""Tables of tiles: one path per row, and any of label, slide, x, y, mask, mpp, .csv or .parquet.

An empty cell says nothing: what a path says of slide, x and y is taken then. Other columns are left
out, which a note says.

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
import math
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import openslide
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cytosyn_aug.io.image_files import MAX_PIXELS, TILE_SUFFIXES
from cytosyn_aug.io.slide import SLIDE_SUFFIXES
from cytosyn_aug.runs.listing import Item, Listing, corner, make_listing, output_stem

EITHER_SUFFIXES = tuple(s for s in SLIDE_SUFFIXES if s in TILE_SUFFIXES)
_MAX_SLIDES = 65_536  # remembered, for tables whose rows go to and fro
_MAX_SHOWN = 20
_PATH_COLUMNS = ("path", "file", "filename", "image")
_TEXTS = ("label", "slide", "mask")
_NUMBERS = {"x": pa.int64(), "y": pa.int64(), "mpp": pa.float64()}
_MISSING = ["", "na", "n/a", "null", "none"]  # in place of a number


class _Columns(NamedTuple):
    """Cells of a table by column, paths under `path`, and notes on what was left out."""

    cells: dict[str, list[Any]]  # Any: strings, or numbers and None
    notes: tuple[str, ...]


def list_table(file: Path) -> Listing:
    """List the tiles of a table, in its order.

    Raises:
        ValueError: It cannot be read, or lacks a column of paths.
    """
    columns = _read_columns(file)
    return make_listing("table", file.parent, _items(file.parent, columns.cells), columns.notes)


def list_slide_table(file: Path, mpp: float | None = None) -> Listing:
    """List the slides of a table, whole, in its order; a mask is a tile's, and left out here.

    Args:
        file: Table with paths of slides, and any of label, slide, mpp.
        mpp: Scale of slides whose row states none.

    Raises:
        ValueError: It cannot be read, lacks a column of paths, or has places on slides.
    """
    columns = _read_columns(file, texts=("label", "slide"))
    if "x" in columns.cells or "y" in columns.cells:
        raise ValueError(f"{file} has x and y, expected whole slides; leave those columns out")
    items = _whole_slides(file.parent, columns.cells, mpp)
    return make_listing("slides", file.parent, items, columns.notes)


def _whole_slides(
    folder: Path,
    table: dict[str, list[Any]],  # Any: cells
    mpp: float | None,
) -> Iterator[Item]:
    for name, stem, cells in _rows(table):
        size, error = _size(folder / name)
        if os.path.splitext(name)[1].lower() not in SLIDE_SUFFIXES:
            error = error or f"is no slide, expected {', '.join(SLIDE_SUFFIXES)}"
        item = Item(name, stem, slide=stem, file=name, size=size, mpp=mpp, error=error)
        yield item._replace(**cells)


def _rows(
    table: dict[str, list[Any]],  # Any: cells
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each row's path, the stem of its results, and its other cells that are not empty."""
    absolute = {os.path.dirname(name) for name in table["path"] if os.path.isabs(name)}
    shared = os.path.commonpath(absolute) if absolute else ""
    for row, name in enumerate(table["path"]):
        stem = output_stem(os.path.relpath(name, shared) if os.path.isabs(name) else name)
        cells = {n: column[row] for n, column in table.items() if n != "path"}
        yield name, stem, {n: cell for n, cell in cells.items() if cell not in ("", None)}


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
        lacks = (
            "is a slide, and its row lacks x or y; give both, or --input slides to cut all of it"
        )
        return item._replace(error=error or lacks)
    return item._replace(stem=f"{stem}/{item.x}_{item.y}")


def _read_columns(file: Path, texts: tuple[str, ...] = _TEXTS) -> _Columns:
    """Return the columns of paths, of these texts and of numbers, and a note on the others.

    Names of columns count without regard to case and to blanks around them.
    """
    try:
        columns, table = _read_parquet(file) if _is_parquet(file) else _read_csv(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as a table: {error}; write it anew, a .csv in UTF-8"
        ) from error
    names = [_plain(name) for name in columns]
    path = next((name for name in _PATH_COLUMNS if name in names), None)
    if path is None:
        raise ValueError(
            f"{file} has columns {', '.join(columns)}, expected one of {', '.join(_PATH_COLUMNS)}"
        )
    used = [name for name in (path, *texts, *_NUMBERS) if name in names]
    twice = sorted({name for name in used if names.count(name) > 1})
    if twice:
        raise ValueError(f"{file} has several columns {', '.join(twice)}; leave one of each")
    table = table.rename_columns([_plain(name) for name in table.column_names])
    cells: dict[str, list[Any]] = {}  # Any: cells
    for name in used:
        try:
            kind = _NUMBERS.get(name)
            read = _texts(table[name]) if kind is None else _numbers(table[name], kind)
        except pa.ArrowException as error:
            raise ValueError(f"{file} has a bad cell in column {name}: {error}; mend it") from error
        cells["path" if name == path else name] = read
    others = [name for name in columns if _plain(name) not in ("", *used)]
    shown = ", ".join(others[:_MAX_SHOWN]) + ", ..." * (len(others) > _MAX_SHOWN)
    return _Columns(cells, (f"left out columns that have no meaning here: {shown}",) * bool(others))


def _plain(name: str) -> str:
    return name.strip().lower()


def _texts(column: pa.ChunkedArray) -> list[str]:
    texts: list[str] = pc.fill_null(column.cast(pa.string()), "").to_pylist()
    return texts


def _numbers(column: pa.ChunkedArray, kind: pa.DataType) -> list[Any]:  # Any: int or float
    """Return numbers of this kind, None where there is none; whole ones may come as floats."""
    if pa.types.is_integer(column.type):
        return list(column.cast(kind).to_pylist())
    if not pa.types.is_floating(column.type):
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        is_missing = pc.is_in(pc.utf8_lower(column), pa.array(_MISSING))
        column = pc.if_else(is_missing, pa.scalar(None, pa.string()), column)
    column = column.cast(pa.float64())
    column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    return list(column.cast(kind).to_pylist())


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _read_parquet(file: Path) -> tuple[list[str], pa.Table]:
    """Return the names of all columns, and those that are known: others may hold features."""
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        known = (*_PATH_COLUMNS, *_TEXTS, *_NUMBERS)
        return names, parquet.read(columns=[name for name in names if _plain(name) in known])


def _read_csv(file: Path) -> tuple[list[str], pa.Table]:
    """Read cells as they stand: "01" is no number. Excel separates by semicolons in some lands."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        line = stream.readline()
    delimiter = max(",;\t", key=line.count)
    header = next(csv.reader([line], delimiter=delimiter), [])
    table = pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
        ),
    )
    return table.column_names, table


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
            size_px: tuple[int, int] = slide.dimensions
    except openslide.OpenSlideError:
        return False
    return math.prod(size_px) > MAX_PIXELS


def _size(file: Path) -> tuple[int, str]:
    try:
        if file.is_dir():
            return -1, "is a folder, or its row has no path"
        return file.stat().st_size, ""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = "; write / for its \\" if "\\" in file.name else ""
        return -1, f"cannot be opened: {reason}{hint}"
