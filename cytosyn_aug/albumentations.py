"""The transforms for albumentations 2.0.8; same names, arguments and, to a grey level, results.

Each draws its parameters and calls the torchvision transform of the same name. `StainViews` has no
twin: an albumentations pipeline returns one image. References are pooled, so that a written or
replayed pipeline holds a few kilobytes of each. Classes are defined in this module, because
`to_dict` writes its name.

Draws come from torch's generator, which DataLoader seeds differently in every worker and epoch;
albumentations 2.0.8, the last release under the MIT licence, would repeat its own in all of them.
So `torch.manual_seed` repeats draws, and `A.Compose(seed=...)` has no effect. What is drawn can be
written as JSON, and so can the transforms: `to_dict` keeps where a model came from instead of its
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.config import Preserve
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.macenko import MacenkoReference
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference, check_reference, list_references
from cytosyn_aug.stain.reinhard import ReinhardReference
from cytosyn_aug.stain.transport import DensityReference
from cytosyn_aug.transforms import cached_variants as variants
from cytosyn_aug.transforms import classical
from cytosyn_aug.transforms import resample as resampling
from cytosyn_aug.transforms import stain_transfer as transforms
from cytosyn_aug.transforms.draws import DrawScope, Sampling
from cytosyn_aug.transforms.sample_metadata import LABEL, LABORATORY, SLIDE
from cytosyn_aug.transforms.schedules import (
    Probability,
    Ramp,
    Scheduled,
    check_probability,
    value_at,
)
from cytosyn_aug.transforms.serialization import read_argument, write_argument
from cytosyn_aug.transforms.tile_transform import TileTransform

try:
    import albumentations
except ImportError as error:
    raise ImportError(
        "cytosyn_aug.albumentations needs albumentations 2.0.8; pip install albumentations==2.0.8"
    ) from error
if albumentations.__version__ != "2.0.8":
    # AlbumentationsX has the same import name and goes on from 2.0.9, under another licence.
    raise ImportError(
        f"found albumentations {albumentations.__version__}, expected 2.0.8, the last release "
        "under the MIT licence and the one this is tested with; AlbumentationsX is not. Use the "
        "torchvision transforms of cytosyn_aug beside it (tensors and PIL images), or "
        "`pip uninstall albumentationsx` and `pip install albumentations==2.0.8`"
    )

_STRUCTURE = frozenset({"mask", "masks", "mask3d", "masks3d", "bboxes", "keypoints"})
_IMAGES = frozenset({"image", "images", "volume", "volumes"})
_DRAWN = ("chosen", "seeds", "references", "strengths", "variants")
ReferenceT = TypeVar("ReferenceT")


class TileImageTransform(albumentations.ImageOnlyTransform):
    """Carry a torchvision transform into albumentations; HWC uint8 or float32 in, the same out.

    Args:
        inner: The transform. Where its own p is not 1 (p by class or by slide), it draws by that.
        p: Probability that an image is edited.
        arguments: What the transform is made of beside p, for `to_dict`.

    Raises:
        ValueError: p is no probability.
    """

    def __init__(
        self,
        inner: TileTransform,
        p: Probability,
        arguments: dict[str, Any],  # Any: arguments of any type
    ) -> None:
        check_probability(p)
        # albumentations compares p with numbers, in OneOf and elsewhere.
        super().__init__(p=p if isinstance(p, int | float) else 1.0)
        self.inner = inner
        self._scheduled = p
        self._arguments = arguments
        self._kinds: dict[str, str] = {}

    @property
    def available_keys(self) -> set[str]:
        """Name also what draws go by: `A.Compose(strict=True)` refuses keys of no transform."""
        return super().available_keys | {LABEL, SLIDE, LABORATORY}

    @property
    def num_failed(self) -> int:
        """Images, in all workers, that came back unchanged because a network failed on them."""
        return self.inner.num_failed

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0, for schedules and slide-wise draws."""
        self.inner.set_epoch(epoch)

    def add_targets(self, additional_targets: dict[str, str]) -> None:
        """Remember all additional targets; albumentations' own keeps only images, not masks."""
        self._kinds |= additional_targets
        super().add_targets(additional_targets)

    def should_apply(self, force_apply: bool = False) -> bool:
        """Decide with torch's generator; see the module."""
        if force_apply or self.inner.p != 1.0:
            return True
        p = value_at(
            self._scheduled if isinstance(self._scheduled, Ramp) else self.p, self.inner.epoch
        )
        return bool(torch.rand((), dtype=torch.float64, device="cpu") < p)

    def __call__(self, *args: Any, force_apply: bool = False, **kwargs: Any) -> Any:
        """Refuse a sample that does not fit, drawn or not; then do as albumentations does.

        Checked where it is drawn only, a pipeline with p = 0.3 would fail at its third sample.
        """
        if not args:  # which albumentations refuses
            self._check(kwargs)
        return super().__call__(*args, force_apply=force_apply, **kwargs)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw seed and reference; JSON-safe, so that ReplayCompose can store them."""
        # Of a stack, all images are edited alike, as albumentations does.
        tensor = _to_tensor(self._images(data)[0])
        return self.inner.make_params([tensor], self.inner.read_metadata(data, [tensor]))

    def _check(self, data: dict[str, Any]) -> None:
        kinds = self._kinds_in(data)
        moved = sorted(k for k, kind in kinds.items() if kind in _STRUCTURE)
        if moved and not self.inner.keeps_structure:
            raise ValueError(
                f"{type(self).__name__} moves structure, and the sample carries {moved}; "
                "drop them, keep structure, or pass allow_geometry_change=True"
            )
        tensors = [_to_tensor(image) for image in self._images(data)]
        if not tensors:
            raise TypeError(
                f"got no image among {sorted(kinds)}; pass image=, a numpy array [H, W, 3]"
            )
        for tensor in tensors:
            self.inner.transform(tensor, {"chosen": [False]})  # checks, and edits nothing
        if not self.replay_mode:  # then all is drawn already
            self.inner.read_metadata(data, tensors[:1])

    def _kinds_in(self, data: dict[str, Any]) -> dict[str, str]:
        return {k: self._kinds.get(k, k) for k, value in data.items() if value is not None}

    def _images(self, data: dict[str, Any]) -> list[np.ndarray]:
        """Return all images of a sample, those of stacks one by one."""
        found: list[np.ndarray] = []
        for key, kind in self._kinds_in(data).items():
            if kind in _IMAGES:
                given = data[key]
                if not isinstance(given, np.ndarray):
                    raise TypeError(
                        f"got an image of {type(given).__name__}, expected a numpy array "
                        "[H, W, 3] of uint8, or float32 in [0, 1]; use numpy.asarray"
                    )
                is_stack = given.ndim > 3
                found += list(given.reshape(-1, *given.shape[-3:])) if is_stack else [given]
        return found

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Edit one image."""
        drawn = {k: params[k] for k in _DRAWN if k in params}
        edited = self.inner.transform(_to_tensor(img), drawn)
        return np.ascontiguousarray(edited.permute(1, 2, 0).numpy())

    def __repr__(self) -> str:
        """Show plain settings, and of all others what they are."""
        shown = [f"p={self._scheduled if self.p == 1.0 else self.p!r}"]
        for name, value in self._arguments.items():
            if isinstance(value, list | tuple):
                shown.append(f"{name}=[{len(value)}]")
            elif value is None or isinstance(value, str | int | float | Ramp | EditRecipe):
                shown.append(f"{name}={value!r}")
            else:
                shown.append(f"{name}=<{type(value).__name__}>")
        return f"{type(self).__name__}({', '.join(shown)})"

    def get_transform_init_args(self) -> dict[str, Any]:
        """Return the arguments as JSON holds them, for `to_dict` and ReplayCompose.

        All but functions (`features`), which stay what they are: albumentations asks also to show
        or to replay a pipeline, which does not need JSON, and saving one raises for them.
        """
        return {k: v if callable(v) else write_argument(v) for k, v in self._arguments.items()}

    def get_base_init_args(self) -> dict[str, Any]:
        """Return p as JSON holds it."""
        is_number = isinstance(self._scheduled, int | float)
        return {"p": write_argument(self.p if is_number else self._scheduled)}


