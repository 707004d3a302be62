"""Which references a tile is restained to: drawn over laboratories, per tile or per slide.

Laboratories are drawn before references, so that one with many slides is no likelier than one
with few. A reference without a laboratory's name counts as a laboratory of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

Sampling = Literal["uniform", "farthest", "own_excluded"]
DrawScope = Literal["tile", "slide"]
MAX_SEED = 2**62
_T = TypeVar("_T")


def group_by_laboratory(names: Sequence[str]) -> list[list[int]]:
    """Return the positions of references, one list per laboratory, in order of appearance."""
    groups: dict[object, list[int]] = {}
    for position, name in enumerate(names):
        groups.setdefault(name or position, []).append(position)
    return list(groups.values())


def draw_references(
    groups: Sequence[Sequence[int]], count: int, generator: torch.Generator | None
) -> list[int]:
    """Draw references of different laboratories, as far as there are enough.

    Args:
        groups: References by laboratory.
        count: How many.
        generator: Source of randomness; None for torch's own.

    Returns:
        `count` positions. None repeats before all were drawn; no laboratory before all were.
    """
    if count <= len(groups):  # no shuffling of hundreds of slides for one draw
        return [
            groups[k][_below(len(groups[k]), generator)]
            for k in _distinct(len(groups), count, generator)
        ]
    drawn: list[int] = []
    while len(drawn) < count:
        left = [_shuffled(group, generator) for group in groups]
        while any(left) and len(drawn) < count:
            filled = [group for group in left if group]
            drawn += [group.pop() for group in _shuffled(filled, generator)]
    return drawn[:count]


def without_laboratory(
    groups: Sequence[Sequence[int]], names: Sequence[str], own: Hashable, count: int = 1
) -> list[Sequence[int]]:
    """Return the laboratories but one.

    Raises:
        ValueError: Fewer than `count` references are left.
    """
    left = [group for group in groups if names[group[0]] != own]
    if not left:
        raise ValueError(
            f"all references are of laboratory {own!r}, the sample's own, which "
            "sampling='own_excluded' leaves out; add references of another laboratory"
        )
    num_left = sum(map(len, left))
    if num_left < count:
        raise ValueError(
            f"{count} views of a tile need as many references, or some would be alike; only "
            f"{num_left} reference(s) are of other laboratories than {own!r}, the sample's own, "
            "which sampling='own_excluded' leaves out; add some, or ask for fewer views"
        )
    return left


def farthest_references(
    statistics: Tensor, references: Tensor, groups: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """Return for each tile the references whose stain differs most from its own.

    Args:
        statistics: [B, 9], the tiles' stain; see `cytosyn_aug.stain.density.moment_statistics`.
        references: [R, 9], the references' stain.
        groups: References by laboratory.
        count: How many per tile; they repeat where there are fewer.

    Returns:
        B lists of `count` positions: the farthest, the farthest of another laboratory, and so on;
        no laboratory comes again before all came.
    """
    distance = torch.cdist(statistics, references.to(statistics))
    order = distance.argsort(dim=1, descending=True).tolist()
    laboratory = {k: number for number, group in enumerate(groups) for k in group}
    rows = [_in_rounds(row, laboratory) for row in order]
    return [[row[k % len(row)] for k in range(count)] for row in rows]


def _in_rounds(order: Sequence[int], laboratory: Mapping[int, int]) -> list[int]:
    """Sort references into rounds, each with the next of every laboratory that has one left."""
    seen: Counter[int] = Counter()
    rounds = []
    for k in order:
        rounds.append(seen[laboratory[k]])
        seen[laboratory[k]] += 1
    return [k for _, k in sorted(zip(rounds, order, strict=True), key=lambda pair: pair[0])]


def slide_generator(slide: Hashable, epoch: int, seed: int) -> torch.Generator:
    """Return the source of all draws for one slide in one epoch, the same in every worker."""
    text = f"{seed}\n{epoch}\n{slide!r}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
    return torch.Generator("cpu").manual_seed(number)


def _below(limit: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(limit, (), generator=generator, device="cpu")) if limit > 1 else 0


def _distinct(limit: int, count: int, generator: torch.Generator | None) -> list[int]:
    """Return the first `count` numbers of a shuffled range, by Fisher and Yates' shuffle."""
    moved: dict[int, int] = {}
    drawn = []
    for k in range(count):
        other = k + _below(limit - k, generator)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(k, k)
    return drawn


def _shuffled(items: Sequence[_T], generator: torch.Generator | None) -> list[_T]:
    return [
        items[i] for i in torch.randperm(len(items), generator=generator, device="cpu").tolist()
    ]
