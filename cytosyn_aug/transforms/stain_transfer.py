"""StainTransfer and StainNormalize: torchvision v2 transforms that change the stain of tiles.

The change is that of `cytosyn_aug.stain.restain`, of the original pixels, or with `preserve="none"`
drawn anew by the diffusion model. The grammar is that of `cytosyn_aug.transforms.tile_transform`:
of a list of plain tensors only the first is edited, as in torchvision; stack them, or wrap each in
`tv_tensors.Image`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import Preserve
from cytosyn_aug.images import check_sides, num_tiles, open_image
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import (
    moment_statistics,
    tissue_moments,
)
from cytosyn_aug.stain.estimate import (
    central_tiles,
    check_extent,
    check_scale,
    measured_statistics,
    reference_statistics,
)
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference, check_reference, list_references
from cytosyn_aug.stain.restain import restain
from cytosyn_aug.transforms.draws import (
    DrawScope,
    Sampling,
    draw_references,
    farthest_references,
    group_by_laboratory,
    without_laboratory,
)
from cytosyn_aug.transforms.redraw import redraw_restained
from cytosyn_aug.transforms.sample_metadata import (
    LABORATORY,
    NO_METADATA,
    SampleMetadata,
    read_value,
)
from cytosyn_aug.transforms.schedules import Probability, Scheduled, check_scheduled, value_at
from cytosyn_aug.transforms.tile_transform import (
    EditedTiles,
    TileTransform,
    missing_value,
    warn_once,
)
from cytosyn_aug.transforms.worker_state import SharedCount


class StainTransfer(TileTransform):
    """Restain tiles to another laboratory, keeping every nucleus where it is.

    A reference is drawn per tile. With `preserve="color"` the colour change, estimated on the
    centre of the image at the model's size and scale, is applied to the original pixels, for any
    image size; with "none" the recoloured tile is drawn anew by the diffusion model (texture and
    sharpness change too, tiles must have the model's size, and samples with masks are refused
    unless `allow_geometry_change`). Blank tiles come back unchanged, and those that the networks
    fail on (`num_failed`).

    Does not support: grey-scale, RGBA and 16-bit images; float images outside [0, 1].

    Args:
        generator: The model.
        references: Laboratories to choose from; those with equal `laboratory` count as one.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        p: Probability that a tile is restained; a `Ramp` over epochs, or one of them by class:
            {class: p}, and then samples carry labels, under "label" or last in a tuple.
        sampling: "uniform" over laboratories; "farthest", the reference that differs most from the
            source, or without one from each tile; "own_excluded", uniform over all laboratories
            but the tile's own, which samples then carry under "laboratory".
        mode: "tile" draws for every tile; "slide" for every slide and epoch, in all workers alike,
            and then samples carry the name of the slide under "slide". A slide is restained as a
            whole or not at all.
        seed: Of the draws of mode "slide", which do not depend on torch's generator.
        recipe: How the model edits.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale, such as
            `features_cached`; None asks the encoder. Asked for tiles with tissue, and not where
            `source` is given.
        allow_geometry_change: Accept masks and boxes although structure may move.

    Raises:
        TypeError: Something else than StainReference where references belong.
        ValueError: No references, references of another model, or settings that do not fit.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=4, steps=4, seed=0)
        >>> transfer = StainTransfer(generator, [StainReference.fit(generator, tiles)], p=1.0)
        >>> transfer(tiles).shape
        torch.Size([4, 3, 224, 224])
    """

    def __init__(
        self,
        generator: TileGenerator,
        references: Iterable[StainReference],
        *,
        source: StainReference | None = None,
        strength: Scheduled = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        p: Probability = 0.5,
        sampling: Sampling = "uniform",
        mode: DrawScope = "tile",
        seed: int = 0,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        keeps_structure = preserve == "color" or allow_geometry_change
        super().__init__(p=p, keeps_structure=keeps_structure, mode=mode, seed=seed)
        references = list_references(references)
        if preserve not in ("color", "none"):
            raise ValueError(f"preserve is {preserve!r}, expected 'color' or 'none'")
        if not references:
            raise ValueError("references is empty; fit at least one StainReference")
        check_scheduled("strength", strength)
        if source is not None:
            check_reference("source", source)
        for reference in (*references, *([source] if source is not None else [])):
            reference.check_model(generator)
        if preserve == "none" and not generator.has_encoder:
            raise ValueError(
                "preserve='none' draws tiles from the features of their new colours, and this "
                'model was loaded without an encoder; load it with encoder="bioptimus/H0-mini" or '
                "use preserve='color'"
            )
        recipe = recipe if recipe is not None else EditRecipe()
        if preserve == "none":
            generator.check_drawing(
                steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                start_time=recipe.noise_level,
            )
        check_scale(mpp, generator.tile)
        _check_draws(references, source, sampling, mode)
        self.generator = generator
        self.references = references
        self.source = source
        self.strength = strength
        self.preserve = preserve
        self.mpp = mpp
        self.sampling = sampling
        self.recipe = recipe
        self.features = features
        self._laboratories = [r.laboratory for r in self.references]
        self._groups = group_by_laboratory(self._laboratories)
        self._targets: Tensor | None = None
        self._warned_laboratory = SharedCount()

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw also the reference of every tile, and its strength in this epoch.

        Returns:
            Lists with one entry per tile: `chosen`, `seeds`, `references`, `strengths`.
        """
        params = self._draw(flat_inputs, metadata, count=1)
        return params | {"references": [drawn[0] for drawn in params["references"]]}

    def _draw(self, flat_inputs: list[Any], metadata: SampleMetadata, count: int) -> dict[str, Any]:
        """Draw `count` references per tile, and everything else."""
        num = num_tiles(flat_inputs[0])
        laboratories = metadata.laboratories or [None] * num
        if self.sampling == "own_excluded":
            if metadata.laboratories is None:
                raise ValueError(missing_value(LABORATORY))
            self._check_laboratories(laboratories)
        params, generators = self._draw_tiles(num, metadata)
        if self.sampling == "farthest":
            params["references"] = self._farthest(flat_inputs[0], num, count)
        else:
            params["references"] = [
                self._draw_references(laboratory, count, generator)
                for laboratory, generator in zip(laboratories, generators, strict=True)
            ]
        params["strengths"] = [value_at(self.strength, self.epoch)] * num
        return params

    def _check_laboratories(self, laboratories: Sequence[Hashable]) -> None:
        unknown = [x for x in laboratories if x not in self._laboratories]
        if unknown:
            known = ", ".join(sorted({repr(x) for x in self._laboratories}))
            warn_once(
                self._warned_laboratory,
                f"the sample is of laboratory {unknown[0]!r}, and the references are of {known}: "
                "nothing is left out for it. Spell it as they do, if it is one of them",
            )

    def _draw_references(
        self, laboratory: Hashable, count: int, generator: torch.Generator | None
    ) -> list[int]:
        groups: Sequence[Sequence[int]] = self._groups
        if self.sampling == "own_excluded":
            groups = without_laboratory(groups, self._laboratories, laboratory, count)
        return draw_references(groups, count, generator)

    @isolated()
    def _farthest(self, image: Any, num: int, count: int) -> list[list[int]]:
        """Return the farthest references, by what the pixels alone say: it has to be cheap."""
        targets = torch.cat([measured_statistics(r) for r in self.references])
        if self.source is not None:
            statistics = measured_statistics(self.source).expand(num, -1)
        else:
            statistics = torch.cat(
                [
                    self._measured(part)
                    for part in open_image(image).grey.split(self.generator.batch_size)
                ]
            )
        return farthest_references(statistics.cpu(), targets, self._groups, count)

    def _check_size(self, height_px: int, width_px: int) -> None:
        if self.preserve == "none":
            check_sides(height_px, width_px, self.generator.tile)
        check_extent(height_px, width_px, self.mpp, self.generator.tile)

    def _measured(self, grey: Tensor) -> Tensor:
        moments = tissue_moments(central_tiles(grey, self.mpp, self.generator.tile))
        return moment_statistics(moments.mean, moments.covariance)

    def _tiles_at_once(self, grey: Tensor) -> int:
        return self.generator.batch_size

    def _edit(self, grey: Tensor, params: dict[str, Any]) -> EditedTiles:
        if not any(params["strengths"]):
            return EditedTiles(grey, torch.zeros(len(grey), dtype=torch.bool, device=grey.device))
        self.generator.check_process()
        restained = restain(
            self.generator,
            grey,
            self._reference_statistics().to(grey.device)[params["references"]],
            torch.tensor(params["strengths"], dtype=torch.float32, device=grey.device),
            mpp=self.mpp,
            source=self.source,
            recipe=self.recipe,
            features=self.features,
        )
        if self.preserve == "none":
            restained = redraw_restained(self.generator, restained, self.recipe, params["seeds"])
        self._count_failed(grey, restained.is_tissue & ~restained.is_finite)
        return EditedTiles(restained.images, restained.is_edited)

    def _reference_statistics(self) -> Tensor:
        """Return the stain of all references [R, 9], on the CPU, computed at first use."""
        if self._targets is None:
            statistics = [
                reference_statistics(self.generator, r, self.recipe) for r in self.references
            ]
            self._targets = torch.cat(statistics).cpu()
        return self._targets

    def read_metadata(self, sample: object, images: list[Any]) -> SampleMetadata:
        """Return what draws go by, one value per tile; only what is asked for."""
        metadata = super().read_metadata(sample, images)
        if self.sampling != "own_excluded":
            return metadata
        return metadata._replace(laboratories=read_value(sample, LABORATORY, num_tiles(images[0])))


