"""The judge of REPA-E's adversarial loss: a patch discriminator, and its hinge losses.

It scores overlapping patches of an image by themselves. Where the published one normalises over
the batch, this one normalises groups of channels of one image, so that a score does not depend on
which images share a process.

Source: Isola et al. (2017), PatchGAN with three layers; Lim and Ye (2017) for the hinge loss.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Score patches of pixels: [B, 3, H, W] in [-1, 1] to [B, 1, H / 8 - 2, W / 8 - 2].

    Args:
        width: Channels of the first layer, a multiple of 8; the published one has 64.
        num_layers: Layers that halve the resolution.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, num_layers + 1):
            wider = width * min(2**number, 8)
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(8, wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


def judge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator from its scores of real and made images."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean())


def deceive_loss(made: Tensor) -> Tensor:
    """Return the loss of what made the images: minus the mean score."""
    return -made.float().mean()
