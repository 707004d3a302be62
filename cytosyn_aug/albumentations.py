"""The transforms as albumentations' ImageOnlyTransform (2.0.8, the last MIT release).

Thin: each draws its parameters and calls the torchvision transform of the same name. Draws come
from torch's generator, which DataLoader seeds differently in every worker and epoch;
albumentations 2.0.8 would repeat its own in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug import transforms, variants
from cytosyn_aug.cache import LatentCache
from cytosyn_aug.config import Preserve
from cytosyn_aug.editing import EditRecipe
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.reference import StainReference

try:
    from albumentations.core.transforms_interface import ImageOnlyTransform
except ImportError as error:
    raise ImportError(
        "cytosyn_aug.albumentations needs albumentations 2.0.8; "
        'pip install "cytosyn-aug[albumentations]"'
    ) from error


class _TileImageTransform(ImageOnlyTransform):
    """Carry a torchvision transform into albumentations; HWC uint8 or float32 in, the same out."""

    inner: transforms.StainTransfer | transforms.ConditionedResample | variants.CachedVariants

    def __init__(self, p: float) -> None:
        super().__init__(p=p)

    def should_apply(self, force_apply: bool = False) -> bool:
        """Decide with torch's generator; see the module."""
        return force_apply or bool(torch.rand(()) < self.p)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw seed and reference; JSON-safe, so that ReplayCompose can store them."""
        if not self.inner.keeps_structure:
            moved = sorted({"mask", "masks", "bboxes", "keypoints"} & data.keys())
            if moved:
                raise ValueError(
                    f"{type(self).__name__} moves structure, and the sample carries {moved}; "
                    "drop them, keep structure, or pass allow_geometry_change=True"
                )
        drawn = self.inner.make_params([_to_tensor(data["image"])])
        return {k: v for k, v in drawn.items() if k != "chosen"}

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Edit one image."""
        names = ("seeds", "references", "variants")
        chosen = {"chosen": torch.ones(1, dtype=torch.bool)}
        drawn = chosen | {k: params[k] for k in names if k in params}
        edited = self.inner.transform(_to_tensor(img), drawn)
        return np.ascontiguousarray(edited.permute(1, 2, 0).numpy())


class StainTransfer(_TileImageTransform):
    """Restain an image; see `cytosyn_aug.StainTransfer`. Masks pass through with "color".

    Args:
        generator: The model.
        references: Laboratories to choose from.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        p: Probability that an image is restained.
        recipe: How the model edits.
        features: Gives CLS vectors of tiles, such as a `FeatureTable`; None asks the encoder.
        allow_geometry_change: Accept masks and boxes although structure may move.
    """

    def __init__(
        self,
        generator: TileGenerator,
        references: Sequence[StainReference],
        *,
        source: StainReference | None = None,
        strength: float = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        p: float = 0.5,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        super().__init__(p=p)
        self.inner = transforms.StainTransfer(
            generator,
            references,
            source=source,
            strength=strength,
            preserve=preserve,
            mpp=mpp,
            p=1.0,
            recipe=recipe,
            features=features,
            allow_geometry_change=allow_geometry_change,
        )


class StainNormalize(_TileImageTransform):
    """Restain every image to one reference; see `cytosyn_aug.StainNormalize`.

    Args:
        generator: The model.
        reference: Laboratory to normalise to.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        recipe: How the model edits.
        features: Gives CLS vectors of tiles, such as a `FeatureTable`; None asks the encoder.
        seed: Seed of the model's noise, for every tile.
        p: Probability that an image is normalised.
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
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.inner = transforms.StainNormalize(
            generator,
            reference,
            source=source,
            strength=strength,
            preserve=preserve,
            mpp=mpp,
            recipe=recipe,
            features=features,
            seed=seed,
        )


class ConditionedResample(_TileImageTransform):
    """Replace an image by a new one with its features; see `cytosyn_aug.ConditionedResample`.

    Args:
        generator: The model.
        min_similarity: Least cosine similarity of the CLS features of old and new tile.
        max_similarity: Largest one.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance; 1 for none.
        p: Probability that an image is replaced.
        features: Gives CLS vectors of tiles, such as a `FeatureTable`; None asks the encoder.
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
        p: float = 0.3,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        super().__init__(p=p)
        self.inner = transforms.ConditionedResample(
            generator,
            min_similarity=min_similarity,
            max_similarity=max_similarity,
            steps=steps,
            guidance_scale=guidance_scale,
            p=1.0,
            features=features,
            allow_geometry_change=allow_geometry_change,
        )


class CachedVariants(_TileImageTransform):
    """Replace an image by a cached variant; see `cytosyn_aug.CachedVariants`. Images only.

    Args:
        cache: Filled by `fill_variants`, with images.
        p: Probability that an image is replaced.
        on_miss: "raise" or "keep".
        allow_geometry_change: Accept masks and boxes although the variants moved structure.
    """

    def __init__(
        self,
        cache: LatentCache,
        p: float = 0.5,
        *,
        on_miss: Literal["raise", "keep"] = "raise",
        allow_geometry_change: bool = False,
    ) -> None:
        super().__init__(p=p)
        self.inner = variants.CachedVariants(
            cache, p=1.0, on_miss=on_miss, allow_geometry_change=allow_geometry_change
        )
        if self.inner.is_latent:
            raise ValueError(
                f"{cache.folder} holds latents, which albumentations cannot carry to the decoder; "
                "fill one with payload 'images', or use cytosyn_aug.CachedVariants"
            )


def _to_tensor(image: np.ndarray) -> Tensor:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [H, W, 3] RGB; "
            "repeat grey-scale channels, drop alpha"
        )
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
