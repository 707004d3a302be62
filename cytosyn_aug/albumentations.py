"""The transforms for albumentations (2.0.8); same names, arguments and, to a grey level, results.

Thin: each draws its parameters and calls the torchvision transform of the same name; see
`cytosyn_aug.image_transform`. `StainViews` has no twin: an albumentations pipeline returns one
image. References are pooled, so that a written or replayed pipeline holds a few kilobytes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.config import Preserve
from cytosyn_aug.image_transform import TileImageTransform
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.estimate import EditRecipe
from cytosyn_aug.stain.macenko import MacenkoReference
from cytosyn_aug.stain.reference import StainReference, check_reference, list_references
from cytosyn_aug.stain.reinhard import ReinhardReference
from cytosyn_aug.stain.transport import DensityReference
from cytosyn_aug.transforms import cached_variants as variants
from cytosyn_aug.transforms import classical
from cytosyn_aug.transforms import resample as resampling
from cytosyn_aug.transforms import stain_transfer as transforms
from cytosyn_aug.transforms.draws import Mode, Sampling
from cytosyn_aug.transforms.schedules import Probability, Scheduled
from cytosyn_aug.transforms.serialization import read_argument

Reference = TypeVar("Reference")


class StainTransfer(TileImageTransform):
    """Restain an image; see `cytosyn_aug.StainTransfer`. Masks pass through with "color".

    What the draws go by stands beside the image: `pipeline(image=..., label=..., slide=...)`.

    Args:
        generator: The model.
        references: Laboratories to choose from.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        p: Probability that an image is restained; a `Ramp`, or one of them by class.
        sampling: "uniform", "farthest" or "own_excluded".
        mode: "tile" or "slide".
        seed: Of the draws of mode "slide".
        recipe: How the model edits.
        features: Gives CLS vectors of tiles, such as a `FeatureTable`; None asks the encoder. A
            transform with features cannot be saved as JSON.
        allow_geometry_change: Accept masks and boxes although structure may move.
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
        mode: Mode = "tile",
        seed: int = 0,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        p = read_argument(p)
        arguments = {
            "generator": read_argument(generator),
            # Pooled here and not when written, so that what is replayed is the very same.
            "references": [r.pooled() for r in list_references(read_argument(references))],
            "source": None if source is None else _pooled("source", source),
            "strength": read_argument(strength),
            "preserve": preserve,
            "mpp": mpp,
            "sampling": sampling,
            "mode": mode,
            "seed": seed,
            "recipe": read_argument(recipe),
            "features": features,
            "allow_geometry_change": allow_geometry_change,
        }
        super().__init__(transforms.StainTransfer(**arguments, p=_inner_p(p, mode)), p, arguments)


class StainNormalize(TileImageTransform):
    """Restain every image to one reference; see `cytosyn_aug.StainNormalize`.

    Args:
        generator: The model.
        reference: Laboratory to normalise to.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        recipe: How the model edits.
        features: See `StainTransfer`.
        seed: Seed of the model's noise, for every tile.
        allow_geometry_change: Accept masks and boxes although structure may move.
        p: Probability that an image is normalised; a `Ramp`, or one of them by class.
    """

    def __init__(
        self,
        generator: TileGenerator,
        reference: StainReference,
        *,
        source: StainReference | None = None,
        strength: Scheduled = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        allow_geometry_change: bool = False,
        p: Probability = 1.0,
    ) -> None:
        p = read_argument(p)
        arguments = {
            "generator": read_argument(generator),
            "reference": _pooled("reference", reference),
            "source": None if source is None else _pooled("source", source),
            "strength": read_argument(strength),
            "preserve": preserve,
            "mpp": mpp,
            "recipe": read_argument(recipe),
            "features": features,
            "seed": seed,
            "allow_geometry_change": allow_geometry_change,
        }
        super().__init__(transforms.StainNormalize(**arguments, p=_inner_p(p)), p, arguments)


