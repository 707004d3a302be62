"""References for a run: by name, from wherever they are given, and with an identity to record.

A folder's identity is that of its files, since fitting to them gives slightly different numbers on
different machines, which must not make them different runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.image_files import TILE_SUFFIXES
from cytosyn_aug.inputs import walk
from cytosyn_aug.reference import StainReference

References = Mapping[str, StainReference | Path | str] | Sequence[StainReference | Path | str]


def open_references(
    given: References, generator: TileGenerator
) -> tuple[dict[str, StainReference], list[dict[str, str]]]:
    """Load or fit references.

    Args:
        given: References, saved ones (.json) or folders of tiles; by name, or named after their
            files.
        generator: The model they are for.

    Returns:
        References by name, and the name and digest of each.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A name twice, another model's reference, or tiles it cannot be fitted to.
    """
    if not isinstance(given, Mapping):
        named = [(_name(source, k), source) for k, source in enumerate(given)]
        twice = {name for name, _ in named if sum(other == name for other, _ in named) > 1}
        if twice:
            raise ValueError(
                f"references {sorted(twice)} are given twice, or are of one name; rename one"
            )
        given = dict(named)
    references, identities = {}, []
    for name, source in given.items():
        if isinstance(source, StainReference):
            references[name] = source
            digest = tensors_digest(_tensors(source))
        elif Path(source).suffix == ".json":
            references[name] = StainReference.load(source)
            digest = tensors_digest(_tensors(references[name]))
        else:
            references[name] = StainReference.fit(generator, source)
            digest = _source_digest(Path(source))
        references[name].check_model(generator)
        identities.append({"name": name, "sha256": digest})
    return references, identities


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _name(source: StainReference | Path | str, position: int) -> str:
    if isinstance(source, StainReference):
        return f"reference_{position}"
    return Path(source).stem if Path(source).suffix == ".json" else Path(source).resolve().name


def _tensors(reference: StainReference) -> list[Tensor]:
    return [reference.cls, *reference.moments]


def _source_digest(source: Path) -> str:
    files = [(source.name, source.stat().st_size)]
    if source.is_dir():
        files = [f for f in walk(source) if f[0].lower().endswith(TILE_SUFFIXES)]
    return hashlib.sha256(repr(files).encode()).hexdigest()
