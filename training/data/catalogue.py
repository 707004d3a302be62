"""What a tile stage leaves for people and for training: its tables and, last, `dataset.json`.

Written from receipts alone, in the order of names, so that the same receipts give the same bytes.
No torch here.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import openslide
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import features

from cytosyn_aug.config import config_digest
from cytosyn_aug.io.files import atomic_file, write_atomically
from training.data.cutting import CutUnit, Receipt, Scan, TileRecipe, part_file
from training.data.shards import DATASET_NAME, FORMAT_VERSION, TABLE_NAME, TILE_SCHEMA, file_sha256
from training.data.sources import Named, SlideListing, SlideSource
from training.data.splits import UNSEEN, Assignment, Member, count_by_split
from training.data.tile_folders import PROVENANCE

_SLIDE_COLUMNS = (
    *("slide", "status", "split", "project", "site", "patient", "mpp", "mpp_source"),
    *("num_candidates", "quota", "num_tiles", "num_unseen"),
    *("num_blank", "num_blurred", "num_failed"),
    *("shard_sha256", "unseen_sha256", "identity", "notes"),
)
_FAILURE_COLUMNS = ("slide", "x_level0", "y_level0", "error")


class Outcome(NamedTuple):
    """Everything a run has found and made; scans and receipts by slide."""

    listing: SlideListing
    recipe: TileRecipe
    splits: Assignment
    scans: Mapping[str, Scan]
    units: Sequence[CutUnit]
    receipts: Mapping[str, Receipt]


class TileSummary(NamedTuple):
    """What is in the folder: slides and tiles, and by name what is not."""

    num_slides: int
    num_tiles: int
    failures: tuple[Named, ...]


def publish(out: Path, outcome: Outcome) -> TileSummary:
    """Join the rows of all slides, write the tables and, last, `dataset.json`."""
    units = [unit for unit in outcome.units if outcome.receipts[unit.source.slide].digest]
    units.sort(key=lambda unit: (unit.split, unit.source.slide))
    _remove_other_shards(out, outcome, {name for u in units for name in u.shards().values()})
    _join_parts(out, units)
    failures = list(_failures(outcome))
    _write_csv(out / "failures.csv", _FAILURE_COLUMNS, failures)
    _write_csv(out / "slides.csv", _SLIDE_COLUMNS, _slide_rows(outcome))
    tables = (TABLE_NAME, "slides.csv", "failures.csv", *_keep_provenance(out, outcome.listing))
    splits = _counts(units, outcome)
    description = {
        "format": "cytosyn-aug tiles",
        "format_version": FORMAT_VERSION,
        "tile": asdict(outcome.recipe.tile),
        "codec": "webp, lossless",
        "recipe": asdict(outcome.recipe),
        "recipe_digest": config_digest(outcome.recipe),
        "software": tile_software(),
        "splits": splits,
        "divided_sites": outcome.splits.divided_sites,
        "num_failures": len(failures),
        "files": {name: file_sha256(out / name) for name in tables},
    }
    write_atomically(out / DATASET_NAME, json.dumps(description, indent=1).encode())
    named = tuple(
        Named(slide if x < 0 else f"{slide} tile {x}_{y}", error) for slide, x, y, error in failures
    )
    return TileSummary(len(units), sum(count["tiles"] for count in splits.values()), named)


def tile_software() -> dict[str, str | None]:
    """Return the versions that decide pixels and bytes."""
    return {
        "openslide": openslide.__library_version__,
        "pillow": PIL.__version__,
        "webp": features.version("webp"),
        "pyarrow": pa.__version__,
    }


def members(sources: Iterable[SlideSource]) -> list[Member]:
    """Return what splits know of slides."""
    return [Member(s.slide, s.patient, s.site, s.project) for s in sources]


def _remove_other_shards(out: Path, outcome: Outcome, current: set[str]) -> None:
    """Remove shards of these slides that an earlier run made and this one does not want."""
    for slide, split in outcome.splits.splits.items():
        for name in {f"{split}/{slide}.tar", f"{UNSEEN}/{slide}.tar"} - current:
            (out / name).unlink(missing_ok=True)


def _counts(units: Sequence[CutUnit], outcome: Outcome) -> dict[str, dict[str, int]]:
    """Return the number of slides, patients, sites and tiles of each split."""
    receipts, num_tiles = outcome.receipts, Counter[str]()
    for unit in units:
        receipt = receipts[unit.source.slide]
        num_tiles[unit.split] += receipt.num_tiles - receipt.num_unseen
        num_tiles[UNSEEN] += receipt.num_unseen
    divided = [unit.source for unit in units if receipts[unit.source.slide].num_unseen]
    counts = count_by_split(members(unit.source for unit in units), outcome.splits.splits)
    counts |= count_by_split(members(divided), {s.slide: UNSEEN for s in divided})
    return {split: count | {"tiles": num_tiles[split]} for split, count in counts.items()}


def _join_parts(out: Path, units: Sequence[CutUnit]) -> None:
    """Write the table of all tiles."""
    with atomic_file(out / TABLE_NAME) as stream, pq.ParquetWriter(stream, TILE_SCHEMA) as writer:
        for unit in units:
            part = part_file(out, unit.source.slide)
            writer.write_table(pq.read_table(part, schema=TILE_SCHEMA))


def _failures(outcome: Outcome) -> Iterator[tuple[str, int, int, str]]:
    """Yield what could not be had, in the order of names; corner -1, -1 is a whole slide."""
    rows: list[tuple[str, int, int, str]] = []
    rows += [(name, -1, -1, reason) for name, reason in outcome.listing.failed]
    for name, scan in outcome.scans.items():
        rows += [(name, -1, -1, fault) for fault in (scan.error, scan.damage) if fault]
    for name, receipt in outcome.receipts.items():
        rows += [(name, *failure) for failure in receipt.failures]
    yield from sorted(rows)


def _slide_rows(outcome: Outcome) -> list[tuple[object, ...]]:
    """Return one row per slide, those that were refused or failed included, by `_SLIDE_COLUMNS`."""
    quotas = {unit.source.slide: unit.quota for unit in outcome.units}
    rows = [_slide_row(outcome, source, quotas) for source in outcome.listing.sources]
    blank = ("",) * (len(_SLIDE_COLUMNS) - 3)
    rows += [(name, "refused", *blank, reason) for name, reason in outcome.listing.refused]
    rows += [(name, "failed", *blank, reason) for name, reason in outcome.listing.failed]
    return sorted(rows, key=lambda row: str(row[0]))


def _slide_row(
    outcome: Outcome, source: SlideSource, quotas: Mapping[str, int]
) -> tuple[object, ...]:
    scan = outcome.scans[source.slide]
    receipt = outcome.receipts.get(source.slide, Receipt(slide=source.slide))
    errors = [e for e in (scan.error, *(f.error for f in receipt.failures if f.x_level0 < 0)) if e]
    return (
        source.slide,
        "failed" if errors else "taken" if receipt.num_tiles else "no tiles",
        outcome.splits.splits[source.slide],
        source.project,
        source.site,
        source.patient,
        scan.mpp or "",
        scan.mpp_source,
        scan.num_candidates,
        quotas.get(source.slide, 0),
        receipt.num_tiles,
        receipt.num_unseen,
        receipt.rejected.get("blank", 0),
        receipt.rejected.get("blurred", 0),
        len(receipt.failures),
        receipt.sha256.get(outcome.splits.splits[source.slide], ""),
        receipt.sha256.get(UNSEEN, ""),
        scan.identity,
        "; ".join([*scan.notes, *filter(None, [scan.damage]), *errors]),
    )


def _keep_provenance(out: Path, listing: SlideListing) -> list[str]:
    """Copy the tables that came with given tiles; `source` in the table of tiles refers to them."""
    kept = []
    if listing.sources and listing.sources[0].tiles:
        for name in PROVENANCE:
            file = listing.sources[0].file / name
            if file.is_file():
                write_atomically(out / "provenance" / name, file.read_bytes())
                kept.append(f"provenance/{name}")
    return kept


def _write_csv(file: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerows([columns, *rows])
    write_atomically(file, stream.getvalue().encode())
