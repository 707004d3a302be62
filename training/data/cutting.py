"""From one slide to one shard: the work of the tile stage that runs in its processes.

A slide is scanned (scale, mask, number of candidates) before any is cut, because quotas need all
scans. Both are functions of their unit alone, write their receipt last, and may run any number of
times. What is wrong with a slide or tile is returned by name; an `OSError` means that the output
cannot be written, which concerns every slide, and is left to the caller. No torch here.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cytosyn_aug.config import TileSpec, config_digest
from cytosyn_aug.io.files import atomic_file, write_atomically
from cytosyn_aug.io.image_files import encode_tile
from cytosyn_aug.io.slide import Grid, Slide, SlideError
from cytosyn_aug.io.tar_files import ShardWriter
from cytosyn_aug.io.tissue import (
    TissueConfig,
    TissueMask,
    candidate_positions,
    reason_to_reject,
    slide_mask,
    tile_quality,
)
from training.data.candidates import (
    Candidates,
    given_candidates,
    slide_candidates,
    take,
)
from training.data.shards import TILE_SCHEMA
from training.data.sources import SlideSource, check_split_name
from training.data.splits import UNSEEN, QuotaBy, keep_apart, rank


@dataclass(frozen=True, kw_only=True, slots=True)
class TileRecipe:
    """Everything that decides which tiles a set of slides gives, and their bytes.

    Attributes:
        tile: Size and scale.
        grid: "exact" cuts at the scale asked for, "deepzoom" as DeepZoom tools do.
        tissue: Rules by which a tile shows tissue; tiles that were cut elsewhere are measured, not
        rejected.
        sections: TCGA sections to take.
        num_tiles: Tiles of all splits together; None for all there are. Quotas count tiles with
            tissue; what a slide then lacks because tiles were blank or blurred, others do not give.
        quota_by: What makes a tissue source site large.
        split_shares: Name and share of slides of each split; unused where splits are given.
        keep_sites: Whether sites are kept in one split where a project has enough of them.
        unseen_share: Share of the tiles of slides of the split `train` that go apart, as the split
            `unseen`: what `evaluate --unseen` wants. `num_tiles` includes them.
        seed: Of ranks, splits and what goes apart.
    """

    tile: TileSpec = field(default_factory=TileSpec)
    grid: Grid = "exact"
    tissue: TissueConfig = field(default_factory=TissueConfig)
    sections: tuple[str, ...] = ("DX",)
    num_tiles: int | None = None
    quota_by: QuotaBy = "slides"
    split_shares: tuple[tuple[str, float], ...] = (("train", 0.9), ("val", 0.05), ("test", 0.05))
    keep_sites: bool = True
    unseen_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_tiles is not None and self.num_tiles < 1:
            raise ValueError(f"num_tiles is {self.num_tiles}, expected at least 1, or None for all")
        if not 0 <= self.unseen_share < 1:
            raise ValueError(f"unseen_share is {self.unseen_share}, expected 0 to less than 1")
        for name, _ in self.split_shares:
            check_split_name(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What is known of a slide before it is cut; all but `slide` is empty if `error` is not.

    With `damage` it can be cut, but not as a sound copy would be.
    """

    slide: str
    error: str = ""
    damage: str = ""
    request: str = ""  # digest of the unit
    mpp: float = 0.0
    mpp_source: str = ""
    notes: tuple[str, ...] = ()
    identity: str = ""
    mask_sha256: str = ""
    mask_pixel_level0: tuple[float, float] = (1.0, 1.0)
    num_candidates: int = 0


class ScanUnit(NamedTuple):
    """A slide to scan into a folder."""

    source: SlideSource
    recipe: TileRecipe
    folder: Path
    check_md5: bool = False

    def digest(self) -> str:
        """Return a hash of all that decides the scan, but for the pixels of the slide."""
        s = self.source
        return _digest(config_digest(self.recipe), s.slide, s.num_bytes, s.mpp, s.mask_sha256)


