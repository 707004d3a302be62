"""The tile stage: slides, or tiles cut elsewhere, become a data set that training reads.

    OUT/dataset.json, tiles.parquet, <split>/<slide>.tar    see `training.data.shards`
    OUT/unseen/          tiles of training slides that are kept apart, a split like the others
    OUT/slides.csv       one row per slide: scale and its source, split, counts, or why it is absent
    OUT/failures.csv     one row for each slide or tile that could not be had
    OUT/masks/           tissue masks
    OUT/provenance/      slides.csv and tiles.csv that came with given tiles, as they are
    OUT/work/            identity, scans, rows and receipts that a rerun starts from

A run may be killed at any moment: a rerun keeps what has a receipt and reaches the same bytes, with
any number of processes. What failed is tried again, and may be mended: by another file, or in a
table. A folder belongs to one recipe, one set of slides and one version of the decoders; another
is refused, with the difference. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cytosyn_aug.config import config_digest
from cytosyn_aug.io.files import remove_leftovers, write_atomically
from cytosyn_aug.runs.folder import differences
from training.data.catalogue import Outcome, TileSummary, members, publish, tile_software
from training.data.cutting import (
    CutUnit,
    Failure,
    Receipt,
    Scan,
    ScanUnit,
    TileRecipe,
    cut,
    mask_file,
    part_file,
    receipt_file,
    scan,
    scan_file,
)
from training.data.shards import DATASET_NAME, FORMAT_VERSION, file_sha256
from training.data.sources import SlideListing, SlideSource
from training.data.splits import (
    UNSEEN,
    Assignment,
    assign_splits,
    check_leakage,
    count_by_split,
    slide_quotas,
)
from training.data.workers import DeadUnit, run_units

BYTES_PER_PIXEL = 1.6  # of H&E; measured 80 kB for 224 px, 72 to 95 by scanner and reduction
SLIDE_BYTES_PER_TILE = 124_000  # TCGA's diagnostic slides: 13.4 TB for 108 M tiles
TILES_PER_S = 100  # a process
_FOLDERS = ("work", "work/scans", "work/parts", "work/receipts", "masks", "provenance")


def plan_tiles(listing: SlideListing, recipe: TileRecipe, num_workers: int) -> dict[str, Any]:
    """Return what a run would do, from names and sizes alone.

    The number of tiles is an upper bound: given tiles are counted, slides are guessed by
    their bytes.
    """
    splits = _splits(listing.sources, recipe)
    num_bytes = sum(source.num_bytes for source in listing.sources)
    given = sum(len(source.tiles) for source in listing.sources)
    available = given or num_bytes // SLIDE_BYTES_PER_TILE
    num_tiles = min(available, recipe.num_tiles or available)
    return {
        "recipe": asdict(recipe),
        "recipe_digest": config_digest(recipe),
        "software": tile_software(),
        "slides": len(listing.sources),
        "slide_bytes": num_bytes,
        "splits": count_by_split(members(listing.sources), splits.splits),
        "divided_sites": splits.divided_sites,
        "refused": [f"{name} {reason}" for name, reason in listing.refused],
        "failed": [f"{name} {reason}" for name, reason in listing.failed]
        + [f"{source.slide} {source.fault}" for source in listing.sources if source.fault],
        "notes": listing.notes,
        "estimate": {
            "tiles_at_most": num_tiles,
            "output_bytes": _bytes(num_tiles, recipe),
            "hours": round(num_tiles / TILES_PER_S / max(num_workers, 1) / 3600, 2),
        },
    }


def make_tiles(
    listing: SlideListing,
    recipe: TileRecipe,
    out: Path,
    *,
    num_workers: int = 1,
    check_md5: bool = False,
) -> TileSummary:
    """Run the stage, or what is left of it.

    Args:
        listing: From `training.data.sources`.
        recipe: What to cut.
        out: Folder to write, or to continue.
        num_workers: Processes; 0 works in this one. No influence on the result.
        check_md5: Read every slide once more to compare it with the manifest.

    Raises:
        ValueError: `out` holds another run or is in use, splits leak, or the disk is too small.
        OSError: The output cannot be written; what is complete stays, a rerun continues.
    """
    if out.exists() and any(out.iterdir()) and not (out / "work").is_dir():
        raise ValueError(f"{out} is not empty and not of the tile stage; choose another --out")
    for name in _FOLDERS:
        (out / name).mkdir(parents=True, exist_ok=True)
    with _sole_owner(out):
        _claim(out, listing.sources, recipe)
        splits = _splits(listing.sources, recipe)
        names = {*splits.splits.values(), *([UNSEEN] if recipe.unseen_share else [])}
        for name in names:
            (out / name).mkdir(exist_ok=True)
        for name in (".", *_FOLDERS, *names):
            remove_leftovers(out / name)
        scans = _scan_all(listing.sources, recipe, out, num_workers, check_md5)
        identities = {name: found.identity for name, found in scans.items()}
        check_leakage(members(listing.sources), splits.splits, identities)
        units = _plan(listing.sources, recipe, out, scans, splits)
        receipts = _cut_all(units, num_workers)
        return publish(out, Outcome(listing, recipe, splits, scans, units, receipts))


def _splits(sources: Sequence[SlideSource], recipe: TileRecipe) -> Assignment:
    if sources and sources[0].split:
        return Assignment({source.slide: source.split for source in sources}, ())
    shares, seed = recipe.split_shares, recipe.seed
    return assign_splits(members(sources), shares, seed, keep_sites=recipe.keep_sites)


@contextmanager
def _sole_owner(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends, however it does."""
    with (out / "work" / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being written by another run; wait for it") from None
        yield


def _claim(out: Path, sources: Sequence[SlideSource], recipe: TileRecipe) -> None:
    """Record whose folder this is, or refuse one that is another run's.

    As long as no slide is cut it is nobody's: tables may be corrected after a first attempt. So may
    always what a slide that is not cut may have lacked.
    """
    mendable = ("mpp", "mask_sha256", "fault")
    names = ("patient", "site", "project", "split", *mendable)
    identity: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "recipe": asdict(recipe),
        "software": tile_software(),
        "slides": {
            s.slide: {k: getattr(s, k) for k in names} | {"num_given": len(s.tiles)}
            for s in sorted(sources, key=lambda s: s.slide)
        },
    }
    identity = json.loads(json.dumps(identity))
    file = out / "work" / "identity.json"
    was = _read(file) or {}
    for slide, facts in was.get("slides", {}).items():
        if slide in identity["slides"] and not receipt_file(out, slide).exists():
            facts |= {name: identity["slides"][slide][name] for name in mendable}
    changes = list(differences(was, identity))
    if changes and any((out / "work" / "receipts").glob("*.json")):
        shown = "\n  ".join(changes[:8])
        more = f"\n  and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise ValueError(
            f"{out} holds another run; was -> is now:\n  {shown}{more}\n"
            "Choose another --out, or restore what changed"
        )
    if _read(file) != identity:
        write_atomically(file, json.dumps(identity, indent=1).encode())


