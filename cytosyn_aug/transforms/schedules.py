"""Probabilities and strengths that change with the epoch or differ between classes.

Explicit: the training loop says `transform.set_epoch(epoch)`, nothing counts steps on its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number in [0, 1] that moves linearly over the first epochs and then stays.

    Attributes:
        start: Value in epoch 0.
        end: Value in epoch `num_epochs - 1` and all later ones.
        num_epochs: Epochs the way takes, at least 2.

    Example:
        >>> [Ramp(0.0, 1.0, 3).at(epoch) for epoch in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """

    start: float
    end: float
    num_epochs: int

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of a Ramp is {value}, expected 0 to 1")
        if self.num_epochs < 2:
            raise ValueError(f"num_epochs of a Ramp is {self.num_epochs}, expected at least 2")

    def at(self, epoch: int) -> float:
        """Return the value in an epoch, counted from 0."""
        share = min(1.0, epoch / (self.num_epochs - 1))
        return (1 - share) * self.start + share * self.end


Scheduled = float | Ramp
Probability = Scheduled | Mapping[Hashable, Scheduled]


def check_scheduled(name: str, value: Scheduled) -> None:
    """Raise ValueError unless a strength or probability is a Ramp or a number in [0, 1]."""
    if isinstance(value, Ramp):
        return
    if not isinstance(value, SupportsFloat) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected a number between 0 and 1, or a Ramp")


def check_probability(p: Probability) -> None:
    """Raise ValueError unless `p` is a number in [0, 1], a Ramp, or a mapping of class to them."""
    if not isinstance(p, Mapping):
        return check_scheduled("p", p)
    if not p:
        raise ValueError("p is an empty mapping, expected a probability for every class")
    for name, value in p.items():
        check_scheduled(f"p of class {name!r}", value)
    return None


def value_at(value: Scheduled, epoch: int) -> float:
    """Return a strength or probability in an epoch."""
    return value.at(epoch) if isinstance(value, Ramp) else float(value)


def probabilities(
    p: Probability, epoch: int, labels: Sequence[Hashable] | None, num: int
) -> list[float]:
    """Return the probability of each of `num` tiles.

    Args:
        p: A number, a Ramp, or one of them for every class.
        epoch: The current epoch.
        labels: Classes of the tiles; None where `p` is not by class.
        num: Number of tiles.

    Raises:
        ValueError: `p` is by class and there is no label, or a class is not in it.
    """
    if not isinstance(p, Mapping):
        return [value_at(p, epoch)] * num
    if labels is None:
        raise ValueError(
            "p is given by class, and the sample carries no label; pass it as "
            '{"image": ..., "label": ...} or as the last of a tuple (image, label)'
        )
    unknown = sorted({repr(x) for x in labels if x not in p})
    if unknown:
        known = ", ".join(sorted(repr(x) for x in p))
        raise ValueError(
            f"p is given for the classes {known}, and the sample has {', '.join(unknown)}; "
            "give p for every class, 0 for those to leave alone"
        )
    return [value_at(p[x], epoch) for x in labels]
