"""Arguments of transforms as JSON holds them: to be read again, or only to be compared.

For albumentations' to_dict and replay a model becomes its handle (no weights), a cache its folder
and digest, a reference all it holds: a written pipeline stands alone but for these folders. For the
recipe of a cache, which has to be the same on every machine, all three become digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.io.json_files import record_from_dict, record_to_dict
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.loading import ModelHandle
from cytosyn_aug.stain.macenko import MacenkoReference
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.stain.reinhard import ReinhardReference
from cytosyn_aug.stain.transport import DensityReference
from cytosyn_aug.transforms.schedules import Ramp

_CACHE = "cytosyn_aug.LatentCache"
_RECORDS = {
    f"cytosyn_aug.{k.__name__}": k for k in (DensityReference, MacenkoReference, ReinhardReference)
}


def write_argument(value: Any) -> Any:  # Any: whatever a transform is given, and JSON
    """Return an argument as dictionaries, lists, strings and numbers.

    Raises:
        TypeError: Nothing another process could read again, such as a function.
    """
    if isinstance(value, TileGenerator):
        return value.handle().to_dict()
    if isinstance(value, LatentCache):
        folder = str(value.folder.absolute())
        return {"kind": _CACHE, "folder": folder, "digest": value.spec.digest}
    if isinstance(value, StainReference):
        return value.to_dict()
    if isinstance(value, DensityReference | MacenkoReference | ReinhardReference):
        return record_to_dict(value)
    if isinstance(value, EditRecipe | Ramp):
        return {"kind": type(value).__name__, **asdict(value)}
    if isinstance(value, Mapping):
        return _write_mapping(value, write_argument)
    if isinstance(value, list | tuple):
        return [write_argument(v) for v in value]
    if isinstance(value, np.generic):
        return write_argument(value.item())
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON; make the pipeline in code, or leave "
        "this argument out of pipelines that are written or replayed"
    )


def read_argument(value: Any) -> Any:  # Any: as above
    """Invert `write_argument`; anything that was not written comes back as it is."""
    if isinstance(value, list | tuple):
        return [read_argument(v) for v in value]
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return value  # a class may be named "kind"; its probability is no text
    fields = {k: v for k, v in value.items() if k != "kind"}
    match value["kind"]:
        case "mapping":
            return {_read_key(k): read_argument(v) for k, v in fields["items"]}
        case "EditRecipe":
            return EditRecipe(**fields)
        case "Ramp":
            return Ramp(**fields)
        case "cytosyn_aug.TileGenerator":
            return TileGenerator.from_handle(ModelHandle.from_dict(value))
        case "cytosyn_aug.LatentCache":
            return _open_cache(**fields)
        case "cytosyn_aug.StainReference":
            return StainReference.from_dict(value)
        case name if name in _RECORDS:
            return record_from_dict(_RECORDS[name], value)
        case _:
            raise ValueError(f"got {value['kind']!r}, which this release does not know")


def identify_argument(value: Any) -> Any:  # Any: as above
    """Return what tells an argument from others, in short, as JSON holds it.

    As `write_argument`, but models, caches and references are named by digest, not by place.

    Raises:
        TypeError: An argument that JSON cannot hold.
    """
    if isinstance(value, TileGenerator):
        return {"kind": "TileGenerator", "digest": value.digest, "networks": str(value.dtype)}
    if isinstance(value, LatentCache):
        return {"kind": "LatentCache", "digest": value.spec.digest}
    if isinstance(value, StainReference):
        text = json.dumps(value.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"kind": "StainReference", "laboratory": value.laboratory, "digest": digest}
    if isinstance(value, Mapping):
        return _write_mapping(value, identify_argument)
    if isinstance(value, list | tuple):
        return [identify_argument(v) for v in value]
    return write_argument(value)


def _write_mapping(mapping: Mapping[Any, Any], write: Callable[[Any], Any]) -> dict[str, Any]:
    # Not as an object: its keys would all become strings.
    return {"kind": "mapping", "items": [[_write_key(k), write(v)] for k, v in mapping.items()]}


def _write_key(key: Any) -> Any:
    if isinstance(key, tuple):  # a list of JSON cannot be a key again
        return {"kind": "tuple", "items": [_write_key(k) for k in key]}
    return write_argument(key)


def _read_key(key: Any) -> Any:
    is_tuple = isinstance(key, dict) and key.get("kind") == "tuple"
    return tuple(_read_key(k) for k in key["items"]) if is_tuple else key


def _open_cache(folder: str, digest: str) -> LatentCache:
    cache = LatentCache.open(folder)
    if cache.spec.digest != digest:
        raise ValueError(
            f"{folder} is a cache of digest {cache.spec.digest}, the pipeline was written with one "
            f"of {digest}: it was filled anew for another model or recipe; make the pipeline anew"
        )
    return cache