def _scan_all(
    sources: Sequence[SlideSource], recipe: TileRecipe, out: Path, num_workers: int, check_md5: bool
) -> dict[str, Scan]:
    units = [ScanUnit(source, recipe, out, check_md5) for source in _largest_first(sources)]
    scans = {unit.source.slide: _kept_scan(unit) for unit in units}
    units = [unit for unit in units if scans[unit.source.slide] is None]
    for count, (unit, found) in enumerate(run_units(scan, units, num_workers), 1):
        slide = unit.source.slide
        result = Scan(slide=slide, error=found.reason) if isinstance(found, DeadUnit) else found
        scans[slide] = result
        state = result.error or f"{result.num_candidates} tiles with tissue"
        state += f", DAMAGED: {result.damage}" if result.damage else ""
        _say(f"scan {count}/{len(units)} {slide}: {state}")
    return {name: found for name, found in scans.items() if found is not None}


def _kept_scan(unit: ScanUnit) -> Scan | None:
    """Return the scan of an earlier run, if it is of this unit; given tiles need none."""
    source, mask = unit.source, mask_file(unit.folder, unit.source.slide)
    if source.tiles and not source.fault:
        return Scan(slide=source.slide, num_candidates=len(source.tiles))
    content = _read(scan_file(unit.folder, source.slide))
    if content is None or content["request"] != unit.digest() or not mask.exists():
        return None
    if content.get("damage"):
        return None  # a sound copy may have come, of the same size
    content["notes"] = tuple(content["notes"])
    content["mask_pixel_level0"] = tuple(content["mask_pixel_level0"])
    found = Scan(**content)
    return found if found.mask_sha256 == file_sha256(mask) else None


