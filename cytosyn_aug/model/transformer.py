"""Diffusion transformer: SiT as in REPA-E, conditioned on one feature vector.

State-dict names equal REPA-E's, with `y_embedder.linear` for the condition, so that released
weights load by name. Time t is 1 for noise and 0 for data, fed to the network as it is.

Shape suffixes: B batch, C latent channels, H W latent sides, N tokens, D width, F features.

Source: Peebles and Xie (2023), DiT; Ma et al. (2024), SiT; Leng et al. (2025), REPA-E.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

_NUM_FREQUENCIES = 256


class Modulation(NamedTuple):
    """What shifts, scales and gates every block at given times and conditions.

    Attributes:
        blocks: One [B, 6, D] per block: shift, scale and gate of attention, then of the MLP.
        final: [B, 2, D], shift and scale of the last layer.
    """

    blocks: tuple[Tensor, ...]
    final: Tensor

    def rows(self, part: slice) -> Modulation:
        """Return some rows, views of the same memory."""
        return Modulation(tuple(block[part] for block in self.blocks), self.final[part])


class SiT(ModelMixin, ConfigMixin):
    """Velocity of a latent tile under a condition.

    The default arguments are CytoSyn's: SiT-XL/2 on 28x28x4 latents of 224-px tiles, 682,906,128
    parameters with the alignment projector. Latents are whitened: `whiten` and `unwhiten` hold
    the statistics (buffers of `bn`) that translate to and from the VAE's own latents.

    With `decoupled_depth` it is a flow map as well, without new parameters: the first blocks see
    the time t at which a jump starts, the others and the last layer the time r at which it ends.
    At r = t it is the velocity, bit for bit that of a plain trunk with the same weights.

    Args:
        input_size: Side of the latent, tile side / 8.
        patch_size: Latent positions per token side.
        in_channels: Latent channels C.
        hidden_size: Width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        conditioning_dim: Width F of the condition.
        encoder_depth: Block after which tokens are aligned to the encoder in training.
        z_dims: Widths of the alignment targets; empty for no projector (inference only).
        projector_dim: Hidden width of the projector.
        decoupled_depth: Blocks that see t while the others see r; None for a plain trunk.
        taught_guidance: What guidance a student has learned to fold in: (largest scale, lower end,
            upper end of the interval in t, 1 = noise). None for no guidance embedding.

    Raises:
        ValueError: `decoupled_depth` leaves no block for either time.

    Source for the flow map: Lee et al. (2025), "Decoupled MeanFlow", arXiv 2510.24474.
    """

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int = 28,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        conditioning_dim: int = 768,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (768,),
        projector_dim: int = 2048,
        decoupled_depth: int | None = None,
        taught_guidance: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        if decoupled_depth is not None and not 0 < decoupled_depth < depth:
            raise ValueError(
                f"decoupled_depth is {decoupled_depth}, expected 1 to {depth - 1} of {depth} "
                "blocks, or None for a plain trunk"
            )
        self.grid_size = input_size // patch_size
        self.patch_size = patch_size
        self.encoder_depth = encoder_depth
        self.decoupled_depth = decoupled_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = _NumberEmbedder(hidden_size)
        self.y_embedder = _ConditionEmbedder(conditioning_dim, hidden_size)
        self.guidance_embedder = _NumberEmbedder(hidden_size) if taught_guidance else None
        self.pos_embed = nn.Parameter(self.fixed_positions(), requires_grad=False)
        self.blocks = nn.ModuleList(
            _TransformerBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(
            _projector(hidden_size, projector_dim, width) for width in z_dims
        )
        self.final_layer = _FinalLayer(hidden_size, patch_size, in_channels)
        self.bn = nn.BatchNorm2d(in_channels, eps=1e-4, affine=False)
        self._initialise()

    def fixed_positions(self) -> Tensor:
        """Return the fixed sin-cos positions [1, N, D] that `pos_embed` holds."""
        return _sincos_positions(self.config["hidden_size"], self.grid_size)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        condition_BF: Tensor,
        r_B: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity at whitened latents, or the average velocity of a jump.

        Args:
            x_BCHW: Latents at time t, any float dtype; the network's dtype is used inside.
            t_B: Times in [0, 1], 1 = noise.
            condition_BF: Encoder CLS vectors; the zero vector is the null condition.
            r_B: Times r <= t to jump to, x_r = x_t + (r - t) u; None for r = t.
            guidance_B: Scales, 1 = none, to be folded in; None for 1.

        Returns:
            Velocity eps - x, or its average u from t to r; shape and dtype of `x_BCHW`.

        Raises:
            ValueError: Given r without `decoupled_depth`, or guidance without `taught_guidance`.
        """
        return self.forward_tokens(x_BCHW, t_B, condition_BF, r_B, guidance_B)[0]

    def forward_tokens(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        condition_BF: Tensor,
        r_B: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does and the tokens [B, N, D] after block `encoder_depth`."""
        modulation = self.modulate(t_B, condition_BF, r_B, guidance_B)
        h_BND = self._embed(x_BCHW)
        aligned_BND = h_BND
        for number, (block, m_B6D) in enumerate(
            zip(self.blocks, modulation.blocks, strict=True), start=1
        ):
            h_BND = block(h_BND, m_B6D)
            if number == self.encoder_depth:
                aligned_BND = h_BND
        out = self._unpatchify(self.final_layer(h_BND, modulation.final))
        return out.to(x_BCHW.dtype), aligned_BND

    def forward_modulated(self, x_BCHW: Tensor, modulation: Modulation) -> Tensor:
        """Return what `forward` does, of times and conditions that `modulate` has seen before.

        A sampler knows its times and conditions beforehand: all its steps can be modulated in one
        pass, and no step then has a host number in it that a compiler would have to bake in.
        """
        h_BND = self._embed(x_BCHW)
        for block, m_B6D in zip(self.blocks, modulation.blocks, strict=True):
            h_BND = block(h_BND, m_B6D)
        return self._unpatchify(self.final_layer(h_BND, modulation.final)).to(x_BCHW.dtype)

    def modulate(
        self,
        t_B: Tensor,
        condition_BF: Tensor,
        r_B: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Modulation:
        """Return the modulation of every block by times, conditions and guidance.

        Args:
            t_B: Times, 1 = noise; where a jump starts.
            condition_BF: Feature vectors.
            r_B: Times at which a jump ends; None for the velocity at `t_B`.
            guidance_B: Guidance scales, for a network that was taught them; None for 1.
        """
        start_BD, end_BD = self._embed_condition(t_B, condition_BF, r_B, guidance_B)
        split = len(self.blocks) if self.decoupled_depth is None else self.decoupled_depth
        blocks = tuple(
            block.modulate(start_BD if number < split else end_BD)  # type: ignore[operator]
            for number, block in enumerate(self.blocks)
        )
        return Modulation(blocks, self.final_layer.modulate(end_BD))

    def aligned_tokens(self, x_BCHW: Tensor, t_B: Tensor, condition_BF: Tensor) -> Tensor:
        """Return the tokens of `forward_tokens` alone, without the blocks behind them."""
        start_BD, _ = self._embed_condition(t_B, condition_BF, None, None)
        h_BND = self._embed(x_BCHW)
        for block in self.blocks[: self.encoder_depth]:
            h_BND = block(h_BND, block.modulate(start_BD))  # type: ignore[operator]
        return h_BND

    def _embed(self, x_BCHW: Tensor) -> Tensor:
        return self.x_embedder(x_BCHW.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed

    def _embed_condition(
        self, t_B: Tensor, condition_BF: Tensor, r_B: Tensor | None, guidance_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what modulates the blocks at either end of a jump [B, D], the same at r = t."""
        dtype = self.x_embedder.proj.weight.dtype
        shared_BD = self.y_embedder(condition_BF.to(dtype))
        if self.guidance_embedder is not None:
            scale_B = torch.ones_like(t_B) if guidance_B is None else guidance_B
            shared_BD = shared_BD + self.guidance_embedder(scale_B, dtype)
        elif guidance_B is not None:
            raise ValueError("this network takes no guidance scale; guide its velocity instead")
        start_BD = self.t_embedder(t_B, dtype) + shared_BD
        if r_B is None:
            return start_BD, start_BD
        if self.decoupled_depth is None:
            raise ValueError("a plain trunk knows no jumps to r; it has no decoupled_depth")
        return start_BD, self.t_embedder(r_B, dtype) + shared_BD

    def whiten(self, latents: Tensor) -> Tensor:
        """Translate VAE latents [B, C, H, W] to the whitened ones the transformer sees.

        Like REPA-E at inference: the running statistics, without the layer's eps.
        """
        bias, scale = self._latent_statistics(latents)
        return (latents - bias) * scale

    def unwhiten(self, latents: Tensor) -> Tensor:
        """Invert `whiten`."""
        bias, scale = self._latent_statistics(latents)
        return latents / scale + bias

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.bn.running_mean is not None
        assert self.bn.running_var is not None
        bias = self.bn.running_mean.view(1, -1, 1, 1).to(like)
        return bias, self.bn.running_var.float().rsqrt().view(1, -1, 1, 1).to(like)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        p, g = self.patch_size, self.grid_size
        x = tokens.reshape(len(tokens), g, g, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(tokens), -1, g * p, g * p)

    def _initialise(self) -> None:
        """Initialise as DiT: Xavier, zero modulation and output, so that the start is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config["hidden_size"], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("t_embedder.", "y_embedder.")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif name == "guidance_embedder.mlp.2.weight":  # an untaught scale changes nothing
                nn.init.zeros_(parameter)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


class _TransformerBlock(nn.Module):
    """Attention and MLP, both shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.mlp = Mlp(width, hidden, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulate(self, c_BD: Tensor) -> Tensor:
        return self.adaLN_modulation(c_BD).unflatten(1, (6, -1))

    def forward(self, h_BND: Tensor, m_B6D: Tensor) -> Tensor:
        # addcmul(a, b, c) = a + b c reads and writes the tokens once where two operators do twice.
        shift1, scale1, gate1, shift2, scale2, gate2 = m_B6D.split(1, dim=1)
        y_BND = self.attn(torch.addcmul(shift1, self.norm1(h_BND), 1 + scale1))
        h_BND = torch.addcmul(h_BND, gate1, y_BND)
        y_BND = self.mlp(torch.addcmul(shift2, self.norm2(h_BND), 1 + scale2))
        return torch.addcmul(h_BND, gate2, y_BND)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulate(self, c_BD: Tensor) -> Tensor:
        return self.adaLN_modulation(c_BD).unflatten(1, (2, -1))

    def forward(self, h_BND: Tensor, m_B2D: Tensor) -> Tensor:
        shift, scale = m_B2D.split(1, dim=1)
        return self.linear(torch.addcmul(shift, self.norm_final(h_BND), 1 + scale))


class _NumberEmbedder(nn.Module):
    """256 sinusoids of a raw number, t in [0, 1] or a guidance scale, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(_NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, number_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = _NUM_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=number_B.device)
        angles = number_B.float()[:, None] * torch.exp(-math.log(10000.0) / half * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class _ConditionEmbedder(nn.Module):
    """One linear layer; the null condition is the zero vector, hence embedded as the bias."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, width)

    def forward(self, condition_BF: Tensor) -> Tensor:
        return self.linear(condition_BF)


def _projector(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, out),
    )  # fmt: skip


def _sincos_positions(width: int, side: int) -> Tensor:
    """Return fixed positions [1, side^2, width]; the first half of the width encodes columns."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten().double()[:, None] * omega for axis in (columns, rows)]
    parts = [f(a) for a in angles for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]
