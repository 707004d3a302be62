"""What the tile stage starts from: slides, and what names and tables say of them.

Everything found is accepted, refused by a rule (named, with the rule) or failed (named, with the
fault); nothing is passed over. A slide that is known but cannot be had, such as one that was not
downloaded, is a source with a fault: it has its split, so mending it later moves no other slide. No
slide is opened here.

Slides come from a folder, or from a GDC manifest and the folder it was downloaded to. A table adds
what file names do not say: `slide` and any of patient, site, project, split, mpp; or a GDC sample
sheet. Tiles cut elsewhere are a source too; `training.data.tile_folders` lists them.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cytosyn_aug.io.slide import SLIDE_SUFFIXES
from training.data.splits import UNSEEN
from training.data.tcga import SECTIONS, parse_barcode, patient_and_site, read_manifest

RESERVED_NAMES = ("work", "masks", "provenance", UNSEEN)
_GDC_SHEET = {"File Name": "slide", "Case ID": "patient", "Project ID": "project"}
_COLUMNS = ("slide", "patient", "site", "project", "split", "mpp")
_MAX_NAME_BYTES = 120  # with the member's own name it must fit a USTAR header


class GivenTile(NamedTuple):
    """A tile cut elsewhere; its corner and extent in level-0 pixels, 0 where unknown."""

    file: Path
    name: str  # relative to the folder that was given
    x_level0: int
    y_level0: int
    extent_level0: int
    tissue: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideSource:
    """One slide, or the given tiles of one.

    Attributes:
        slide: Unique name; that of the shard.
        file: Slide, or folder of tiles.
        patient: What splits must not divide; the slide's name where nothing else is known.
        site: Tissue source site, or "".
        project: TCGA project, or "".
        split: Split that was given, or "".
        mpp: Scale that was given, or None.
        num_bytes: On disk.
        expected_bytes: By the manifest, or None.
        md5: By the manifest, or "".
        mask: Imported mask, or None.
        mask_sha256: Of the mask's bytes, or "".
        tiles: Given tiles; empty for a slide.
        fault: Why it cannot be had, and what to do, or "".
    """

    slide: str
    file: Path
    patient: str
    site: str = ""
    project: str = ""
    split: str = ""
    mpp: float | None = None
    num_bytes: int = 0
    expected_bytes: int | None = None
    md5: str = ""
    mask: Path | None = None
    mask_sha256: str = ""
    tiles: tuple[GivenTile, ...] = ()
    fault: str = ""


class Named(NamedTuple):
    """Something not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SlideListing:
    """What was found; `notes` are remarks for the user."""

    sources: tuple[SlideSource, ...]
    refused: tuple[Named, ...] = ()
    failed: tuple[Named, ...] = ()
    notes: tuple[str, ...] = ()


def list_slide_sources(
    folder: Path,
    *,
    manifest: Path | None = None,
    table: Path | None = None,
    masks: Path | None = None,
    sections: tuple[str, ...] = ("DX",),
) -> SlideListing:
    """Find slides.

    Args:
        folder: Searched with all its sub-folders.
        manifest: GDC manifest; only what it lists is taken, with sizes to check.
        table: CSV or TSV; see the module. It wins over file names.
        masks: Folder of `<slide>.png` or `<slide>.geojson`; each slide then needs one.
        sections: TCGA sections to take; other names are taken as they are.

    Raises:
        ValueError: Nothing is found, two slides have one name, or a table is malformed.
    """
    rows = read_table(table) if table else {}
    sources: list[SlideSource] = []
    refused: list[Named] = []
    failed: list[Named] = []
    for source in _slide_files(folder, manifest):
        try:
            reason = _refusal(source.file.name, sections)
            if reason is None:
                sources.append(with_details(_with_mask(_found(source), masks), rows))
            else:
                refused.append(Named(source.file.name, reason))
        except ValueError as error:
            failed.append(Named(source.file.name, str(error)))
    check_names(sources)
    known = [source.slide for source in sources] + [Path(name).stem for name, _ in refused]
    notes = unmatched_rows(rows, known)
    if not sources and not failed:
        raise ValueError(
            f"no slide to cut under {folder}; expected {', '.join(SLIDE_SUFFIXES)}"
            + (f"; refused {len(refused)}, such as {refused[0]}" if refused else "")
        )
    return SlideListing(tuple(sources), tuple(refused), tuple(failed), notes)


def check_split_name(name: str) -> None:
    """Refuse a split whose folder would be no plain name, or one that the stage uses itself."""
    if not re.fullmatch(r"[A-Za-z0-9-]+", name) or name in RESERVED_NAMES:
        raise ValueError(f"split {name!r} cannot name a folder here, expected such as train or val")


