"""Classical normalisation as transforms: Macenko, Reinhard and transport of optical density.

Baselines that need no model, with the same grammar as all transforms here; see
`cytosyn_aug.transforms.tile_transform`. Each is fitted by its reference, a few numbers that are
saved as JSON:

    reference = MacenkoReference.fit(tiles_or_folder_or_slide)
    normalise = MacenkoNormalize(reference, source=MacenkoReference.fit(tiles_of_this_slide))

Without `source` every tile is changed by its own statistics, and neighbours differ (seams). Tiles
that do not tell their stain (blank, black, of one colour) come back unchanged. With `p` and
`strength` they serve as augmentations too.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cytosyn_aug.images import optical_density
from cytosyn_aug.stain.density import (
    MIN_TISSUE,
    DensityMoments,
    apply_density_map,
    blend_with_identity,
    match_moments,
    recolour_density,
    tissue_moments,
    tissue_weight,
)
from cytosyn_aug.stain.lab import grey_to_lab
from cytosyn_aug.stain.macenko import MacenkoReference, Stains, estimate_stains, normalising_map
from cytosyn_aug.stain.reinhard import ReinhardReference, lab_moments, match_colour
from cytosyn_aug.stain.transport import DensityReference, check_pooled
from cytosyn_aug.transforms.draws import DrawScope
from cytosyn_aug.transforms.sample_metadata import NO_METADATA, SampleMetadata
from cytosyn_aug.transforms.schedules import Probability, Scheduled, check_scheduled, value_at
from cytosyn_aug.transforms.tile_transform import EditedTiles, TileTransform

_CHUNK = 2
ReferenceT = TypeVar("ReferenceT")


# Generic comes first: __init_subclass__ of torchvision does not hand on to what follows it.
class ClassicalTransform(Generic[ReferenceT], TileTransform):
    """What the three share: their arguments and draws. How tiles change is in each.

    Attributes:
        reference_kind: What each is fitted by. A reference of another says other things of a tile.
    """

    reference_kind: type[Any]  # Any: mypy knows no class variable that is generic

    def __init__(
        self,
        reference: ReferenceT,
        *,
        source: ReferenceT | None = None,
        strength: Scheduled = 1.0,
        p: Probability = 1.0,
        mode: DrawScope = "tile",
        seed: int = 0,
    ) -> None:
        super().__init__(p=p, keeps_structure=True, mode=mode, seed=seed)
        check_scheduled("strength", strength)
        self._check_kind("reference", reference)
        if source is not None:
            self._check_kind("source", source)
        self.reference = reference
        self.source = source
        self.strength = strength

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw which tiles are changed; `strengths` are those of this epoch."""
        params = super().make_params(flat_inputs, metadata)
        strength = value_at(self.strength, self.epoch)
        return params | {"strengths": [strength] * len(params["chosen"])}

    def _check_kind(self, name: str, given: object) -> None:
        kind = self.reference_kind.__name__
        if not isinstance(given, self.reference_kind):
            raise TypeError(
                f"{name} is a {type(given).__name__}, and {type(self).__name__} takes a {kind}; "
                f"fit one with {kind}.fit(tiles), or read one with {kind}.load(file)"
            )

    def _tiles_at_once(self, grey: Tensor) -> int:
        """Return what a processor's caches hold the intermediate results of."""
        return _CHUNK if grey.device.type == "cpu" else len(grey)

    def _edit(self, grey: Tensor, params: dict[str, Any]) -> EditedTiles:
        strength = torch.tensor(params["strengths"], dtype=torch.float32, device=grey.device)
        edit = self._change(grey, strength)
        return EditedTiles(edit.grey, edit.is_edited & (strength > 0))

    def _change(self, grey: Tensor, strength: Tensor) -> EditedTiles:
        """Change tiles [n, 3, H, W] by strengths [n]; say which tell their stain."""
        raise NotImplementedError