class StainNormalize(StainTransfer):
    """Restain tiles to one reference, the same way every time.

    StainTransfer with one reference and a fixed seed; with p = 1 nothing is random. For tiles of
    one slide give `source`, fitted to tiles of that slide, so that neighbouring tiles are changed
    alike.

    Args:
        generator: The model.
        reference: Laboratory to normalise to.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        recipe: How the model edits.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale, such as
            `features_cached`; None asks the encoder.
        seed: Seed of the model's noise, for every tile.
        allow_geometry_change: Accept masks and boxes although structure may move.
        p: Probability that a tile is normalised; a `Ramp`, or one of them by class.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> normalize = StainNormalize(generator, StainReference.fit(generator, tiles[:1]))
        >>> torch.equal(normalize(tiles), normalize(tiles))
        True
    """

    def __init__(
        self,
        generator: TileGenerator,
        reference: StainReference,
        *,
        source: StainReference | None = None,
        strength: float = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        allow_geometry_change: bool = False,
        p: Probability = 1.0,
    ) -> None:
        check_reference("reference", reference)
        super().__init__(
            generator,
            [reference],
            source=source,
            strength=strength,
            preserve=preserve,
            mpp=mpp,
            p=p,
            seed=seed,
            recipe=recipe,
            features=features,
            allow_geometry_change=allow_geometry_change,
        )

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Choose tiles, all with the same seed; draw nothing where all are chosen."""
        num = num_tiles(flat_inputs[0])
        if self.p != 1.0:
            return super().make_params(flat_inputs, metadata) | {"seeds": [self.seed] * num}
        return {
            "chosen": [True] * num,
            "seeds": [self.seed] * num,
            "references": [0] * num,
            "strengths": [value_at(self.strength, self.epoch)] * num,
        }


def _check_draws(
    references: Sequence[StainReference],
    source: StainReference | None,
    sampling: Sampling,
    mode: DrawScope,
) -> None:
    if sampling not in ("uniform", "farthest", "own_excluded"):
        raise ValueError(
            f"sampling is {sampling!r}, expected 'uniform', 'farthest' or 'own_excluded'"
        )
    if mode == "slide" and sampling == "farthest" and source is None:
        raise ValueError(
            "mode='slide' with sampling='farthest' needs source, the statistics of the slide: "
            "tiles of one slide would each have another farthest reference"
        )
    unnamed = [k for k, r in enumerate(references) if not r.laboratory]
    if sampling == "own_excluded" and unnamed:
        raise ValueError(
            f"references {unnamed} name no laboratory, which sampling='own_excluded' goes by; fit "
            "them with StainReference.fit(..., laboratory=...)"
        )
