"""Inputs of a run: a tree of tiles, a table of paths, tar shards or slides become a listing.

    tree     folders of images; the first folder is the label, as torchvision's ImageFolder has it,
             but for those that name a split: `train/tumour/1.png` has the label "tumour"
    table    .csv or .parquet: path, and any of label, slide, x, y, mask, mpp
    shards   tar files as WebDataset reads them
    slides   cut at the model's scale, where the tissue rules of training find tissue

A mask lies beside its tile: `a/tile.png` and `a/tile_mask.png`, or `a/tile.mask.png` as in unpacked
shards. No image is opened here but slides, for which `cytosyn_aug.io.tissue` says what is
tissue.
No torch here.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import TILE_SUFFIXES, masked_stem
from cytosyn_aug.io.slide import SLIDE_SUFFIXES, Slide
from cytosyn_aug.io.tissue import TissueConfig, candidate_positions, slide_mask
from cytosyn_aug.runs.listing import (
    Item,
    Listing,
    ListingKind,
    corner,
    left_out,
    make_listing,
    output_stem,
)
from cytosyn_aug.runs.tables import EITHER_SUFFIXES, list_slide_table, list_table, looks_like_slide
from cytosyn_aug.runs.tar_inputs import list_shards

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


def list_inputs(
    source: Path | str, tile: TileSpec, *, kind: ListingKind | None = None, mpp: float | None = None
) -> Listing:
    """List the tiles of an input.

    Args:
        source: Folder or file.
        tile: Tiles that slides are cut to.
        kind: What it is; None decides by what is there, as `find_kind` does.
        mpp: Scale of slides in microns per pixel, instead of what they state.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: It holds nothing of its kind, or several kinds.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a folder, table, tar file or slide")
    kind = kind or find_kind(source)
    if kind == "tree":
        if source.is_file():
            raise ValueError(f"{source} is a file, expected a folder of tiles; give its folder")
        listing = list_tree(source)
    elif kind == "table":
        listing = list_table(source)
    elif kind == "shards":
        listing = list_shards(source, [name for name, _ in _files(source, (".tar",))])
    else:
        listing = list_slides(source, tile, mpp)
    if not len(listing):
        raise ValueError(f"{source} holds no tiles that this finds as {kind}; see --help for IN")
    return listing


def find_kind(source: Path) -> ListingKind:
    """Return what an input is, from its suffix or from the files in it.

    .tif files in a folder count as slides beside other slides, and else as tiles, unless the first
    of them is a slide by its look.

    Raises:
        ValueError: Files of several kinds, none that is known, or .tif files that may be slides.
    """
    if source.is_file():
        kind = _kind_of(source.suffix.lower())
        if kind == "tree" and source.suffix.lower() in EITHER_SUFFIXES:
            kind = "slides"
        if kind in (None, "tree"):
            raise ValueError(
                f"{source} is neither a table ({', '.join(TABLE_SUFFIXES)}), a plain .tar nor a "
                f"slide ({', '.join(SLIDE_SUFFIXES)}); give a folder of tiles as a folder"
            )
        return kind
    suffixes: Counter[str] = Counter()
    first_tiff = ""
    for name, _ in walk(source):
        suffix = Path(name).suffix.lower()
        suffixes[suffix] += 1
        if suffix in EITHER_SUFFIXES:
            first_tiff = first_tiff or name
    kinds: Counter[ListingKind] = Counter()
    for suffix, number in suffixes.items():
        kind = _kind_of(suffix)
        if kind is not None and kind != "table":
            kinds[kind] += number
    if kinds["slides"] and kinds["tree"] == sum(suffixes[s] for s in EITHER_SUFFIXES):
        del kinds["tree"]
    kinds = +kinds
    if len(kinds) > 1:
        shown = ", ".join(f"{n} of {kind}" for kind, n in sorted(kinds.items()))
        raise ValueError(f"{source} holds files of several kinds ({shown}); say which with --input")
    if not kinds:
        raise ValueError(
            f"{source} holds no tiles, plain tar files or slides "
            f"({''.join(left_out(suffixes)) or 'it is empty'}); see --help for IN"
        )
    if kinds["tree"] and first_tiff and looks_like_slide(source / first_tiff):
        raise ValueError(
            f"{source} holds .tif files, the first of which is a slide by its look ({first_tiff}); "
            "say --input slides to cut tiles from them, or --input tree if each is one tile"
        )
    return next(iter(kinds))


def walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the paths of all files relative to a folder, sorted, and their sizes in bytes.

    Links are followed, each folder only once on the way down; hidden names are left out.
    """
    yield from _walk(os.fspath(folder), "", ())


def list_tree(folder: Path) -> Listing:
    """List the images of a folder and of the folders in it."""
    others: Counter[str] = Counter()
    listing = make_listing("tree", folder, _tree_items(folder, others))
    return replace(listing, notes=left_out(others))


def list_slides(source: Path, tile: TileSpec, mpp: float | None = None) -> Listing:
    """List the tiles with tissue of slides, given as for `list_whole_slides`.

    A slide that cannot be read is one row with an error.
    """
    slides = list_whole_slides(source, mpp=mpp)
    items: list[Item] = []
    notes = list(slides.notes)
    for whole in slides.items(0, len(slides)):
        items += _slide_items(slides.root, whole, tile, notes)
    return make_listing("slides", slides.root, items, tuple(notes))


def list_whole_slides(source: Path | str, *, mpp: float | None = None) -> Listing:
    """List slides, one item per slide: its path from `root`, its size in bytes, and no x and y.

    Args:
        source: Slide, folder of slides (labelled as tiles are), or table with one path per row
            and any of label, slide, mpp.
        mpp: Scale in microns per pixel, instead of what slides state; a table's own wins.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: It holds no slides.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a slide, a folder or a table")
    if source.is_file() and source.suffix.lower() in TABLE_SUFFIXES:
        listing = list_slide_table(source, mpp)
    else:
        items = (
            Item(name, label=_label(name), slide=output_stem(name), file=name, size=size, mpp=mpp)
            for name, size in _files(source, SLIDE_SUFFIXES)
        )
        folder = source if source.is_dir() else source.parent
        listing = make_listing("slides", folder, items)
    if not len(listing):
        raise ValueError(f"{source} holds no slides; expected {', '.join(SLIDE_SUFFIXES)}")
    return listing


def _files(source: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of files with such names in a folder, or of the one file given."""
    if source.is_file():
        yield source.name, source.stat().st_size
        return
    for name, size in walk(source):
        if name.lower().endswith(endings):
            yield name, size


def _label(name: str) -> str:
    """Return the label that a path says: its first folder that names no split, "" for none."""
    return next((f for f in name.split("/")[:-1] if f.lower() not in SPLITS), "")


def _kind_of(suffix: str) -> ListingKind | None:
    if suffix in TILE_SUFFIXES:
        return "tree"
    if suffix in TABLE_SUFFIXES:
        return "table"
    if suffix in SLIDE_SUFFIXES:
        return "slides"
    return "shards" if suffix == ".tar" else None


def _walk(folder: str, path: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return
    with os.scandir(folder) as scanned:
        entries = sorted((e for e in scanned if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        try:
            found_here = entry.stat()
        except OSError:  # a link to nothing, or to itself: reading it will say so
            yield f"{path}{entry.name}", -1
            continue
        if stat.S_ISDIR(found_here.st_mode):
            below = (*above, (here.st_dev, here.st_ino))
            yield from _walk(entry.path, f"{path}{entry.name}/", below)
        elif stat.S_ISREG(found_here.st_mode):  # no pipe, which one would wait at
            yield f"{path}{entry.name}", found_here.st_size


def _tree_items(folder: Path, others: Counter[str]) -> Iterator[Item]:
    files = dict(walk(folder))
    masks: dict[str, list[str]] = {}
    for name in files:
        stem = os.path.splitext(name)[0]
        tile = masked_stem(stem)
        if tile is not None:
            masks.setdefault(tile, []).append(name)
    used = set()
    for name, size in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in TILE_SUFFIXES or masked_stem(stem) is not None:
            continue
        own = masks.get(stem, [])
        used.update(own)
        slide, x, y = corner(name)
        error = f"has {len(own)} masks, expected one: {', '.join(own)}" if len(own) > 1 else ""
        mask = own[0] if len(own) == 1 else ""
        yield Item(name, "", _label(name), slide, x, y, "", -1, size, mask, error=error)
    for name in files:
        stem, suffix = os.path.splitext(name)
        is_mask, is_image = masked_stem(stem) is not None, suffix.lower() in TILE_SUFFIXES
        if is_mask and is_image and name not in used:
            yield Item(name, error="is named as the mask of a tile that is not there")
        elif name not in used and not is_image:
            others[suffix] += 1


def _slide_items(folder: Path, whole: Item, tile: TileSpec, notes: list[str]) -> Iterator[Item]:
    if whole.error:
        yield whole
        return
    config = TissueConfig()
    try:
        with Slide(folder / whole.file, whole.mpp) as slide:
            reading = slide.plan(tile)
            mask = slide_mask(slide, None, config)
            positions = candidate_positions(slide, reading, mask, config)[0].tolist()
            notes += [f"{whole.name}: {note}" for note in slide.scale.notes]
    except (ValueError, MemoryError) as error:
        reason = str(error).removeprefix(f"{Path(whole.file).name} ") or type(error).__name__
        yield whole._replace(error=reason)
        return
    if not positions:
        notes.append(f"{whole.name}: no tissue was found")
    for x, y in positions:
        yield whole._replace(stem=f"{whole.stem}/{x}_{y}", x=x, y=y)