class StainTransfer(TileImageTransform):
    """Restain an image. Masks pass through with "color".

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
        mode: DrawScope = "tile",
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
    """Restain every image to one reference.

    Args:
        generator: The model.
        reference: Laboratory to normalise to.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        recipe: How the model edits.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale; None asks
            the encoder. A transform with features cannot be saved as JSON.
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
    """Replace an image by a new one with its features.

    Args:
        generator: The model.
        min_similarity: Least cosine similarity of the CLS features of old and new tile.
        max_similarity: Largest one.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance; 1 for none.
        p: Probability that an image is replaced; a `Ramp`, or one of them by class.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale; None asks
            the encoder. A transform with features cannot be saved as JSON.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, which samples then
        carry
            under "slide".
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
        mode: DrawScope = "tile",
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
    """Replace an image by a cached variant; images only.

    Written by `to_dict` as the folder of the cache and the digest of what it must hold.

    Args:
        cache: Filled by `fill_variants`, with images.
        p: Probability that an image is replaced; a `Ramp`, or one of them by class.
        on_miss: "raise" or "keep".
        mode: "tile" draws for every tile; "slide" for every slide and epoch, which samples then
        carry
            under "slide".
        seed: Of the draws of mode "slide".
        allow_geometry_change: Accept masks and boxes although the variants moved structure.
    """

    def __init__(
        self,
        cache: LatentCache,
        p: Probability = 0.5,
        *,
        on_miss: Literal["raise", "keep"] = "raise",
        mode: DrawScope = "tile",
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


class ClassicalImageTransform(TileImageTransform, Generic[ReferenceT]):
    """The arguments of the three classical ones."""

    kind: type[classical.ClassicalTransform[Any]]  # Any: of each its own kind of reference

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
    """Replace the two stains of an image by a reference's.

    Args:
        reference: Where to go.
        source: Stains of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, which samples then
        carry
            under "slide".
        seed: Of the draws of mode "slide".
    """

    kind = classical.MacenkoNormalize


class ReinhardNormalize(ClassicalImageTransform[ReinhardReference]):
    """Give an image the colour of a reference in Lab.

    Args:
        reference: Where to go.
        source: Colour of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, which samples then
        carry
            under "slide".
        seed: Of the draws of mode "slide".
    """

    kind = classical.ReinhardNormalize


class DensityTransport(ClassicalImageTransform[DensityReference]):
    """Give an image the optical density of a reference.

    Args:
        reference: Where to go.
        source: Moments of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays; or a `Ramp` over epochs.
        p: Probability that an image is changed; a `Ramp`, or one of them by class.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, which samples then
        carry
            under "slide".
        seed: Of the draws of mode "slide".
    """

    kind = classical.DensityTransport


def _inner_p(p: Probability, mode: DrawScope = "tile") -> Probability:
    """Return p for the inner transform: one draw per slide, and a label, only that knows."""
    return p if isinstance(p, Mapping) or mode == "slide" else 1.0


def _pooled(name: str, reference: Any) -> StainReference:  # Any: a reference, written or not
    read: StainReference = read_argument(reference)
    check_reference(name, read)
    return read.pooled()


def _to_tensor(image: np.ndarray) -> Tensor:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [H, W, 3] RGB; "
            "repeat grey-scale channels, drop alpha"
        )
    # A copy of what cannot be written, such as np.asarray(PIL.Image): torch has no such tensors.
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