class MacenkoNormalize(ClassicalTransform[MacenkoReference]):
    """Replace the two stains of tiles by those of a reference, as Macenko et al. (2009).

    Args:
        reference: Where to go.
        source: Stains of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that a tile is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide", which changes all tiles of a slide in an epoch, or none; see
            `StainTransfer`.
        seed: Of the draws of mode "slide".

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=2, steps=2, seed=0)
        >>> slide = MacenkoReference.fit(tiles)  # so that neighbours agree
        >>> MacenkoNormalize(MacenkoReference.fit(tiles[:1]), source=slide)(tiles).shape
        torch.Size([2, 3, 224, 224])
    """

    reference_kind = MacenkoReference

    def _change(self, grey: Tensor, strength: Tensor) -> EditedTiles:
        density = optical_density(grey)
        if self.source is None:
            start = estimate_stains(density)
        else:
            given = self.source.stains(grey.device)
            start = Stains(*(x.expand(len(grey), *x.shape[1:]) for x in given))
        change = normalising_map(start, self.reference.stains(grey.device))
        recoloured = recolour_density(density, blend_with_identity(change, strength))
        has_tissue = tissue_weight(density).mean((1, 2, 3)) >= MIN_TISSUE
        return EditedTiles(recoloured, start.is_sound & has_tissue)


class ReinhardNormalize(ClassicalTransform[ReinhardReference]):
    """Give the tissue of tiles the mean and deviation of a reference's, as Reinhard et al. (2001).

    Args:
        reference: Where to go.
        source: Colour of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that a tile is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide", which changes all tiles of a slide in an epoch, or none; see
            `StainTransfer`.
        seed: Of the draws of mode "slide".

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=2, steps=2, seed=0)
        >>> slide = ReinhardReference.fit(tiles)  # so that neighbours agree
        >>> ReinhardNormalize(ReinhardReference.fit(tiles[:1]), source=slide)(tiles).shape
        torch.Size([2, 3, 224, 224])
    """

    reference_kind = ReinhardReference

    def _change(self, grey: Tensor, strength: Tensor) -> EditedTiles:
        lab, weight = grey_to_lab(grey), tissue_weight(optical_density(grey))
        start = lab_moments(lab, weight)
        if self.source is not None:
            start = self.source.moments(grey.device)
        mapped = match_colour(lab, start, self.reference.moments(grey.device))
        recoloured = torch.lerp(grey, mapped, weight * strength[:, None, None, None])
        return EditedTiles(recoloured, weight.mean((1, 2, 3)) >= MIN_TISSUE)


class DensityTransport(ClassicalTransform[DensityReference]):
    """Give the tissue of tiles the mean and covariance of optical density of a reference's.

    The optimal-transport map between normal distributions, with bounded gain; what `StainTransfer`
    does without reading the stain from features.

    Args:
        reference: Where to go.
        source: Moments of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that a tile is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide", which changes all tiles of a slide in an epoch, or none; see
            `StainTransfer`.
        seed: Of the draws of mode "slide".

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=2, steps=2, seed=0)
        >>> slide = DensityReference.fit(tiles)  # so that neighbours agree
        >>> DensityTransport(DensityReference.fit(tiles[:1]), source=slide)(tiles).shape
        torch.Size([2, 3, 224, 224])
    """

    reference_kind = DensityReference

    def _check_size(self, height_px: int, width_px: int) -> None:
        check_pooled(height_px, width_px)

    def _change(self, grey: Tensor, strength: Tensor) -> EditedTiles:
        of_tile = tissue_moments(grey)
        start = of_tile
        if self.source is not None:
            given = self.source.moments(grey.device)
            start = DensityMoments(*(x.expand(len(grey), *x.shape[1:]) for x in given))
        change = match_moments(start, self.reference.moments(grey.device))
        recoloured = apply_density_map(grey, blend_with_identity(change, strength))
        return EditedTiles(recoloured, of_tile.tissue >= MIN_TISSUE)
