"""ConditionedResample: the torchvision transform that replaces a tile by a new one like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.images import check_sides
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.transforms.draws import MAX_SEED, DrawScope
from cytosyn_aug.transforms.redraw import resample
from cytosyn_aug.transforms.sample_metadata import NO_METADATA, SampleMetadata
from cytosyn_aug.transforms.schedules import Probability
from cytosyn_aug.transforms.tile_transform import EditedTiles, TileTransform
from cytosyn_aug.transforms.worker_state import SharedCount


class ConditionedResample(TileTransform):
    """Replace a tile by a new one with the same features.

    Structure is new: samples with masks or boxes are refused unless `allow_geometry_change`.
    A tile whose new version is less similar than `min_similarity` or more than `max_similarity`
    (a copy) comes back as it was, and is counted in `num_rejected`. Blank tiles come back too, and
    those that the networks fail on (`num_failed`).

    Does not support: images of another size than the model's tiles.

    Args:
        generator: The model.
        min_similarity: Least cosine similarity of the CLS features of old and new tile.
        max_similarity: Largest one.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance, in t <= 0.75 (1 = noise); 1 for none.
        p: Probability that a tile is replaced; a `Ramp` over epochs, or one of them by class.
        features: Gives CLS vectors [B, D] of uint8 tiles [B, 3, size, size], such as a
            `FeatureTable`; None asks the model's encoder. A model without one cannot tell
            similarity, so it needs features and no bounds.
        mode: "tile" or "slide", which replaces all tiles of a slide in an epoch, or none, and then
            samples carry the name of the slide under "slide".
        seed: Of the draws of mode "slide".
        allow_geometry_change: Accept masks and boxes although structure changes.

    Raises:
        ValueError: A probability or bound outside its range, steps or guidance that the model
            cannot draw with, or a model without an encoder that is given no features, or bounds.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> resample = ConditionedResample(generator, p=1.0, steps=2, max_similarity=0.98)
        >>> resample(generator.sample(per_condition=2, steps=4)).shape
        torch.Size([2, 3, 224, 224])
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
        super().__init__(p=p, keeps_structure=allow_geometry_change, mode=mode, seed=seed)
        if not -1 <= min_similarity <= max_similarity <= 1:
            raise ValueError(
                f"similarities are {min_similarity} and {max_similarity}, expected "
                "-1 <= min_similarity <= max_similarity <= 1"
            )
        self._is_bounded = (min_similarity, max_similarity) != (-1.0, 1.0)
        if not generator.has_encoder and (features is None or self._is_bounded):
            raise ValueError(
                "this model was loaded without an encoder: pass features (a FeatureTable of "
                "precomputed ones) and leave min_similarity and max_similarity alone, or load it "
                'with encoder="bioptimus/H0-mini"'
            )
        generator.check_drawing(steps=steps, guidance_scale=guidance_scale)
        self.generator = generator
        self.features = features
        self.min_similarity = min_similarity
        self.max_similarity = max_similarity
        self.steps = steps
        self.guidance_scale = guidance_scale
        self._rejected = SharedCount()

    @property
    def num_rejected(self) -> int:
        """Tiles, in all workers, whose new version was too unlike or too like the old one."""
        return self._rejected.total()

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw which tiles are replaced, and a noise of its own for each, also within a slide."""
        params = super().make_params(flat_inputs, metadata)
        if self.mode == "slide":
            num = len(params["seeds"])
            params["seeds"] = torch.randint(0, MAX_SEED, (num,), device="cpu").tolist()
        return params

    def _check_size(self, height_px: int, width_px: int) -> None:
        check_sides(height_px, width_px, self.generator.tile)

    def _tiles_at_once(self, grey: Tensor) -> int:
        return self.generator.batch_size

    def _edit(self, grey: Tensor, params: dict[str, Any]) -> EditedTiles:
        self.generator.check_process()
        tiles = grey.round().to(torch.uint8)
        result = resample(
            self.generator,
            tiles,
            params["seeds"],
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            features=self.features,
            compares=self._is_bounded,
        )
        is_usable = result.is_tissue & result.is_finite
        self._count_failed(grey, result.is_tissue & ~result.is_finite)
        # Negated, since a similarity that nobody could tell is no reason to refuse.
        low, high = self.min_similarity, self.max_similarity
        is_accepted = ~((result.similarity < low) | (result.similarity > high))
        self._rejected.add(int((is_usable & ~is_accepted).sum()))
        return EditedTiles(result.images, is_usable & is_accepted)
