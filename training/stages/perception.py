"""Two fixed networks that look at tiles: VGG-16 teaches and perceives, AlexNet only measures.

Both come complete with the `stlpips-pytorch` wheel (Ghildyal and Liu 2022, shift-tolerant LPIPS;
BSD-2-Clause). Its Python code is not imported: the networks are short, and written out here
from the paper's description so that they run in any layout and dtype. AlexNet is never used in
training, so that what it measures has not been optimised.
"""

from __future__ import annotations

from importlib.metadata import distribution
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NetworkName = Literal["vgg", "alex"]

# Convolutions as (index in the weight file, padding); "pool" = max pool and blurred stride.
_VGG = (
    ((0, 1), (2, 1)),
    ("pool", (6, 1), (8, 1)),
    ("pool", (12, 1), (14, 1), (16, 1)),
    ("pool", (20, 1), (22, 1), (24, 1)),
    ("pool", (28, 1), (30, 1), (32, 1)),
)
_STABLE = 1e-6
_ALEX = (((0, 2),), ("pool", (5, 2)), ("pool", (9, 1)), ((11, 1),), ((13, 1),))


class PerceptualNetwork(nn.Module):
    """Give the five feature maps of a fixed network for pixels in [-1, 1].

    Example:
        >>> maps = PerceptualNetwork("alex")(torch.zeros(1, 3, 64, 64))
        >>> [m.shape[1] for m in maps]
        [64, 192, 384, 256, 256]
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: NetworkName) -> None:
        super().__init__()
        weights = torch.load(_weight_file(name), map_location="cpu", weights_only=True)
        self.stages = _VGG if name == "vgg" else _ALEX
        self.pool_px = 2 if name == "vgg" else 3
        self.blurs_first = name == "alex"
        self.convolutions = nn.ModuleDict()
        self.num_stages = len(self.stages)
        self.register_buffer("shift", weights["scaling_layer.shift"])
        self.register_buffer("scale", weights["scaling_layer.scale"])
        for k, stage in enumerate(self.stages):
            for item in stage:
                if isinstance(item, str):
                    continue
                weight = weights[f"net.slice{k + 1}.{item[0]}.weight"]
                width, depth, side, _ = weight.shape
                layer = nn.Conv2d(depth, width, side, padding=item[1])
                layer.load_state_dict(
                    {"weight": weight, "bias": weights[f"net.slice{k + 1}.{item[0]}.bias"]}
                )
                self.convolutions[f"{k}_{item[0]}"] = layer
            self.register_buffer(f"channel_weight{k}", weights[f"lin{k}.model.1.weight"])
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor, num_stages: int = 5) -> list[Tensor]:
        """Return the first `num_stages` feature maps, each after its last ReLU.

        Args:
            pixels: float [B, 3, H, W] in [-1, 1].
            num_stages: 1 to 5.
        """
        x = (pixels - self.shift) / self.scale
        maps = []
        for k, stage in enumerate(self.stages[:num_stages]):
            for item in stage:
                if isinstance(item, str):
                    x = _blur_stride(F.max_pool2d(x, self.pool_px, stride=1))
                    continue
                x = self.convolutions[f"{k}_{item[0]}"](x)
                if self.blurs_first and k == 0:
                    x = _blur_stride(x)
                x = F.relu(x)
            maps.append(x)
        return maps

    def distance(self, first: Tensor, second: Tensor, num_stages: int = 5) -> Tensor:
        """Return the LPIPS distance of two batches of pixels, float32 [B].

        Source: Zhang et al. (2018), eq. 1, with the channel weights of the shift-tolerant form.
        """
        return self.map_distance(self(first, num_stages), self(second, num_stages))

    def map_distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Return `distance` of images whose feature maps are given, float32 [B]."""
        total = torch.zeros(len(first[0]), device=first[0].device)
        for k, (a, b) in enumerate(zip(first, second, strict=True)):
            difference = (_unit(a) - _unit(b)).square()
            weight = getattr(self, f"channel_weight{k}")
            total = total + (difference * weight).sum(1).mean((1, 2))
        return total


def texture_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Return how far the texture of images lies apart, in 0 to 1, from their feature maps.

    Compares the mean of every channel over the image, so it asks for the right amount of texture
    where `distance` asks for the right texture at every place, whose safest answer is blur.

    Args:
        first: Feature maps [B, C, H, W] that are not negative.
        second: The same of the other images.

    Returns:
        float32 [B].

    Source: Ding et al. (2020), DISTS, eq. 4, averaged over channels and maps.
    """
    rows = []
    for a, b in zip(first, second, strict=True):
        x, y = (m.float().mean((2, 3)) for m in (a, b))
        alike = (2 * x * y + _STABLE) / (x.square() + y.square() + _STABLE)
        rows.append(1 - alike.mean(1))
    return torch.stack(rows).mean(0)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def _blur_stride(x: Tensor) -> Tensor:
    """Halve the resolution after a [1, 2, 1] blur, reflecting two pixels at the border."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = torch.outer(row, row)[None, None].expand(x.shape[1], 1, 3, 3)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, kernel, stride=2, groups=x.shape[1])


def _weight_file(name: NetworkName) -> str:
    wheel = distribution("stlpips-pytorch")
    path = f"stlpips_pytorch/weights/vST0.0/{name}_shift_tolerant.pth"
    return str(wheel.locate_file(path))