class CutUnit(NamedTuple):
    """A scanned slide to cut into a folder, with its split and quota."""

    source: SlideSource
    recipe: TileRecipe
    folder: Path
    scan: Scan
    split: str
    quota: int

    def shards(self) -> dict[str, str]:
        """Return where the slide's shards are, relative to the folder, by split."""
        is_divided = self.split == "train" and self.recipe.unseen_share
        splits = (self.split, UNSEEN) if is_divided else (self.split,)
        return {split: f"{split}/{self.source.slide}.tar" for split in splits}

    def digest(self) -> str:
        """Return a hash of all that decides the bytes of the shards."""
        tiles = [tile[1:] for tile in self.source.tiles]  # all but where the file is
        recipe, scan = config_digest(self.recipe), asdict(self.scan)
        return _digest(recipe, scan, self.source.num_bytes, self.split, self.quota, tiles)


class Failure(NamedTuple):
    """A tile that could not be had; nothing stands in for it. Corner -1, -1: the whole slide."""

    x_level0: int
    y_level0: int
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What was made of a slide: proof that its shards are complete, written after them.

    Attributes:
        slide: Name.
        digest: Of the unit; "" if there is no shard.
        num_bytes: Of each shard, by split.
        sha256: Of each shard, by split.
        num_tiles: In all shards.
        num_unseen: Of these, in the one of what is kept apart.
        rejected: Tiles that were read and found blank or blurred, by reason.
        failures: Tiles that could not be read.
    """

    slide: str
    digest: str = ""
    num_bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    num_tiles: int = 0
    num_unseen: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


def scan(unit: ScanUnit) -> Scan:
    """Open a slide, find its tissue and count the tiles it could give."""
    try:
        scanned = _scan_slide(unit)
    except (ValueError, MemoryError) as error:
        return Scan(slide=unit.source.slide, error=str(error) or type(error).__name__)
    text = json.dumps(asdict(scanned), indent=1)
    write_atomically(scan_file(unit.folder, scanned.slide), text.encode())
    return scanned


def cut(unit: CutUnit) -> Receipt:
    """Write the shards of a slide, its rows of the table and, last, its receipt."""
    source = unit.source
    if source.tiles:
        return _write(unit, given_candidates(source.tiles, unit.recipe.tile))
    try:
        slide = Slide(source.file, source.mpp)
        reading = slide.plan(unit.recipe.tile, unit.recipe.grid)
    except SlideError as error:  # it was readable when it was scanned
        return Receipt(slide=source.slide, failures=(Failure(-1, -1, str(error)),))
    with slide:
        mask = _stored_mask(unit.folder, unit.scan)
        return _write(unit, slide_candidates(slide, reading, mask, unit.recipe.tissue))


def scan_file(folder: Path, slide: str) -> Path:
    """Return where the scan of a slide is kept."""
    return folder / "work" / "scans" / f"{slide}.json"


def mask_file(folder: Path, slide: str) -> Path:
    """Return where the mask of a slide is kept."""
    return folder / "masks" / f"{slide}.png"


def part_file(folder: Path, slide: str) -> Path:
    """Return where a slide's rows of the table are kept."""
    return folder / "work" / "parts" / f"{slide}.parquet"


def receipt_file(folder: Path, slide: str) -> Path:
    """Return where the receipt of a slide is kept."""
    return folder / "work" / "receipts" / f"{slide}.json"


