"""Specification of a cache: what it holds and what computed it, in `cache.json`, never changed.

Compared as a whole, so that records of another model, recipe or tile size are never read as this
cache's. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytosyn_aug.config import TileSpec, config_digest, config_json
from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.io.json_files import from_json

FORMAT_VERSION = 1
CACHE_NAME = "cache.json"
SHARD_FOLDER = "shards"
KEY_BYTES = 32
MAX_VARIANTS = 1 << 16
_KIND = "cytosyn_aug.LatentCache"
_OWN_NAMES = ("words", "checksums", "variants", "keys")
_ENTRY_BYTES = 8 + 4 + 2 + KEY_BYTES  # of `_OWN_NAMES`; see `cytosyn_aug.cache.records`


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of every record: its name, its shape without the batch, its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "float16", "float32"):
            raise ValueError(
                f"field {self.name!r} is {self.dtype}, expected uint8, float16 or float32"
            )
        if self.name in _OWN_NAMES or not self.name.isidentifier():
            raise ValueError(f"a field cannot be named {self.name!r}; choose another word")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"field {self.name!r} has shape {self.shape}, expected sides >= 1")

    @property
    def num_bytes(self) -> int:
        """Bytes of one record's tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """Everything that decides what a cache holds; its digest names all of it.

    Attributes:
        tile: Tiles whose pixels are the keys.
        fields: What a record holds.
        model_digest: Digest of the model the records were computed with.
        recipe: Canonical JSON of whatever else decides them, such as an `EditRecipe`, the digests
            of references, seeds and the dtype of the networks.
        num_variants: Records there may be for one tile, numbered from 0.
        keeps_structure: Whether masks and boxes of the tile are true of its variants too.

    Example:
        >>> from cytosyn_aug.config import TileSpec
        >>> fields = (Field("cls", (768,), "float32"),)
        >>> spec = CacheSpec(tile=TileSpec(), fields=fields, model_digest="0123456789abcdef")
        >>> spec.record_bytes
        3118
        >>> CacheSpec.from_json(spec.to_json()) == spec
        True
    """

    tile: TileSpec
    fields: tuple[Field, ...]
    model_digest: str
    recipe: str = "{}"
    num_variants: int = 1
    keeps_structure: bool = False

    def __post_init__(self) -> None:
        names = [f.name for f in self.fields]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"fields are {names}, expected at least one, each name once")
        if not 1 <= self.num_variants <= MAX_VARIANTS:
            raise ValueError(f"num_variants is {self.num_variants}, expected 1 to {MAX_VARIANTS}")
        try:
            json.loads(self.recipe)
        except ValueError as error:
            raise ValueError(f"recipe is {self.recipe!r}, expected JSON ({error})") from error

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over all fields."""
        return config_digest(self)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record on disk, its part of the shard's own tables included."""
        return _ENTRY_BYTES + sum(f.num_bytes for f in self.fields)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(f.name for f in self.fields)

    def to_json(self) -> str:
        """Return the specification as canonical JSON."""
        return config_json(self)

    @classmethod
    def from_json(cls, text: str) -> CacheSpec:
        """Invert `to_json`.

        Raises:
            ValueError, TypeError: It is not such a text.
        """
        return from_json(cls, json.loads(text))

    def differences(self, other: CacheSpec) -> list[str]:
        """Name each setting that differs from another specification, with both values."""
        mine, its = ({**asdict(s), "recipe": json.loads(s.recipe)} for s in (self, other))
        return [f"{path} {its} for {mine}" for path, mine, its in _differing("", mine, its)]


def _differing(path: str, mine: Any, its: Any) -> Iterator[tuple[str, Any, Any]]:  # Any: JSON
    """Yield where two values differ, by the innermost names and positions that both have."""
    if isinstance(mine, dict) and isinstance(its, dict):
        for key in mine | its:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differing(inner, mine.get(key), its.get(key))
    elif isinstance(mine, list | tuple) and isinstance(its, list | tuple) and len(mine) == len(its):
        for number, pair in enumerate(zip(mine, its, strict=True)):
            yield from _differing(f"{path}[{number}]", *pair)
    elif mine != its:
        yield path, mine, its


def create_cache(folder: Path, spec: CacheSpec) -> None:
    """Write `cache.json`, unless another process does first; compare what `read_spec` finds then.

    Raises:
        OSError: The folder cannot be written.
    """
    content = {
        "kind": _KIND,
        "format_version": FORMAT_VERSION,
        "digest": spec.digest,
        "spec": json.loads(spec.to_json()),
    }
    final = folder / CACHE_NAME
    mine = folder / f".{CACHE_NAME}.{uuid.uuid4().hex}.tmp"
    try:
        (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(mine, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: no cache can be created here; give a folder that can be written",
            str(folder),
        ) from error
    try:
        os.link(mine, final)  # fails if the name is taken, unlike a rename
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not final.exists():
            mine.replace(final)
    finally:
        mine.unlink(missing_ok=True)


def read_spec(folder: Path) -> CacheSpec:
    """Read `cache.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another version.
    """
    file = folder / CACHE_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {CACHE_NAME}; give a cache's folder, or pass spec to create one"
        )
    try:
        content = json.loads(file.read_text())
        if content["kind"] != _KIND or content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{content['kind']} of format_version {content['format_version']}, this release "
                f"reads {_KIND} of {FORMAT_VERSION}"
            )
        spec = CacheSpec.from_json(json.dumps(content["spec"]))
        if spec.digest != content["digest"]:
            raise ValueError(f"digest {content['digest']}, but its settings have {spec.digest}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or of another version ({error}); fill a new cache"
        ) from error
    return spec


def check_equal(folder: Path, stored: CacheSpec, spec: CacheSpec) -> None:
    """Raise `ValueError`, with the differences, if a cache holds something else than asked for."""
    if stored != spec:
        raise ValueError(
            f"{folder} is a cache of digest {stored.digest} for model {stored.model_digest}, "
            f"asked for is {spec.digest} for model {spec.model_digest}: "
            f"{'; '.join(spec.differences(stored))}; use another folder, or remove this one"
        )
