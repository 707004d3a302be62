"""Label, slide and laboratory of a sample's tiles, read from beside the images.

Found by key in any mapping of the sample, however nested: {"image": ..., "slide": ...} or (image,
{"slide": ...}). A label may also be the last element of a tuple, as data sets return it. One value
serves all tiles of a batch; else there is one for each, as collation gives them, also as a column
[B, 1]. One-hot labels are refused: which of their numbers would be the class?
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.tv_tensors import TVTensor

from cytosyn_aug.images import is_image

LABEL, SLIDE, LABORATORY = "label", "slide", "laboratory"
_LABEL_ADVICE = (
    "; of one-hot labels pass labels.argmax(-1), the class indices, and of a sample that holds "
    'more than image and label the label by key: {"image": ..., "label": ...}'
)


class SampleMetadata(NamedTuple):
    """One value per tile; None for what was not asked, or labels that are not there.

    Attributes:
        labels: Classes.
        slides: Names of slides.
        laboratories: Names of the laboratories the tiles come from.
    """

    labels: list[Hashable] | None = None
    slides: list[Hashable] | None = None
    laboratories: list[Hashable] | None = None


NO_METADATA = SampleMetadata()


def read_labels(sample: object, num: int) -> list[Hashable] | None:
    """Return the labels of a sample's tiles: under the key "label", or last in a tuple.

    Raises:
        ValueError: Another number of labels than tiles, or several values per tile.
    """
    value, where = _find(sample, LABEL), f"under {LABEL!r}"
    if value is None and isinstance(sample, tuple | list) and len(sample) > 1:
        last = sample[-1]
        if not (is_image(last) or isinstance(last, Mapping | TVTensor)):
            value, where = last, "last in the sample, where its label is"
    return None if value is None else _broadcast(value, num, where, _LABEL_ADVICE)


def read_value(sample: object, key: str, num: int) -> list[Hashable]:
    """Return what a sample says under a key, for each of its tiles.

    Raises:
        ValueError: It says nothing, another number of values than tiles, or several per tile.
    """
    value = _find(sample, key)
    if value is None:
        raise ValueError(
            f"the sample says no {key}, which this transform draws by; pass it in a dictionary, "
            f'as {{"image": ..., "{key}": ...}} or (image, {{"{key}": ...}})'
        )
    return _broadcast(value, num, f"under {key!r}")


def _find(sample: object, key: str) -> Any:  # Any: whatever the user keeps there
    if isinstance(sample, Mapping):
        if key in sample:
            return sample[key]
        sample = tuple(sample.values())
    if isinstance(sample, tuple | list):
        for part in sample:
            value = _find(part, key)
            if value is not None:
                return value
    return None


def _broadcast(value: Any, num: int, where: str, advice: str = "") -> list[Hashable]:
    value = _as_builtin(value)
    if not isinstance(value, tuple | list):
        return [_single(value, where, advice)] * num
    if len(value) != num:
        raise ValueError(
            f"the sample has {num} tiles and {len(value)} values {where}; give one per tile, or "
            f"one for all{advice}"
        )
    return [_single(_as_builtin(x), where, advice) for x in value]


def _single(value: Any, where: str, advice: str) -> Hashable:
    """Return what is said of one tile, of a column its only value."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"the sample has {len(value)} values for a tile {where}, not one{advice}")
    if not isinstance(value, Hashable):
        raise ValueError(
            f"the sample has a {type(value).__name__} {where}, expected a name or a number"
        )
    return value


def _as_builtin(value: Any) -> Any:
    """Return Python's own for tensors, and for numpy's numbers, texts and arrays."""
    return value.tolist() if isinstance(value, Tensor) or hasattr(value, "tolist") else value
