"""Work list of a run: one row per tile, with the name of its results. No pixels, no torch.

A listing is a table in memory, about 150 bytes per tile (600 while it is built), so that work units
are slices of it. Rows that cannot be used are known by their `error` and stay in it: they are named
in the manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from cytosyn_aug.io.image_files import MASK_END

ListingKind = Literal["tree", "table", "shards", "slides", "numbers"]

_CODED = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("stem", pa.string()),
        ("label", _CODED),
        ("slide", _CODED),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("mpp", pa.float64()),
        ("file", _CODED),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("mask", pa.string()),
        ("mask_offset", pa.int64()),
        ("mask_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("error", _CODED),
    ]
)
# What makes an input the same one: not where it lies, and not what its files hold.
_IDENTITY = ("name", "label", "slide", "x", "y", "mpp", "mask")
_BLOCK_ROWS = 65_536
_MAX_SHOWN = 20
_MAX_NAME_BYTES = 230  # of 255 that file systems allow: variant, process and suffix are added
_CORNER = re.compile(r"(?:(?P<slide>.+)_)?(?P<x>\d{1,9})_(?P<y>\d{1,9})")


class Item(NamedTuple):
    """One tile to be worked on.

    Attributes:
        name: What it is called in the manifest: its path in the input.
        stem: Path of its results without suffix, relative to the output; in a listing "" for what
            can have none of its own, so that nobody removes another's.
        label: Class, "" for none.
        slide: Slide, "" if not known.
        x: Column of its corner, as given; None if not known.
        y: Row of its corner.
        file: File that holds it, if that is not `name`: a tar file or a slide.
        offset: Of its bytes in a tar file, else -1.
        size: Its bytes, -1 if not known.
        mask: Path of the mask beside it, "" for none.
        mask_offset: Of the mask's bytes in a tar file, else -1.
        mask_size: The mask's bytes.
        json_offset: Of the bytes of a .json beside it in a tar file, else -1.
        json_size: Those bytes.
        mpp: Microns per pixel, of the slide if there is one; None for what it states.
        error: Why it cannot be used, "" if it can.
    """

    name: str
    stem: str = ""
    label: str = ""
    slide: str = ""
    x: int | None = None
    y: int | None = None
    file: str = ""
    offset: int = -1
    size: int = -1
    mask: str = ""
    mask_offset: int = -1
    mask_size: int = -1
    json_offset: int = -1
    json_size: int = -1
    mpp: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """All tiles of an input, in the order of work.

    Attributes:
        kind: What the input is.
        root: Folder that names are relative to.
        table: Rows of `SCHEMA`.
        notes: Remarks on what was left out, as sentences.
    """

    kind: ListingKind
    root: Path
    table: pa.Table
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def items(self, start: int, stop: int) -> list[Item]:
        """Return the tiles from `start` up to `stop`."""
        rows = self.table.slice(start, stop - start).to_pylist()
        return [Item(**row) for row in rows]

    def identity(self) -> dict[str, Any]:  # Any: JSON
        """Return what a run records of its input: kind, number of tiles, SHA-256 of all names."""
        digest = hashlib.sha256()
        for row in self._rows(_IDENTITY):
            digest.update(repr(row).encode())
        return {"kind": self.kind, "num_tiles": len(self), "names_sha256": digest.hexdigest()}

    def digest(self, start: int, stop: int) -> str:
        """Return 16 digits that change with anything known of the tiles in a range."""
        part = self.table.slice(start, stop - start).drop_columns(["file"])
        text = repr([tuple(row.values()) for row in part.to_pylist()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_cut(self) -> bool:
        """Return whether tiles are cut from slides, and so come at a model's scale."""
        return self.kind == "slides" or (
            self.kind == "table" and any(file != "" for (file,) in self._rows(("file",)))
        )

    def num_masks(self) -> int:
        """Return how many tiles have a mask."""
        return sum(mask != "" for (mask,) in self._rows(("mask",)))

    def num_errors(self) -> int:
        """Return how many tiles cannot be used."""
        return sum(error != "" for (error,) in self._rows(("error",)))

    def _rows(self, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:  # Any: cells
        for batch in self.table.select(list(columns)).to_batches(max_chunksize=_BLOCK_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def make_listing(
    kind: ListingKind, root: Path, items: Iterable[Item], notes: tuple[str, ...] = ()
) -> Listing:
    """Put items into a listing, after making sure that each result has a name of its own."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    tables = []
    for item in _distinct(items):
        for name, value in item._asdict().items():
            columns[name].append(value)
        if len(columns["name"]) == _BLOCK_ROWS:
            tables.append(pa.table(columns, schema=SCHEMA))
            columns = {name: [] for name in SCHEMA.names}
    tables.append(pa.table(columns, schema=SCHEMA))
    return Listing(
        kind=kind, root=root, table=pa.concat_tables(tables).unify_dictionaries(), notes=notes
    )


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    """Give items their stems; what has no usable or no distinct one becomes an error without."""
    first: dict[bytes, str] = {}
    for item in items:
        name = escape_undecodable(item.name)
        stem = item.stem or output_stem(name)
        problem = _name_problem(item.name, stem) or _claim(first, stem, name)
        if item.mask:
            problem = problem or _claim(first, f"{stem}{MASK_END}", f"the mask of {name}")
        yield item._replace(
            name=name,
            stem="" if problem else stem,
            label=escape_undecodable(item.label),
            slide=escape_undecodable(item.slide),
            file=escape_undecodable(item.file),
            mask=escape_undecodable(item.mask),
            error=escape_undecodable(item.error or problem),
        )


def _name_problem(name: str, stem: str) -> str:
    if escape_undecodable(name) != name:
        return "has a name that is not UTF-8; rename it"
    if max(len(part.encode()) for part in stem.split("/")) > _MAX_NAME_BYTES:
        return f"has a name of more than {_MAX_NAME_BYTES} bytes; shorten it"
    if any(part.startswith(".") for part in stem.split("/")):
        return "has a hidden name; rename it, or its folder"
    return ""


def _claim(first: dict[bytes, str], stem: str, name: str) -> str:
    """Note who writes under a stem; return what is wrong with a second one."""
    key = stem.replace("%2E", ".")  # as `TarOutput` writes names into tar shards
    other = first.setdefault(hashlib.blake2b(key.encode(), digest_size=16).digest(), name)
    if other is name:
        return ""
    if other == name:
        return "is listed twice"
    return f"would be written under the same name as {other}; rename one"


def output_stem(name: str) -> str:
    """Return where results of a tile go: its own path without suffix, never outside of a folder."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    stem = "/".join(parts)
    head, dot, suffix = stem.rpartition(".")
    return head if dot and head and not head.endswith("/") and "/" not in suffix else stem


def corner(name: str) -> tuple[str, int | None, int | None]:
    """Return slide, x and y as a path says them: `<slide>/<x>_<y>.png` or `<slide>_<x>_<y>.png`."""
    folder, _, last = output_stem(name).rpartition("/")
    match = _CORNER.fullmatch(last)
    if match is None:
        return "", None, None
    slide = match["slide"] or folder.rpartition("/")[2]
    return slide, int(match["x"]), int(match["y"])


def left_out(others: Mapping[str, int]) -> tuple[str, ...]:
    """Return the note on files that are not used, from how many there are of each suffix."""
    if not others:
        return ()
    shown = [
        f"{n} {escape_undecodable(kind) or 'without suffix'}" for kind, n in sorted(others.items())
    ]
    if len(shown) > _MAX_SHOWN:
        shown[_MAX_SHOWN:] = [f"and {len(shown) - _MAX_SHOWN} more kinds"]
    return (f"left out files that are no tiles: {', '.join(shown)}",)


def escape_undecodable(name: str) -> str:
    """Return a file name with bytes that are not UTF-8 as escapes, which tables can hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