def with_details(source: SlideSource, rows: Mapping[str, dict[str, str]]) -> SlideSource:
    """Add what the name says and, over it, what the table says."""
    known = patient_and_site(source.slide)
    if known:
        source = replace(source, patient=known[0], site=known[1])
    row = rows.get(source.slide)
    if row:
        given = {k: row[k] for k in ("patient", "site", "project", "split") if row.get(k)}
        if given.get("split") and source.split and given["split"] != source.split:
            raise ValueError(
                f"{source.slide} lies in {source.split} but its table says {given['split']}"
            )
        source = replace(source, **given)  # type: ignore[arg-type]
        if row.get("mpp"):
            source = _with_mpp(source, row["mpp"])
    if source.split:
        check_split_name(source.split)
    return source


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a table by slide name, under our column names."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        delimiter = "\t" if file.suffix.lower() in (".tsv", ".txt") else ","
        reader = csv.DictReader(stream, delimiter=delimiter)
        if not {"slide", "File Name"} & set(reader.fieldnames or ()):
            raise ValueError(f"{file} has columns {reader.fieldnames}, expected at least slide")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            named = {_GDC_SHEET.get(k, k): (v or "").strip() for k, v in row.items() if k}
            name = named["slide"]
            stem = name[: -len(Path(name).suffix)] if _is_file_name(name) else name
            if stem in rows:
                raise ValueError(f"{file} line {reader.line_num} has {stem} a second time")
            rows[stem] = {k: v for k, v in named.items() if k in _COLUMNS}
    return rows


def unmatched_rows(rows: Mapping[str, object], slides: Iterable[str]) -> tuple[str, ...]:
    """Return a remark on rows that describe nothing, a misspelt name perhaps."""
    lost = sorted(set(rows) - set(slides))
    return (f"{len(lost)} rows of the table match no slide, such as {lost[0]}",) if lost else ()


def check_names(sources: list[SlideSource]) -> None:
    """Refuse names that cannot name a shard, or that two slides share."""
    counts = Counter(source.slide for source in sources)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        places = [str(s.file) for s in sources if s.slide == twice[0]][:2]
        raise ValueError(f"{len(twice)} names stand for two slides each, such as {places}; rename")
    for source in sources:
        stems = Counter(tile.file.stem for tile in source.tiles)
        if stems and max(stems.values()) > 1:
            stem = max(stems, key=lambda name: stems[name])
            raise ValueError(f"{source.slide} has two tiles named {stem}; remove one")
    for name in counts:
        if len(name.encode()) > _MAX_NAME_BYTES or not name.isprintable():
            raise ValueError(f"{name!r} cannot name a shard; expected <= {_MAX_NAME_BYTES} bytes")
    splits = {source.split for source in sources}
    if "" in splits and len(splits) > 1:
        lacking = [source.slide for source in sources if not source.split]
        raise ValueError(f"{lacking[:3]} have no split but others do; give all one, or none")


def _slide_files(folder: Path, manifest: Path | None) -> Iterator[SlideSource]:
    """Yield what a manifest lists, be it there or not, or all slides in a folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with slides")
    if manifest is None:
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SLIDE_SUFFIXES and not file.name.startswith("."):
                yield SlideSource(slide=file.stem, file=file, patient=file.stem)
        return
    for entry in read_manifest(manifest):
        places = (folder / entry.file_id / entry.name, folder / entry.name)
        file = next((place for place in places if place.is_file()), places[0])
        yield SlideSource(
            slide=file.stem,
            file=file,
            patient=file.stem,
            expected_bytes=entry.size,
            md5=entry.md5,
        )


def _found(source: SlideSource) -> SlideSource:
    """Return the source with the size of its file, or with a fault if there is none."""
    if source.file.suffix.lower() not in SLIDE_SUFFIXES:
        raise ValueError(f"is no slide, expected {', '.join(SLIDE_SUFFIXES)}")
    if not source.file.is_file():
        fault = f"is not at {source.file}; download it, or take it off the manifest"
        return replace(source, fault=fault)
    return replace(source, num_bytes=source.file.stat().st_size)


def _refusal(name: str, sections: tuple[str, ...]) -> str | None:
    """Return why a slide is not wanted, or None; raises for a malformed TCGA name."""
    barcode = parse_barcode(name)
    if barcode is None or barcode.section in sections:
        return None
    wanted = ", ".join(sections)
    return f"is a {SECTIONS[barcode.section]} section ({barcode.section}); wanted: {wanted}"


def _with_mpp(source: SlideSource, text: str) -> SlideSource:
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if math.isfinite(mpp):
        return replace(source, mpp=mpp)
    fault = f"has mpp {text!r} in its table, expected a number of microns/pixel; correct the table"
    return replace(source, fault=source.fault or fault)


def _with_mask(source: SlideSource, masks: Path | None) -> SlideSource:
    if masks is None or source.fault:
        return source
    for suffix in (".png", ".geojson"):
        file = masks / f"{source.slide}{suffix}"
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            return replace(source, mask=file, mask_sha256=digest)
    fault = f"has no mask; add {masks / source.slide}.png or .geojson, or take the slide out"
    return replace(source, fault=fault)


def _is_file_name(name: str) -> bool:
    return Path(name).suffix.lower() in SLIDE_SUFFIXES
