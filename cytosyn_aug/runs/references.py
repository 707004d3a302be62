"""References of a run: loaded or fitted, by name, with the digests that are recorded.

A folder's identity is the content of the files that are fitted to, since fitting to them gives
slightly different numbers on different machines, which must not make them different runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.config import Method
from cytosyn_aug.images import density_to_grey
from cytosyn_aug.io.slide import Slide
from cytosyn_aug.io.tile_source import sampled_files
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import DensityMoments, pool_moments
from cytosyn_aug.stain.lab import lab_to_grey
from cytosyn_aug.stain.methods import KINDS, AnyReference, fit_reference
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.stain.reinhard import ReinhardReference
from cytosyn_aug.stain.transport import DensityReference

Given = AnyReference | Path | str | Sequence[Path | str]
References = Mapping[str, Given] | Sequence[Given]


def open_references(
    given: References, generator: TileGenerator | None, method: Method = "cytosyn"
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Load or fit references.

    Args:
        given: References, saved ones (.json), folders of tiles or slides, or several of these two
            for one reference; by name, or named after their files.
        generator: The model they are for; only "cytosyn" needs one.
        method: What they are for; each has references of its own kind.

    Returns:
        References of that kind by name (Any: one of four), and the name and digest of each.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A name twice, another model's or method's reference, or tiles it cannot be
            fitted to.
    """
    if not isinstance(given, Mapping):
        named = _named(given)
        twice = {name for name, _ in named if sum(other == name for other, _ in named) > 1}
        if twice:
            raise ValueError(
                f"references {sorted(twice)} are given twice, or are of one name; rename one"
            )
        given = dict(named)
    if method not in KINDS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(KINDS)}")
    references, identities = {}, []
    for name, source in given.items():
        reference, digest = _open(source, generator, method)
        if not isinstance(reference, KINDS[method]):
            raise ValueError(
                f"{name} is a {type(reference).__name__}, expected a {KINDS[method].__name__} for "
                f"method {method}; fit one, or give the folder of tiles"
            )
        if isinstance(reference, StainReference) and generator is not None:
            reference.check_model(generator)
        references[name] = reference
        identities.append({"name": name, "sha256": digest})
    return references, identities


def describe_references(
    given: References,
    opened: Mapping[str, Any],  # Any: one of four kinds
) -> list[dict[str, Any]]:  # Any: JSON
    """Return name, place and mean colour of references, for those who read about a run.

    Args:
        given: What `open_references` was given.
        opened: What it returned.

    Returns:
        `name`, `place` (absolute paths, or None of an object) and `rgb`, the mean colour of
        tissue in grey levels, or None of a Macenko reference, which has none.
    """
    sources = given if isinstance(given, Mapping) else dict(_named(given))
    return [
        {
            "name": name,
            "place": ", ".join(str(Path(x).absolute()) for x in _paths(source)) or None,
            "rgb": _mean_colour(opened[name]),
        }
        for name, source in sources.items()
    ]


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _open(
    source: Given, generator: TileGenerator | None, method: Method
) -> tuple[AnyReference, str]:
    paths = _paths(source)
    if isinstance(source, AnyReference):
        return source, _digest(source)
    if len(paths) == 1 and paths[0].suffix == ".json":
        reference = KINDS[method].load(paths[0])
        return reference, _digest(reference)
    saved = [str(path) for path in paths if path.suffix == ".json"]
    if saved or not paths:
        raise ValueError(
            f"one reference of several is fitted to folders and slides, got {saved or 'none'}; "
            "give a saved one alone"
        )
    fitted = fit_reference(method, paths if len(paths) > 1 else paths[0], generator)
    digests = [_source_digest(path) for path in paths]
    return fitted, digests[0] if len(paths) == 1 else _text_digest(digests)


def _paths(source: Given) -> list[Path]:
    if isinstance(source, AnyReference):
        return []
    return [Path(x) for x in ([source] if isinstance(source, Path | str) else source)]


def _named(given: Sequence[Given]) -> list[tuple[str, Given]]:
    return [(_name(source, k), source) for k, source in enumerate(given)]


def _mean_colour(reference: AnyReference) -> list[float] | None:
    if isinstance(reference, ReinhardReference):
        grey = lab_to_grey(torch.tensor(reference.mean)[None, :, None, None])
    elif isinstance(reference, StainReference):
        grey = density_to_grey(pool_moments(DensityMoments(*reference.moments)).mean)
    elif isinstance(reference, DensityReference):
        grey = density_to_grey(torch.tensor(reference.mean))
    else:
        return None
    return [round(value, 1) for value in grey.flatten().tolist()]


def _name(source: Given, position: int) -> str:
    names = (
        path.stem if path.suffix == ".json" else path.resolve().name for path in _paths(source)
    )
    return "+".join(names) or f"reference_{position}"


def _digest(reference: AnyReference) -> str:
    if isinstance(reference, StainReference):
        return tensors_digest([reference.cls, *reference.moments])
    return _text_digest(reference)


def _source_digest(source: Path) -> str:
    if source.is_dir():
        files = sampled_files(source)
        names = [(f.relative_to(source).as_posix(), _file_digest(f)) for f in files]
    else:
        with Slide(source, mpp=1.0) as slide:  # too large to read as a whole
            names = [(source.name, f"{source.stat().st_size} {slide.identity}")]
    return _text_digest(names)


def _text_digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