def _plan(
    sources: Sequence[SlideSource],
    recipe: TileRecipe,
    out: Path,
    scans: Mapping[str, Scan],
    splits: Assignment,
) -> list[CutUnit]:
    """Return what to cut, after making sure that there is room for it."""
    capacities = {name: found.num_candidates for name, found in scans.items()}
    sites = {s.slide: f"{s.project}/{s.site}" for s in sources}
    quotas = slide_quotas(recipe.num_tiles, capacities, sites, recipe.quota_by)
    units = [
        CutUnit(s, recipe, out, scans[s.slide], splits.splits[s.slide], quotas[s.slide])
        for s in _largest_first(sources)
        if quotas[s.slide]
    ]
    num_tiles = sum(unit.quota for unit in units if _kept_receipt(unit) is None)
    needed = _bytes(num_tiles, recipe)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"about {needed:,} bytes are needed in {out}, {free:,} are free; make room, "
            "or choose a recipe with fewer tiles"
        )
    return units


def _cut_all(units: Sequence[CutUnit], num_workers: int) -> dict[str, Receipt]:
    kept = {unit.source.slide: _kept_receipt(unit) for unit in units}
    todo = [unit for unit in units if kept[unit.source.slide] is None]
    receipts = {name: receipt for name, receipt in kept.items() if receipt is not None}
    if todo:
        (todo[0].folder / DATASET_NAME).unlink(missing_ok=True)  # not true for a while
    for count, (unit, result) in enumerate(run_units(cut, todo, num_workers), 1):
        slide = unit.source.slide
        if isinstance(result, DeadUnit):
            result = Receipt(slide=slide, failures=(Failure(-1, -1, result.reason),))
        receipts[slide] = result
        counts = f"{result.num_tiles} tiles, {sum(result.rejected.values())} rejected"
        failed = f", {len(result.failures)} FAILED" if result.failures else ""
        _say(f"cut {count}/{len(todo)} {slide}: {counts}{failed}")
    return receipts


def _kept_receipt(unit: CutUnit) -> Receipt | None:
    """Return the receipt of an earlier run, if it is of this unit and complete."""
    slide = unit.source.slide
    content = _read(receipt_file(unit.folder, slide))
    if content is None or content["digest"] != unit.digest() or content["failures"]:
        return None
    shards = {split: unit.folder / name for split, name in unit.shards().items()}
    if not all(file.exists() for file in (part_file(unit.folder, slide), *shards.values())):
        return None
    receipt = Receipt(**content | {"failures": ()})
    sizes = {split: shard.stat().st_size for split, shard in shards.items()}
    return receipt if receipt.num_bytes == sizes else None


def _read(file: Path) -> dict[str, Any] | None:
    """Return a JSON file, or None: what is absent or unreadable vouches for nothing."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _bytes(num_tiles: int, recipe: TileRecipe) -> int:
    return round(num_tiles * recipe.tile.size_px**2 * BYTES_PER_PIXEL)


def _largest_first(sources: Iterable[SlideSource]) -> list[SlideSource]:
    return sorted(sources, key=lambda s: (-s.num_bytes, s.slide))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
