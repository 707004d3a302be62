"""Tile encoder: a timm vision transformer that turns images into features.

One class serves both H0-mini's shape (ViT-B/14, SwiGLU, four registers) and the small encoder of
`tiny`. Its CLS token conditions the transformer; its patch tokens are what training aligns to.
Each encoder carries its own pixel statistics. It refuses to know how the features are used.

Source: Filiot et al. (2025), "Distilling foundation models for robust and efficient models in
digital pathology" (H0-mini); timm `vit_base_patch14_reg4_dinov2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.layers.mlp import SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

H0_MINI_MEAN = (0.707223, 0.578729, 0.703617)
H0_MINI_STD = (0.211883, 0.230117, 0.177517)


class Features(NamedTuple):
    """Output of an encoder for a batch of tiles.

    Attributes:
        cls: [B, D], one vector per tile; the transformer's condition.
        patches: [B, N, D], N = 256 tokens in rows of 16 for 224 px; alignment target.
    """

    cls: Tensor
    patches: Tensor


class TileEncoder(ModelMixin, ConfigMixin):
    """Vision transformer with CLS and register tokens over 14-px patches.

    The default arguments are H0-mini's (85,739,520 parameters).

    Args:
        input_px: Side of the tiles.
        patch_px: Side of a patch.
        embed_dim: Width D of the features.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Packed SwiGLU width over `embed_dim`; 5.33334 for H0-mini.
        num_registers: Register tokens, dropped from the output.
        init_values: Initial layer scale; None for none.
        mean: RGB mean in [0, 1] subtracted from the tiles.
        std: RGB standard deviation the tiles are divided by.
    """

    @register_to_config
    def __init__(
        self,
        *,
        input_px: int = 224,
        patch_px: int = 14,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 5.33334,
        num_registers: int = 4,
        init_values: float | None = 1e-5,
        mean: tuple[float, float, float] = H0_MINI_MEAN,
        std: tuple[float, float, float] = H0_MINI_STD,
    ) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=input_px,
            patch_size=patch_px,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            mlp_layer=SwiGLUPacked,
            act_layer=nn.SiLU,
            init_values=init_values,
            reg_tokens=num_registers,
            no_embed_class=True,
            num_classes=0,
            global_pool="",
        )

    def forward(self, images: Tensor) -> Features:
        """Return the features of uint8 images [B, 3, input_px, input_px]."""
        weight = self.vit.patch_embed.proj.weight
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self.config["mean"], dtype=torch.float32, device=images.device).view(
            shape
        )
        std = torch.tensor(self.config["std"], dtype=torch.float32, device=images.device).view(
            shape
        )
        tokens = self.vit((images.float().div(255.0).sub(mean).div(std)).to(weight.dtype))
        return Features(tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :])


def read_encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tile_px: int
) -> tuple[TileEncoder, dict[str, Tensor], tuple[str, ...]]:
    """Return an encoder of the shape that tensors have, on the meta device, tensors and remarks.

    H0-mini's repository holds timm's names and a config whose `pretrained_cfg` states mean and
    standard deviation. As timm does on loading, DINOv2's own names are translated and positions
    of another grid are interpolated. Whether it has layer scale is read off the tensors.

    Args:
        config: Content of the repository's `config.json`, or nothing.
        tensors: Tensors in timm's or DINOv2's names; where they say nothing, H0-mini's shape is
            taken.
        tile_px: Side of the model's tiles.

    Returns:
        The encoder, the tensors under timm's names, and remarks.
    """
    notes, named = [], dict(tensors)
    if "register_tokens" in named or "mask_token" in named:
        with torch.device("meta"):
            like = TileEncoder(input_px=tile_px).vit
        named = checkpoint_filter_fn(named, like)
        notes.append("encoder: DINOv2's names were translated")
    shape = _shape_of(named)
    patch, width = shape.get("patch_px", 14), shape.get("embed_dim", 768)
    grid = tile_px // patch
    positions = named.get("pos_embed")
    if positions is not None and positions.ndim == 3 and positions.shape[1] != grid * grid:
        stored = math.isqrt(positions.shape[1])
        if stored * stored == positions.shape[1]:
            named["pos_embed"] = resample_abs_pos_embed(
                positions.float(), [grid, grid], num_prefix_tokens=0
            )
            notes.append(f"encoder: positions of {stored}x{stored} patches were interpolated")
    shape["input_px"] = tile_px
    shape["num_heads"] = max(1, width // 64)
    stated = config.get("pretrained_cfg") or {}
    for name, usual in (("mean", H0_MINI_MEAN), ("std", H0_MINI_STD)):
        values = tuple(stated.get(name) or usual)
        shape[name] = values
        if max(abs(a - b) for a, b in zip(values, usual, strict=True)) > 1e-4:
            notes.append(f"encoder/config.json states {name} {values}, H0-mini's is {usual}")
    with torch.device("meta"):
        return TileEncoder(**shape), named, tuple(notes)


def _shape_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `TileEncoder` that the shapes of timm's tensors tell."""
    shape: dict[str, Any] = {}
    if {"cls_token", "patch_embed.proj.weight"} <= tensors.keys():
        width = tensors["cls_token"].shape[-1]
        blocks = [int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")]
        shape |= {"embed_dim": width, "patch_px": tensors["patch_embed.proj.weight"].shape[-1]}
        shape |= {"depth": 1 + max(blocks, default=0)}
        if "blocks.0.mlp.fc1.weight" in tensors:
            # A millionth more, since the layer's width is rounded down.
            shape["mlp_ratio"] = tensors["blocks.0.mlp.fc1.weight"].shape[0] / width + 1e-6
    if "reg_token" in tensors:
        shape["num_registers"] = tensors["reg_token"].shape[1]
    if "blocks.0.attn.qkv.weight" in tensors and "blocks.0.ls1.gamma" not in tensors:
        shape["init_values"] = None
    return shape


class StainProbe(ModelMixin, ConfigMixin):
    """Read from the features of one tile what its whole slide looks like.

    One linear layer from CLS to nine numbers: mean tissue optical density of the slide, and the
    upper triangle of the square root of its covariance. Averages over a tile mix stain with what
    the tile happens to hold; the probe was taught on single tiles to tell them apart.

    Args:
        conditioning_dim: Width D of the features.
    """

    @register_to_config
    def __init__(self, *, conditioning_dim: int = 768) -> None:
        super().__init__()
        self.linear = nn.Linear(conditioning_dim, 9)
        self.register_buffer("shift", torch.zeros(9))
        self.register_buffer("scale", torch.ones(9))

    def forward(self, cls: Tensor) -> Tensor:
        """Return the nine standardised statistics [B, 9] of features [B, D]."""
        return self.linear(cls)

    def statistics(self, cls: Tensor) -> Tensor:
        """Return the nine statistics [B, 9] in units of optical density, float64."""
        raw = self(cls.to(self.linear.weight)).double()
        return raw * self.scale.double() + self.shift.double()
