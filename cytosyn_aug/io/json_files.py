"""Small frozen dataclasses of numbers as JSON files: named, versioned, read strictly."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from cytosyn_aug.io.files import write_atomically

FORMAT_VERSION = 1
_T = TypeVar("_T")


def record_to_dict(record: Any) -> dict[str, Any]:  # Any: a dataclass, and JSON
    """Return a dataclass as JSON holds it, with its name and the version of the format."""
    name = type(record).__name__
    return {
        "kind": f"cytosyn_aug.{name}",
        "format_version": FORMAT_VERSION,
        **{k: _thawed(v) for k, v in asdict(record).items()},
    }


def record_from_dict(kind: type[_T], content: object, name: str = "the dictionary") -> _T:
    """Invert `record_to_dict`.

    Raises:
        ValueError: Of another kind or version, or with other fields.
    """
    wanted = f"cytosyn_aug.{kind.__name__}"
    if not isinstance(content, dict) or content.get("kind") != wanted:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name} holds {found}, expected {wanted}; give what its save() wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format_version {content.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}; fit and save it again"
        )
    values = {k: _frozen(v) for k, v in content.items() if k not in ("kind", "format_version")}
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != names:
        raise ValueError(
            f"{name} has the fields {sorted(values)}, expected {sorted(names)}; fit it again"
        )
    return kind(**values)


def save_record(file: Path | str, record: Any) -> None:  # Any: a dataclass
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
    try:
        content = json.loads(Path(file).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fit and save it again") from error
    return record_from_dict(kind, content, str(file))


def _thawed(value: Any) -> Any:  # Any: a field, and JSON
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:  # Any: JSON
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
