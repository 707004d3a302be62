"""Frozen dataclasses as JSON: converted exactly, read strictly, and in files with name and version.

A field may hold numbers, text, tuples and other dataclasses, nested as its annotation says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from cytosyn_aug.config import Json
from cytosyn_aug.io.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 1
_T = TypeVar("_T", bound="DataclassInstance")


def to_json(record: DataclassInstance) -> Json:
    """Return all fields of a dataclass as JSON holds them: tuples become lists."""
    return {k: _with_lists(v) for k, v in asdict(record).items()}


def from_json(kind: type[_T], content: object, name: str = "the dictionary") -> _T:
    """Invert `to_json`: build a dataclass, those inside it, and tuples from lists.

    Args:
        kind: The dataclass.
        content: What `to_json` returned.
        name: Where the content comes from, for messages.

    Raises:
        ValueError: No dictionary, or one with other fields.
    """
    names = {f.name for f in fields(kind)}
    if not isinstance(content, dict) or content.keys() != names:
        stated = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name} has the fields {stated}, expected {sorted(names)}")
    types = get_type_hints(kind)
    return kind(**{k: _of_type(types[k], v, f"{name}: {k}") for k, v in content.items()})


def record_to_dict(record: DataclassInstance) -> Json:
    """Return a dataclass as JSON holds it, with its name and the version of the format."""
    return {
        "kind": f"cytosyn_aug.{type(record).__name__}",
        "format_version": FORMAT_VERSION,
        **to_json(record),
    }


def record_from_dict(kind: type[_T], content: object, name: str = "the dictionary") -> _T:
    """Invert `record_to_dict`.

    Raises:
        ValueError: Of another kind or version, or with other fields.
    """
    header = check_kind(content, f"cytosyn_aug.{kind.__name__}", name)
    values = {k: v for k, v in header.items() if k not in ("kind", "format_version")}
    try:
        return from_json(kind, values, name)
    except ValueError as error:
        raise ValueError(f"{error}; fit and save it again") from error


def check_kind(content: object, kind: str, name: str) -> Json:
    """Return a dictionary that states this kind and the version that is read here.

    Raises:
        ValueError: It states another, both sides named.
    """
    if not isinstance(content, dict) or content.get("kind") != kind:
        stated = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name} holds {stated}, expected {kind}; give what its save() wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format_version {content.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}; fit and save it again"
        )
    return content


def save_record(file: Path | str, record: DataclassInstance) -> None:
    """Write a dataclass to a .json file.

    Raises:
        ValueError: The name does not end in .json.
    """
    file = Path(file)
    if file.suffix != ".json":
        raise ValueError(f"{type(record).__name__} is saved as .json, got {file.name!r}")
    write_atomically(file, json.dumps(record_to_dict(record), indent=2).encode())


def load_record(kind: type[_T], file: Path | str) -> _T:
    """Read a dataclass that `save_record` wrote.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Not JSON, or not of this kind.
    """
    return record_from_dict(kind, read_json(Path(file), "fit and save it again"), str(file))


def read_json(file: Path, advice: str) -> Json:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError: No file; the message ends with the advice.
        ValueError: The file holds no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {advice}")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected an object; {advice}")
    return content


def _with_lists(value: Any) -> Any:  # Any: a field, and JSON
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return [_with_lists(v) for v in value] if isinstance(value, tuple | list) else value


def _of_type(annotation: Any, value: Any, name: str) -> Any:  # Any: an annotation, JSON, a field
    if isinstance(annotation, type) and is_dataclass(annotation):
        return from_json(annotation, value, name)
    if not isinstance(value, list):
        return value
    types = get_args(annotation) if get_origin(annotation) is tuple else ()
    is_alike = len(types) == 2 and types[1] is ...
    each = repeat(types[0]) if is_alike else types if len(types) == len(value) else repeat(Any)
    return tuple(_of_type(one, v, name) for one, v in zip(each, value, strict=False))
