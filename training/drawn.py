"""Losses on tiles that a student draws: do they have the texture of the tile they are drawn for?

Distillation compares latents, where what the eye and a classifier see weighs little: a student may
be close to its teacher everywhere and both be soft. Here it draws tiles from noise in a few jumps,
a small decoder turns them into pixels, and VGG says how far their texture is from that of the tile
that the condition was taken from. Gradients flow through the decoder and all jumps. A drawn tile
has no place in common with the real one, so only means of feature maps are compared.

The same decoder makes the pixels of real latents, so that the student is not asked to make up for
what the decoder loses.

Sources: Clark et al. (2024), "Directly Fine-Tuning Diffusion Models on Differentiable Rewards"
(gradients through sampling); Ding et al. (2020), DISTS (means of feature maps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytosyn_aug.sampling import flow_map, linear_grid
from cytosyn_aug.transformer import SiT
from training.perception import PerceptualNetwork, texture_distance


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRecipe:
    """How tiles are drawn and judged while a student is taught.

    Attributes:
        row_stride: Every so many-th row of a batch is drawn.
        forwards: Numbers of jumps; every step has one of them.
        crop_px: Side of the crop that is looked at, beside the whole tile at half its resolution.
        perceptual_stages: Feature maps of VGG that are compared, from the finest.
        weight: Weight of `training.perception.texture_distance`.
    """

    row_stride: int
    forwards: tuple[int, ...]
    crop_px: int
    perceptual_stages: int
    weight: float

    def __post_init__(self) -> None:
        if self.row_stride < 1 or not self.forwards or min(self.forwards) < 1:
            raise ValueError(
                f"row_stride is {self.row_stride} and forwards {self.forwards}, expected 1 or more"
            )


class DrawnTiles:
    """Draw tiles with a student and measure them; see the module.

    Args:
        recipe: How.
        decoder: Small decoder of the latents, frozen by this.
        device: Where it runs.
    """

    def __init__(self, recipe: DrawnRecipe, decoder: nn.Module, device: torch.device) -> None:
        self.recipe = recipe
        decoder = decoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder = decoder.eval().requires_grad_(False)
        self.perception = PerceptualNetwork("vgg").to(device)

    def texture(
        self,
        student: SiT,
        real: Tensor,
        noise: Tensor,
        condition: Tensor,
        guidance: Tensor,
        draw: torch.Generator,
    ) -> Tensor:
        """Return how far the texture of drawn tiles is from that of real ones, 0 to 1.

        Args:
            student: What draws; gradients reach it alone.
            real: Whitened latents [B, C, h, w] of the tiles that the conditions are of.
            noise: [B, C, h, w], where the student starts.
            condition: [B, D].
            guidance: Guidance scales [B].
            draw: Draws the number of jumps and the place of the crop.
        """
        recipe = self.recipe
        chosen = int(torch.randint(len(recipe.forwards), (), generator=draw))

        def u(x: Tensor, t: float, r: float) -> Tensor:
            start, end = (torch.full((len(x),), value, device=x.device) for value in (t, r))
            return student(x, start, condition, end, guidance)

        latents = flow_map(u, noise, linear_grid(recipe.forwards[chosen]))
        made = self._pixels(student, latents)
        with torch.no_grad():
            aim = self._pixels(student, real)
        corner = torch.randint(made.shape[-1] - recipe.crop_px + 1, (2,), generator=draw).tolist()
        maps = self.perception(self._looks(made, corner), recipe.perceptual_stages)
        with torch.no_grad():
            aims = self.perception(self._looks(aim, corner), recipe.perceptual_stages)
        return texture_distance(maps, aims).mean()

    def _pixels(self, student: SiT, latents: Tensor) -> Tensor:
        raw = student.unwhiten(latents).to(memory_format=torch.channels_last)
        return self.decoder(raw).float()

    def _looks(self, pixels: Tensor, corner: list[int]) -> Tensor:
        """Return the crop and the whole tile at half its resolution, as one batch of crops."""
        side = self.recipe.crop_px
        top, left = corner
        crop = pixels[..., top : top + side, left : left + side]
        whole = F.interpolate(pixels, size=(side, side), mode="area")
        return torch.cat([crop, whole]).contiguous(memory_format=torch.channels_last)
