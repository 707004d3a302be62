"""Settings of restaining, without a network library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecipe:
    """How a tile is restained.

    Attributes:
        probe_share: How far stain is read from features by the stain probe, from 0 (only the
            colour moments of the pixels at hand, which mix stain with composition) to 1 (only the
            probe). Ignored for models without a probe.
        noise_level: With `preserve="none"`: time t in (0, 1] the latents are noised to before
            they are drawn anew; small keeps structure, 1 forgets the tile.
        steps: Forwards on the way back, of the student if the model has one.
        guidance_scale: Classifier-free guidance towards the recoloured tile's features.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> recipe = EditRecipe(noise_level=0.5, steps=2)
        >>> reference = StainReference.fit(generator, tiles)
        >>> StainNormalize(generator, reference, preserve="none", recipe=recipe)(tiles).shape
        torch.Size([2, 3, 224, 224])
    """

    probe_share: float = 0.5
    noise_level: float = 0.3
    steps: int = 4
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probe_share <= 1:
            raise ValueError(f"probe_share is {self.probe_share}, expected 0 to 1")
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level is {self.noise_level}, expected 0 < noise_level <= 1")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