class ConditionedResample(TileImageTransform):
    """Replace an image by a new one with its features; see `cytosyn_aug.ConditionedResample`.

    Args:
        generator: The model.
        min_similarity: Least cosine similarity of the CLS features of old and new tile.
        max_similarity: Largest one.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance; 1 for none.
        p: Probability that an image is replaced; a `Ramp`, or one of them by class.
        features: See `StainTransfer`.
        mode: "tile" or "slide"; see `cytosyn_aug.ConditionedResample`.
        seed: Of the draws of mode "slide".
        allow_geometry_change: Accept masks and boxes although structure changes.
    """

    def __init__(
        self,
        generator: TileGenerator,
        *,
        min_similarity: float = -1.0,
        max_similarity: float = 1.0,
        steps: int | None = None,
        guidance_scale: float = 1.0,
        p: Probability = 0.3,
        features: Callable[[Tensor], Tensor] | None = None,
        mode: Mode = "tile",
        seed: int = 0,
        allow_geometry_change: bool = False,
    ) -> None:
        p = read_argument(p)
        arguments = {
            "generator": read_argument(generator),
            "min_similarity": min_similarity,
            "max_similarity": max_similarity,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "features": features,
            "mode": mode,
            "seed": seed,
            "allow_geometry_change": allow_geometry_change,
        }
        super().__init__(
            resampling.ConditionedResample(**arguments, p=_inner_p(p, mode)), p, arguments
        )

    @property
    def num_rejected(self) -> int:
        """Images, in all workers, whose new version was too unlike or too like the old one."""
        return self.inner.num_rejected


class CachedVariants(TileImageTransform):
    """Replace an image by a cached variant; see `cytosyn_aug.CachedVariants`. Images only.

    Written by `to_dict` as the folder of the cache and the digest of what it must hold.

    Args:
        cache: Filled by `fill_variants`, with images.
        p: Probability that an image is replaced; a `Ramp`, or one of them by class.
        on_miss: "raise" or "keep".
        mode: "tile" or "slide"; see `cytosyn_aug.CachedVariants`.
        seed: Of the draws of mode "slide".
        allow_geometry_change: Accept masks and boxes although the variants moved structure.
    """

    def __init__(
        self,
        cache: LatentCache,
        p: Probability = 0.5,
        *,
        on_miss: Literal["raise", "keep"] = "raise",
        mode: Mode = "tile",
        seed: int = 0,
        allow_geometry_change: bool = False,
    ) -> None:
        p = read_argument(p)
        arguments = {
            "cache": read_argument(cache),
            "on_miss": on_miss,
            "mode": mode,
            "seed": seed,
            "allow_geometry_change": allow_geometry_change,
        }
        inner = variants.CachedVariants(**arguments, p=_inner_p(p, mode))
        if inner.is_latent:
            raise ValueError(
                f"{inner.cache.folder} holds latents, which albumentations cannot carry to the "
                "decoder; fill one with payload 'images', or use cytosyn_aug.CachedVariants"
            )
        super().__init__(inner, p, arguments)

    @property
    def num_missed(self) -> int:
        """Images, in all workers, that were not in the cache and came back as they were."""
        return self.inner.num_missed


class ClassicalImageTransform(TileImageTransform, Generic[Reference]):
    """The arguments of the three classical ones."""

    kind: type[classical.ClassicalTransform[Any]]  # Any: of each its own kind of reference

    def __init__(
        self,
        reference: Reference,
        *,
        source: Reference | None = None,
        strength: Scheduled = 1.0,
        p: Probability = 1.0,
        mode: Mode = "tile",
        seed: int = 0,
    ) -> None:
        p = read_argument(p)
        arguments = {
            "reference": read_argument(reference),
            "source": read_argument(source),
            "strength": read_argument(strength),
            "mode": mode,
            "seed": seed,
        }
        super().__init__(self.kind(**arguments, p=_inner_p(p, mode)), p, arguments)


class MacenkoNormalize(ClassicalImageTransform[MacenkoReference]):
    """Replace the two stains of an image by a reference's; see `cytosyn_aug.MacenkoNormalize`.

    Args:
        reference: Where to go.
        source: Stains of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide"; and `seed`, of the draws of mode "slide". See `StainTransfer`.
    """

    kind = classical.MacenkoNormalize


class ReinhardNormalize(ClassicalImageTransform[ReinhardReference]):
    """Give an image the colour of a reference in Lab; see `cytosyn_aug.ReinhardNormalize`.

    Args:
        reference: Where to go.
        source: Colour of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide"; and `seed`, of the draws of mode "slide". See `StainTransfer`.
    """

    kind = classical.ReinhardNormalize


class DensityTransport(ClassicalImageTransform[DensityReference]):
    """Give an image the optical density of a reference; see `cytosyn_aug.DensityTransport`.

    Args:
        reference: Where to go.
        source: Moments of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" or "slide"; and `seed`, of the draws of mode "slide". See `StainTransfer`.
    """

    kind = classical.DensityTransport


def _inner_p(p: Probability, mode: Mode = "tile") -> Probability:
    """Return p for the inner transform: one draw a slide, and a label, only that knows."""
    return p if isinstance(p, Mapping) or mode == "slide" else 1.0


def _pooled(name: str, reference: Any) -> StainReference:  # Any: a reference, written or not
    read: StainReference = read_argument(reference)
    check_reference(name, read)
    return read.pooled()
