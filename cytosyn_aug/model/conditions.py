"""Precomputed features as conditions: read from files, cut to the CLS half, checked for scale.

H0-mini is gated apart from CytoSyn, and features are often computed once for a whole cohort, so
whatever needs features also takes precomputed ones: as rows in order, or looked up by a tile's
own pixels where the order is not known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cytosyn_aug.images import tile_key

Conditions = Tensor | np.ndarray | Path | str

# Root mean square of a feature. Normalised transformer outputs lie near 1; far outside this range
# they were scaled, quantised or taken from another layer; 768 or 1536 values of unit length have
# 0.036 and 0.026.
_SMALLEST, _LARGEST = 5e-2, 1e2


def read_conditions(source: Conditions, width: int, num_tiles: int | None = None) -> Tensor:
    """Return CLS vectors ready for a transformer.

    Args:
        source: [N, width], or [N, 2 width] with CLS before the mean of the patch tokens, of which
            the CLS half is kept; or a .npy or .safetensors file (with one tensor, or one named
            `cls` or `features`) that holds such an array.
        width: Width D of the model's condition; 768 for CytoSyn.
        num_tiles: Tiles at hand that the rows belong to; None for conditions of their own. A row
            that is not finite then passes: the encoder failed on that tile, which its transform
            leaves as it is, and the others of its batch are none the worse.

    Returns:
        float32 [N, D].

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Another shape, another number of rows than tiles, values that are not finite
            (see `num_tiles`), or features that were rescaled.
    """
    given = source if isinstance(source, Tensor) else _read(source)
    if given.ndim != 2 or given.shape[1] not in (width, 2 * width) or len(given) == 0:
        raise ValueError(
            f"conditions have shape {list(given.shape)}, expected [N, {width}] (CLS) or "
            f"[N, {2 * width}] (CLS and mean of patches) with N >= 1; "
            "use the encoder this model was trained with"
        )
    if num_tiles is not None and len(given) != num_tiles:
        raise ValueError(f"{len(given)} rows of features for {num_tiles} tiles; expected as many")
    cls = given[:, :width].float()
    if num_tiles is None:
        check_finite(cls)
    _check_length(given)
    _check_length(cls)
    _check_scale(cls)
    return cls


def check_finite(cls: Tensor) -> None:
    """Raise ValueError unless all conditions are finite."""
    if not cls.isfinite().all():
        raise ValueError("conditions hold values that are not finite; recompute the features")


class FeatureTable:
    """Precomputed CLS vectors of tiles, looked up by the tiles' pixels, so in any order.

    Held in memory: 3 KB per tile for 768 features. Tiles must arrive as they were when the table
    was made, so look-ups come before cropping, flipping or any change of colour.

    Args:
        images: uint8 [N, 3, H, W], the tiles.
        features: Their CLS vectors, one per row: a tensor, an array, or a .npy or
            .safetensors file.
        width: Width D of the model's condition; 768 for CytoSyn.

    Raises:
        ValueError: Another number of rows than tiles, another width, values that are not finite, or
            features that were rescaled.

    Example:
        >>> tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> table = FeatureTable(tiles, torch.randn(2, 768), width=768)
        >>> table(tiles.flip(0)).shape
        torch.Size([2, 768])
    """

    def __init__(self, images: Tensor, features: Conditions, *, width: int = 768) -> None:
        # A copy: `generator.features(tiles).cls` is a view, which keeps and pickles all tokens.
        self.cls = read_conditions(features, width, len(images)).to("cpu", copy=True)
        check_finite(self.cls)
        self._row = {tile_key(image): k for k, image in enumerate(images)}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of tiles.

        Args:
            images: uint8 [B, 3, H, W], any device.

        Returns:
            float32 [B, D] on the CPU.

        Raises:
            ValueError: A tile is not in the table, all of them named by position.
        """
        rows = [self._row.get(tile_key(image)) for image in images]
        unknown = [k for k, row in enumerate(rows) if row is None]
        if unknown:
            raise ValueError(
                f"tiles {unknown} of {len(images)} are not among the {len(self._row)} with "
                "precomputed features; were they cropped, flipped or stored lossily since? Look "
                "features up before any other transform"
            )
        return self.cls[[row for row in rows if row is not None]]


def _check_length(features: Tensor) -> None:
    """Refuse unit vectors; the zero vector, the null condition, is let through."""
    norm = features.double().norm(dim=1)
    norm = norm[norm > 0]
    if len(norm) and bool(((norm - 1).abs() < 1e-3).all()):
        raise ValueError(
            "conditions all have length 1: they were L2-normalised, which the model never saw; "
            "pass the encoder's raw CLS vectors"
        )


def _check_scale(cls: Tensor) -> None:
    rms = cls.double().square().mean(1).sqrt()
    rms = rms[rms > 0]
    if len(rms) and not _SMALLEST < float(rms.median()) < _LARGEST:
        raise ValueError(
            f"conditions have a root mean square of {float(rms.median()):.3g}, expected about 1; "
            "pass the encoder's raw CLS vectors"
        )


def _read(source: np.ndarray | Path | str) -> Tensor:
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source.astype(np.float32, copy=False))
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a .npy or .safetensors file")
    if file.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))
        except (ValueError, EOFError) as error:
            reason = f"{file} is not an array of numbers; save the features with numpy.save"
            raise ValueError(reason) from error  # NumPy's own advice is to run code in it
    if file.suffix == ".safetensors":
        return _only_tensor(file)
    raise ValueError(f"{file.name} is neither .npy nor .safetensors; save the features as either")


def _only_tensor(file: Path) -> Tensor:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}); write it again") from error
    named = [k for k in ("cls", "features") if k in tensors]
    if not named and len(tensors) != 1:
        raise ValueError(
            f"{file} holds {sorted(tensors)}; expected one tensor, or one named cls or features"
        )
    return tensors[named[0]] if named else next(iter(tensors.values()))
