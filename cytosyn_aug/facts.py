"""What a sample says of its tiles beside their pixels: label, slide, laboratory.

Found by key in any mapping of the sample, however nested: {"image": ..., "slide": ...} or (image,
{"slide": ...}). A label may also be the last element of a tuple, as data sets return it. One value
serves all tiles of a batch; else there is one for each, as collation gives them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cytosyn_aug.images import is_image

LABEL, SLIDE, LABORATORY = "label", "slide", "laboratory"


class Facts(NamedTuple):
    """One value a tile; None for what was not asked, or labels that are not there.

    Attributes:
        labels: Classes.
        slides: Names of slides.
        laboratories: Names of the laboratories the tiles come from.
    """

    labels: list[Hashable] | None = None
    slides: list[Hashable] | None = None
    laboratories: list[Hashable] | None = None


NO_FACTS = Facts()


def read_labels(sample: object, num: int) -> list[Hashable] | None:
    """Return the labels of a sample's tiles: under the key "label", or last in a tuple.

    Raises:
        ValueError: Another number of labels than tiles.
    """
    found = _find(sample, LABEL)
    if found is None and isinstance(sample, tuple | list) and len(sample) > 1:
        last = sample[-1]
        found = None if is_image(last) or isinstance(last, Mapping) else last
    return None if found is None else _spread(found, num, LABEL)


def read_fact(sample: object, key: str, num: int) -> list[Hashable]:
    """Return what a sample says under a key, for each of its tiles.

    Raises:
        ValueError: It says nothing, or another number of values than tiles.
    """
    found = _find(sample, key)
    if found is None:
        raise ValueError(
            f"the sample says no {key}, which this transform draws by; pass it in a dictionary, "
            f'as {{"image": ..., "{key}": ...}} or (image, {{"{key}": ...}})'
        )
    return _spread(found, num, key)


def _find(sample: object, key: str) -> Any:  # Any: whatever the user keeps there
    if isinstance(sample, Mapping):
        if key in sample:
            return sample[key]
        sample = tuple(sample.values())
    if isinstance(sample, tuple | list):
        for part in sample:
            found = _find(part, key)
            if found is not None:
                return found
    return None


def _spread(value: Any, num: int, key: str) -> list[Hashable]:
    value = _plain(value)
    if not isinstance(value, tuple | list):
        return [value] * num
    if len(value) != num:
        raise ValueError(
            f"the sample has {num} tiles and {len(value)} values under {key!r}; give one a tile, "
            "or one for all"
        )
    return [_plain(x) for x in value]


def _plain(value: Any) -> Any:
    """Return Python's own for tensors, and for numpy's numbers, texts and arrays."""
    return value.tolist() if isinstance(value, Tensor) or hasattr(value, "tolist") else value
