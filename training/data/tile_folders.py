"""Folders of tiles that were cut elsewhere: `<split>/<slide>/<tile>`, `<slide>/<tile>` or flat.

A split that is there is kept, and so is what `slides.csv` and `tiles.csv` beside the tiles say.
No tile is opened here.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from training.data.sources import (
    GivenTile,
    Named,
    SlideListing,
    SlideSource,
    check_names,
    read_table,
    unmatched_rows,
    with_details,
)

TILE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff")
SPLIT_NAMES = ("train", "val", "test")
PROVENANCE = ("slides.csv", "tiles.csv")  # beside given tiles; kept as they are
_CORNER = re.compile(r"(?:(?P<slide>.+)_)?(?P<x>\d+)_(?P<y>\d+)")


def list_tiles(folder: Path, *, table: Path | None = None) -> SlideListing:
    """Find tiles cut elsewhere, with the provenance beside them.

    A flat folder is grouped by file names `<slide>_<x>_<y>`; if any name is not of that form, all
    of it counts as one slide, so that nothing can leak between splits.

    Args:
        folder: See the module. `tiles.csv` (file, x_level0, y_level0, extent_level0,
            tissue_fraction) and `slides.csv` are read if they are there.
        table: As for `list_slide_sources`; default: the folder's own `slides.csv`.

    Raises:
        ValueError: No tiles, or tables that contradict the folder.
    """
    own = folder / PROVENANCE[0]
    rows = read_table(table or own) if table or own.is_file() else {}
    facts = _tile_facts(folder / PROVENANCE[1])
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in TILE_SUFFIXES)
    files = [f for f in files if not f.name.startswith(".")]
    if not files:
        raise ValueError(f"no tiles under {folder}; expected <split>/<slide>/<x>_<y>.webp")
    names = {f: f.relative_to(folder).as_posix() for f in files}
    lost = sorted(set(facts) - set(names.values()))
    failed = [Named(name, "is listed in tiles.csv but is not there") for name in lost]
    is_flat = all(f.parent == folder for f in files)
    has_corners = is_flat and all(_corner(f.stem)[0] for f in files)
    groups: dict[tuple[str, str], list[GivenTile]] = defaultdict(list)
    for file in files:
        parts = names[file].split("/")
        slide = parts[-2] if len(parts) > 1 else folder.name
        if has_corners:
            slide = _corner(file.stem)[0]
        split = parts[0] if len(parts) == 3 and parts[0] in SPLIT_NAMES else ""
        groups[split, slide].append(_given_tile(file, names[file], facts))
    sources = [
        with_details(_tile_source(folder, slide, split, tiles), rows)
        for (split, slide), tiles in sorted(groups.items())
    ]
    check_names(sources)
    notes = unmatched_rows(rows, [s.slide for s in sources])
    if is_flat and not has_corners:
        notes += (f"no slide names in {folder}: all tiles count as one slide, in one split",)
    return SlideListing(tuple(sources), failed=tuple(failed), notes=notes)


def _tile_source(folder: Path, slide: str, split: str, tiles: list[GivenTile]) -> SlideSource:
    num_bytes = sum(tile.file.stat().st_size for tile in tiles)
    return SlideSource(
        slide=slide,
        file=folder,
        patient=slide,
        split=split,
        num_bytes=num_bytes,
        tiles=tuple(tiles),
    )


def _corner(stem: str) -> tuple[str, int, int]:
    match = _CORNER.fullmatch(stem)
    return (match["slide"] or "", int(match["x"]), int(match["y"])) if match else ("", 0, 0)


def _tile_facts(file: Path) -> dict[str, dict[str, str]]:
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if "file" not in (reader.fieldnames or ()):
            raise ValueError(f"{file} has columns {reader.fieldnames}, expected at least file")
        return {row["file"]: row for row in reader}


def _given_tile(file: Path, name: str, facts: Mapping[str, dict[str, str]]) -> GivenTile:
    row = facts.get(name, {})
    _, x, y = _corner(file.stem)
    try:
        return GivenTile(
            file,
            name,
            int(row.get("x_level0") or x),
            int(row.get("y_level0") or y),
            int(row.get("extent_level0") or 0),
            float(row.get("tissue_fraction") or "nan"),
        )
    except ValueError as error:
        raise ValueError(f"tiles.csv has a malformed row for {name}: {error}") from None
