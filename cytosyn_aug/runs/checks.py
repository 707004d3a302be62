"""Checks of a request before anything is loaded: neither torch, a model nor references."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from cytosyn_aug.runs.recipes import AugmentRecipe, Format, ImageFormat, Work

_ADVICE = "load the model with --encoder bioptimus/H0-mini"


def check_augment(
    recipe: AugmentRecipe, format: Format, *, num_references: int, has_encoder: bool = True
) -> None:
    """Refuse to augment where the arguments contradict each other.

    Args:
        recipe: How tiles are augmented.
        format: How results are stored.
        num_references: References to restain to.
        has_encoder: False where it is known that the model will have none.

    Raises:
        ValueError: They do; the message says what to change.
    """
    check_format(format, get_args(Format))
    if recipe.is_bounded and format not in get_args(ImageFormat):
        raise ValueError(
            "bounds on similarity leave results out, and a cache needs all variants of a tile; "
            "write png, webp or tar"
        )
    if not has_encoder:
        _check_encoder_is_not_needed(recipe)
    if recipe.mode == "resample":
        return
    if num_references == 0:
        raise ValueError("mode stain needs references: folders of tiles or saved .json files")
    is_fixed = recipe.preserve == "color" and recipe.strength[0] == recipe.strength[1]
    if is_fixed and recipe.variants > num_references:
        raise ValueError(
            f"{recipe.variants} variants per tile need as many references where strength is one "
            f"number, or they would be alike; got {num_references}. Give more references, a range "
            "of strengths, or fewer variants"
        )


def check_format(format: str, allowed: Iterable[str]) -> None:
    """Refuse a format that a command cannot write."""
    if format not in allowed:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(allowed)}")


def check_count(n: int) -> None:
    """Refuse to generate no tile."""
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")


def check_not_overwritten(cache: Path | str, work: Work) -> None:
    """Refuse to overwrite a cache."""
    if work.overwrite:
        raise ValueError(
            f"{cache} may hold records of other sets of tiles, so overwrite does not remove it; "
            "remove the folder yourself, or use another"
        )


def check_paths(paths: Iterable[Path | str]) -> None:
    """Refuse references that are not there.

    Raises:
        FileNotFoundError: One is missing.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"reference {path} does not exist; give a folder of tiles, a slide or a saved .json"
            )


def check_apart(source: Path | str, out: Path | str) -> None:
    """Refuse results among their sources: the next run would find them.

    Called before references are fitted and slides are looked through, which takes longer.

    Raises:
        FileNotFoundError: There is no IN.
        ValueError: One lies in the other.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a folder, table, tar file or slide")
    inside, folder = out.resolve(), source.resolve()
    if source.is_file():
        if inside == folder.parent:
            raise ValueError(f"OUT {out} is the folder of IN {source}; choose another one")
    elif inside.is_relative_to(folder) or folder.is_relative_to(inside):
        raise ValueError(f"OUT {out} and IN {source} lie in each other; choose folders apart")


def _check_encoder_is_not_needed(recipe: AugmentRecipe) -> None:
    if recipe.mode == "resample":
        raise ValueError(f"mode resample needs an encoder; {_ADVICE}")
    if recipe.preserve == "none":
        raise ValueError(f"preserve 'none' needs an encoder; {_ADVICE}, or use preserve 'color'")
