"""Tar shards as WebDataset reads them: key.png, its label key.cls and key.mask.png are one tile.

Keys are unique in their shard only, so results of a folder of shards are named after both:
`000017.png` in `train-000.tar` gives `train-000/000017`. Those of a single tar file have its keys.

WebDataset takes what follows the first dot of a name for its kind: `x.seg.png` beside `x.png` is no
tile, and left out. Without `x.png` it is one, and a note says so: names of TCGA's slides have dots.
A mask may have any suffix. key.json goes along to tar shards as it stands and is not read, since no
entry of it is by custom the label. No image is opened here, and no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cytosyn_aug.io.image_files import TILE_SUFFIXES
from cytosyn_aug.io.tar_files import TarMember, list_members
from cytosyn_aug.runs.listing import (
    Item,
    Listing,
    corner,
    escape_undecodable,
    left_out,
    make_listing,
    output_stem,
)

_MAX_LABEL_BYTES = 4096
_KINDS = "|".join(suffix[1:] for suffix in TILE_SUFFIXES)
# As much as can be is the key: "a.b.mask.png" is the mask of "a.b".
_NAME = re.compile(rf"(?P<key>.+?)\.(?P<kind>mask\.[^.]+|cls|json|{_KINDS})", re.I | re.S)


@dataclass
class _Seen:
    """What notes will say: kinds left out, and tiles with .json or with dots in their keys."""

    others: Counter[str] = field(default_factory=Counter)
    num_json: int = 0
    num_dotted: int = 0
    dotted: str = ""

    def notes(self) -> tuple[str, ...]:
        notes = list(left_out(self.others))
        if self.num_json:
            notes.append(f"{self.num_json} .json beside tiles go along with --format tar only")
        if self.num_dotted:
            notes.append(
                f"took {self.num_dotted} images with dots in their names for tiles, such as "
                f"{escape_undecodable(self.dotted)}; WebDataset takes what follows the first dot "
                "for a kind"
            )
        return tuple(notes)


def list_shards(source: Path, names: Iterable[str]) -> Listing:
    """List the images in tar files.

    Args:
        source: A tar file, or a folder of them.
        names: Paths of the tar files, relative to their folder.
    """
    folder = source if source.is_dir() else source.parent
    seen = _Seen()
    items = (
        item._replace(stem=f"{output_stem(name)}/{item.stem}" if source.is_dir() else item.stem)
        for name in names
        for item in _shard_items(folder, name, seen)
    )
    listing = make_listing("shards", folder, items)
    return replace(listing, notes=seen.notes())


def _shard_items(folder: Path, shard: str, seen: _Seen) -> Iterator[Item]:
    """Yield the images of a tar file, with what lies beside them under the same key."""
    samples: dict[str, dict[str, list[TarMember]]] = {}
    damage = ""
    try:
        for member in list_members(folder / shard):
            if not _is_hidden(member.name):
                key, kind = _split(member.name)
                samples.setdefault(key, {}).setdefault(kind, []).append(member)
    except ValueError as error:  # what was listed before it is still good
        damage = str(error)
    tiles = {key for key, kinds in samples.items() if any(map(_is_image, kinds))}
    tiles -= {key for key in tiles if _first_dot(key) != key and _first_dot(key) in tiles}
    for key, kinds in samples.items():
        if key in tiles:
            yield _tile(folder, shard, key, kinds)
            seen.num_json += "json" in kinds
            if _first_dot(key) != key:
                seen.num_dotted += 1
                seen.dotted = seen.dotted or f"{shard}/{key}"
        for kind, members in kinds.items():
            if kind.startswith("mask.") and key not in tiles:
                name = f"{shard}/{members[0].name}"
                yield Item(name, key, error="is named as the mask of a tile that is not there")
            elif key not in tiles or not (_is_image(kind) or _NAME.fullmatch(f"x.{kind}")):
                ending = f"{key[len(_first_dot(key)) :]}.{kind}".rstrip(".")
                seen.others[ending] += len(members)
    if damage:
        yield Item(shard, "damaged", error=damage)


def _tile(folder: Path, shard: str, key: str, kinds: dict[str, list[TarMember]]) -> Item:
    images = [member for kind in kinds if _is_image(kind) for member in kinds[kind]]
    masks = [member for kind in kinds if kind.startswith("mask.") for member in kinds[kind]]
    error = ""
    for number, what in ((len(images), "images"), (len(masks), "masks")):
        if number > 1:
            error = f"has {number} {what} under one key, expected one"
    image, label = images[0], ""
    if "cls" in kinds:
        try:
            label = _text(folder / shard, kinds["cls"][-1])
        except (OSError, ValueError) as problem:
            error = error or f"has a label that is no short UTF-8 text: {problem}"
    # Dots of keys that we wrote ourselves, as `cytosyn_aug.runs.outputs.TarOutput` does.
    stem = key.replace("%2E", ".")
    slide, x, y = corner(f"{stem}.png")
    name = f"{shard}/{image.name}"
    item = Item(name, stem, label, slide, x, y, shard, image.offset, image.size, error=error)
    if len(masks) == 1:
        mask = masks[0]
        item = item._replace(mask=mask.name, mask_offset=mask.offset, mask_size=mask.size)
    if "json" in kinds:
        json = kinds["json"][-1]
        item = item._replace(json_offset=json.offset, json_size=json.size)
    return item


def _is_hidden(name: str) -> bool:
    """Return whether a member is no one's sample, such as macOS's `._x.png`."""
    return any(part.startswith(".") for part in name.split("/") if part not in (".", ".."))


def _is_image(kind: str) -> bool:
    return f".{kind}" in TILE_SUFFIXES


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into its key, clean of `./`, and its kind, in small letters."""
    folder, _, last = name.rpartition("/")
    match = _NAME.fullmatch(last)
    key, kind = match.group("key", "kind") if match else last.partition(".")[::2]
    parts = [part for part in (*folder.split("/"), key) if part not in ("", ".", "..")]
    return "/".join(parts), kind.lower()


def _first_dot(key: str) -> str:
    """Return the key that WebDataset would take."""
    folder, slash, last = key.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _text(file: Path, member: TarMember) -> str:
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"{member.size:,} bytes")
    with file.open("rb") as stream:
        stream.seek(member.offset)
        return stream.read(member.size).decode().strip()