def _scan_slide(unit: ScanUnit) -> Scan:
    source, recipe = unit.source, unit.recipe
    if source.fault:
        raise SlideError(source.fault)
    if source.expected_bytes not in (None, source.num_bytes):
        raise SlideError(
            f"{source.file.name} has {source.num_bytes:,} bytes, its manifest says "
            f"{source.expected_bytes:,}; download it again"
        )
    if unit.check_md5 and source.md5 and _md5(source.file) != source.md5:
        raise SlideError(f"{source.file.name} has another MD5 than its manifest; download it again")
    with Slide(source.file, source.mpp) as slide:
        reading = slide.plan(recipe.tile, recipe.grid)
        mask = slide_mask(slide, source.mask, recipe.tissue)
        stream = io.BytesIO()
        Image.fromarray(mask.is_tissue).save(stream, "PNG")
        write_atomically(mask_file(unit.folder, source.slide), stream.getvalue())
        return Scan(
            slide=source.slide,
            damage=_damage(mask),
            request=unit.digest(),
            mpp=slide.scale.mpp,
            mpp_source=slide.scale.source,
            notes=slide.scale.notes,
            identity=slide.identity,
            mask_sha256=hashlib.sha256(stream.getvalue()).hexdigest(),
            mask_pixel_level0=mask.pixel_level0,
            num_candidates=len(candidate_positions(slide, reading, mask, recipe.tissue)[0]),
        )


def _damage(mask: TissueMask) -> str:
    if not mask.unreadable:
        return ""
    return (
        f"{mask.unreadable:.1%} of its overview cannot be decoded, where all tiles were tried; "
        "replace it by a sound copy"
    )


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _md5(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()
    except OSError as error:
        raise SlideError(f"{file} cannot be read: {error.strerror}") from error


def _stored_mask(folder: Path, scan: Scan) -> TissueMask:
    with Image.open(mask_file(folder, scan.slide), formats=("PNG",)) as image:
        return TissueMask(np.asarray(image).astype(bool), scan.mask_pixel_level0)


def _write(unit: CutUnit, candidates: Candidates) -> Receipt:
    slide = unit.source.slide
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    rejected: Counter[str] = Counter()
    keys = [f"{slide}/{key}" for key in candidates.keys]
    goes_apart = keep_apart(keys, unit.recipe.seed, unit.recipe.unseen_share)
    names = unit.shards()
    with ExitStack() as files:
        shards = {
            split: ShardWriter(files.enter_context(atomic_file(unit.folder / name)))
            for split, name in names.items()
        }

        def is_taken(index: int) -> bool:
            facts = candidates.facts[index]
            try:
                image = candidates.read(index)
            except SlideError as error:
                failures.append(Failure(facts["x_level0"], facts["y_level0"], str(error)))
                return True
            quality = tile_quality(np.asarray(image))
            if candidates.tissue and (reason := reason_to_reject(quality, candidates.tissue)):
                rejected[reason] += 1
                return False
            split = UNSEEN if UNSEEN in shards and goes_apart[index] else unit.split
            content = encode_tile(image)
            record = shards[split].add(f"{slide}/{_member_name(facts)}.webp", content)
            place = {"split": split, "shard": names[split]}
            rows.append(place | facts | quality._asdict() | record._asdict())
            return True

        take(rank(keys, unit.recipe.seed), unit.quota, is_taken)
        sha256 = {split: shard.finish() for split, shard in shards.items()}
    _write_part(unit, rows)
    receipt = Receipt(
        slide=slide,
        digest=unit.digest(),
        num_bytes={split: shard.num_bytes for split, shard in shards.items()},
        sha256=sha256,
        num_tiles=len(rows),
        num_unseen=sum(row["split"] == UNSEEN for row in rows),
        rejected=dict(sorted(rejected.items())),
        failures=tuple(failures),
    )
    text = json.dumps(asdict(receipt), indent=1)
    write_atomically(receipt_file(unit.folder, slide), text.encode())
    return receipt


def _member_name(facts: dict[str, Any]) -> str:
    if facts["source"]:
        return Path(facts["source"]).stem
    return f"{facts['x_level0']}_{facts['y_level0']}"


def _write_part(unit: CutUnit, rows: list[dict[str, Any]]) -> None:
    source = unit.source
    same = {
        "project": source.project,
        "site": source.site,
        "patient": source.patient,
        "slide": source.slide,
    }
    table = pa.Table.from_pylist([same | row for row in rows], schema=TILE_SCHEMA)
    with atomic_file(part_file(unit.folder, source.slide)) as stream:
        pq.write_table(table, stream)
