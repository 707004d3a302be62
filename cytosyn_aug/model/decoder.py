"""Small decoder for the latents of an autoencoder: fast where few forwards are.

At four forwards the autoencoder's own decoder costs more than the transformer. This one is a plain
stack of convolutions without normalisation, wide where the grid is coarse and narrow where it is
fine; the last doubling is a rearrangement of channels, so that no layer runs at full resolution.
diffusers' AutoencoderTiny has the same purpose, but one width for all resolutions.

Source: Boer Bohan (2023), TAESD, for the idea; Shi et al. (2016), for the last doubling.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class SmallDecoder(ModelMixin, ConfigMixin):
    """Decode latents of an f8 autoencoder to pixels.

    Args:
        latent_channels: Channels C of the latents.
        widths: Channels at 1/8, 1/4 and 1/2 of the resolution; multiples of 16 are fast on CPUs.
        num_blocks: Residual blocks at each.
    """

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        widths: tuple[int, int, int] = (128, 64, 32),
        num_blocks: tuple[int, int, int] = (3, 2, 1),
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(_ResidualBlock(width) for _ in range(number)))
            for width, number in zip(widths, num_blocks, strict=True)
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.conv_out = nn.Conv2d(widths[-1], 3 * 4, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels, not clipped.

        Args:
            latents: float [B, C, h, w], the autoencoder's own, not whitened.

        Returns:
            float [B, 3, 8 h, 8 w], about in [-1, 1].
        """
        x = F.relu(self.conv_in(latents))
        for number, level in enumerate(self.levels):
            x = level(x)
            if number < len(self.narrow):
                x = F.relu(self.narrow[number](F.interpolate(x, scale_factor=2.0)))
        return F.pixel_shuffle(self.conv_out(x), 2)


class _ResidualBlock(nn.Module):
    """Two convolutions beside an identity; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))
