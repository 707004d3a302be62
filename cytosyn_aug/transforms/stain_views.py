"""StainViews: restained views of one tile, aligned to the pixel, for training an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten
from torchvision import tv_tensors

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import check_image, open_image, sides_of
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.estimate import StainEstimate, central_tiles, estimate_stain
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference, list_references
from cytosyn_aug.stain.restain import recolour
from cytosyn_aug.transforms.draws import DrawScope, Sampling
from cytosyn_aug.transforms.sample_metadata import NO_METADATA, SampleMetadata
from cytosyn_aug.transforms.schedules import Scheduled
from cytosyn_aug.transforms.stain_transfer import StainTransfer


class StainViews(StainTransfer):
    """Return a tuple of `views` restained versions of a sample.

    Each version is built as the sample is, and everything in it that is no image is the very same
    object: masks fit all versions, since only colour differs, pixel by pixel. Collation turns a
    data set of such tuples into a list of batches, one per view. Every tile goes to different
    references, and to different laboratories, as far as there are enough. Tiles that cannot be
    restained (blank, or `num_failed`) are the original in every view; and a view that changes
    nothing of an image is the object that came in, not a copy of it.

    Of a plain tensor the views are `tv_tensors.Image` (tensors still, and collated to plain ones):
    torchvision would take only the first of several plain tensors for an image, so a flip after
    this transform would turn one view and not the other. What follows must be of v2 and see all
    views at once, as in a `Compose`, or they are no longer aligned.

    Does not support: `preserve="none"`, which is not aligned.

    Args:
        generator: The model.
        references: Laboratories to choose from, at least one for each restained view.
        views: Number of versions, at least 2.
        has_original: Whether the first version is the sample itself.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        mpp: Scale of the images in microns per pixel.
        sampling: "uniform" over laboratories; "farthest", the references that differ most from the
            source, or without one from each tile; "own_excluded", uniform over all laboratories
            but the tile's own, and must leave a reference for every view.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, in all workers alike,
            and then samples carry the name of the slide under "slide".
        seed: Of the draws of mode "slide", which do not depend on torch's generator.
        recipe: How the model edits.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale, such as
            `features_cached`; None asks the encoder.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=4, steps=4, seed=0)
        >>> views = StainViews(generator, [StainReference.fit(generator, tiles)], has_original=True)
        >>> first, second = views(tiles)
        >>> torch.equal(first, tiles), second.shape
        (True, torch.Size([4, 3, 224, 224]))
    """

    def __init__(
        self,
        generator: TileGenerator,
        references: Iterable[StainReference],
        *,
        views: int = 2,
        has_original: bool = False,
        source: StainReference | None = None,
        strength: Scheduled = 1.0,
        mpp: float = 0.5,
        sampling: Sampling = "uniform",
        mode: DrawScope = "tile",
        seed: int = 0,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if views < 2:
            raise ValueError(f"views is {views}, expected at least 2; StainTransfer gives one")
        references = list_references(references)
        num_made = views - has_original
        if 0 < len(references) < num_made:
            raise ValueError(
                f"{num_made} restained views of a tile need as many references, or some would be "
                f"alike; got {len(references)} references. Add some, ask for fewer views, or set "
                "has_original=True"
            )
        super().__init__(
            generator,
            references,
            source=source,
            strength=strength,
            mpp=mpp,
            p=1.0,
            sampling=sampling,
            mode=mode,
            seed=seed,
            recipe=recipe,
            features=features,
        )
        self.views = views
        self.has_original = has_original

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw for every tile one reference per view: `references` is a list of lists."""
        return self._draw(flat_inputs, metadata, count=self.views - self.has_original)

    @isolated()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return the versions of one image, a tuple."""
        if isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.TVTensor):
            inpt = tv_tensors.Image(inpt)
        self._check_size(*sides_of(inpt))
        if not any(params["strengths"]):
            check_image(inpt)
            return (inpt,) * self.views
        grey, restore = open_image(inpt)
        num_made = self.views - self.has_original
        restained_views = [torch.empty_like(grey) for _ in range(num_made)]
        is_edited = torch.zeros(num_made, len(grey), dtype=torch.bool, device=grey.device)
        size = self._tiles_at_once(grey)
        targets = self._reference_statistics().to(grey.device)
        for start in range(0, len(grey), size):
            part = slice(start, start + size)
            estimate = self._estimate(grey[part])  # once for all views
            strength = torch.tensor(params["strengths"][part], device=grey.device)
            for view in range(num_made):
                drawn = [references[view] for references in params["references"][part]]
                restained = recolour(grey[part], estimate, targets[drawn], strength)
                restained_views[view][part] = restained.images
                is_edited[view, part] = restained.is_edited
        edited = [restore(*pair) for pair in zip(restained_views, is_edited, strict=True)]
        return (inpt, *edited) if self.has_original else tuple(edited)

    def _estimate(self, grey: Tensor) -> StainEstimate:
        self.generator.check_process()
        tiles = central_tiles(grey, self.mpp, self.generator.tile)
        estimate = estimate_stain(self.generator, tiles, self.source, self.recipe, self.features)
        self._count_failed(grey, estimate.is_tissue & ~estimate.is_finite)
        return estimate

    def _assemble(self, done: list[Any], is_image: list[bool], spec: TreeSpec) -> Any:
        columns = [
            x if edits else (x,) * self.views for x, edits in zip(done, is_image, strict=True)
        ]
        return tuple(tree_unflatten(list(row), spec) for row in zip(*columns, strict=True))
