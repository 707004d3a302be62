"""Edits: what makes a variant of a tile, a transform or a function, named for a cache's recipe.

A transform names itself: its class and its public attributes, models and references by digest. A
function cannot, so somebody has to say what it does. A transform is run with seeds instead of
torch's generator, tile by tile, so that a variant does not depend on the batch it is made in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.transforms.schedules import Ramp
from cytosyn_aug.transforms.serialization import identify_argument
from cytosyn_aug.transforms.tile_transform import TileTransform

# From uint8 images [B, 3, H, W] and one seed a tile to uint8 images of the same shape, or, for a
# store of latents, to whitened latents [B, C, h, w].
Edit = Callable[[Tensor, list[int]], Tensor]
# Not the edit's: a filled variant is always edited, and drawn with a probability afterwards.
_NOT_NAMED = ("p", "training")


def describe_edits(
    edits: Sequence[TileTransform | Edit], seed: int, recipe: object
) -> dict[str, object]:
    """Return all that decides variants, as JSON holds it.

    Args:
        edits: One a variant.
        seed: Base seed.
        recipe: What the edits do that do not name themselves; None if all do.

    Raises:
        TypeError: An edit, or a setting of one, has no name, and there is no recipe.
        ValueError: No edits, or one that depends on epochs, slides or laboratories.
    """
    if not edits:
        raise ValueError("edits is empty, expected one a variant")
    named = [_describe(number, edit, recipe is not None) for number, edit in enumerate(edits)]
    return {"edits": named, "seed": seed, "recipe": recipe}


class Made(NamedTuple):
    """What an edit made of tiles: images or latents, and bool [B], which its networks failed on."""

    results: Tensor
    is_failed: Tensor


def run_edit(edit: TileTransform | Edit, images: Tensor, seeds: list[int]) -> Made:
    """Edit all of some images uint8 [B, 3, H, W], by one seed a tile."""
    if not isinstance(edit, TileTransform):
        results = _checked(edit(images, seeds), "the edit")
        if results.dtype == torch.uint8 or len(results) != len(images):
            return Made(results, torch.zeros(len(images), dtype=torch.bool))
        return Made(results, ~results.isfinite().flatten(1).all(1).cpu())
    params = _draw(edit, images, seeds)
    num_failed = edit.num_failed
    results = _checked(edit.transform(images, params), type(edit).__name__)
    is_failed = torch.zeros(len(images), dtype=torch.bool)
    if edit.num_failed > num_failed:
        # It says how many. They came back unchanged, and so did tiles that it refused.
        for row in (results == images).flatten(1).all(1).nonzero()[:, 0].tolist():
            num_failed = edit.num_failed
            edit.transform(images[row : row + 1], {k: v[row : row + 1] for k, v in params.items()})
            is_failed[row] = edit.num_failed > num_failed
    return Made(results, is_failed)


def check_draws(edit: TileTransform, name: str) -> None:
    """Raise ValueError for a transform that draws by what an edit is not told."""
    if getattr(edit, "mode", "tile") != "tile" or getattr(edit, "sampling", "") == "own_excluded":
        raise ValueError(
            f"{name}, a {type(edit).__name__}, draws by slide or laboratory, and an edit is told "
            "neither; use mode='tile' and another sampling"
        )


def _checked(results: object, name: str) -> Tensor:
    if not isinstance(results, Tensor):
        raise TypeError(
            f"{name} gives {type(results).__name__} for a batch, expected a tensor; give what "
            "edits one image to one"
        )
    return results


def _draw(edit: TileTransform, images: Tensor, seeds: list[int]) -> dict[str, list[object]]:
    """Draw for every tile from its own seed, and let torch's generator be as it was."""
    drawing = copy.copy(edit)
    drawing.p = 1.0
    params: dict[str, list[object]] = {}
    state = torch.get_rng_state()
    try:
        for image, seed in zip(images, seeds, strict=True):
            # That of the CPU alone: draws of transforms come from nowhere else.
            torch.default_generator.manual_seed(seed)
            for name, values in drawing.make_params([image[None]]).items():
                params.setdefault(name, []).extend(values)
    finally:
        torch.set_rng_state(state)
    return params


def _describe(number: int, edit: TileTransform | Edit, has_recipe: bool) -> dict[str, object]:
    if not isinstance(edit, TileTransform):
        if not has_recipe:
            raise TypeError(
                f"edit {number} is a function, whose settings nobody could compare later; give a "
                "transform of cytosyn_aug, or say with recipe= what it does and with what"
            )
        return {"kind": "function"}
    kind = type(edit)
    check_draws(edit, f"edit {number}")
    named: dict[str, object] = {"kind": f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"}
    for name, value in vars(edit).items():
        if name.startswith("_") or name in _NOT_NAMED:
            continue
        if isinstance(value, Ramp):
            raise ValueError(
                f"{name} of edit {number}, a {kind.__name__}, is a Ramp over epochs; variants are "
                "made once, so give a number"
            )
        try:
            named[name] = identify_argument(value)
        except TypeError as error:
            if not has_recipe:
                raise TypeError(
                    f"{name} of edit {number}, a {kind.__name__}, has no name to compare later "
                    f"({type(value).__name__}); say with recipe= what it is"
                ) from error
            named[name] = {"kind": "unnamed", "type": type(value).__name__}
    return named
