"""Autoencoders of CompVis and of older diffusers, renamed to today's AutoencoderKL.

CompVis' names are LDM's and REPA-E's: decoder levels count from the finest there and from the
coarsest here, attention is 1x1 convolutions there and linear layers here. Diffusers itself once
named attention otherwise, and stable diffusion's autoencoders are still stored so. The networks
are the same.

Source: Rombach et al. (2022), whose architecture both follow.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Tensor]


def is_compvis_vae(state: Mapping[str, Tensor]) -> bool:
    """Return whether an autoencoder has the names of CompVis, which REPA-E keeps."""
    return any(name.startswith(("encoder.down.", "decoder.up.")) for name in state)


def compvis_vae_state(state: Mapping[str, Tensor]) -> State:
    """Rename an autoencoder of CompVis (LDM, REPA-E) to diffusers' `AutoencoderKL`.

    CompVis counts decoder levels from the finest, diffusers from the coarsest; attention is 1x1
    convolutions there and linear layers here. `loss.*` and `discriminator.*` are left out with a
    warning that names them.

    Raises:
        ValueError: Tensors that this architecture lacks, such as attention outside the middle.
    """
    dropped = [name for name in state if name.startswith(("loss.", "discriminator."))]
    if dropped:
        only = f"{len(dropped)} tensors that only training needs: {some_names(dropped)}"
        warnings.warn(f"the autoencoder is converted without {only}", stacklevel=2)
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    levels = [int(m[1]) for name in kept if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    names = {name: _diffusers_name(name, max(levels, default=0)) for name in kept}
    unknown = [name for name, to in names.items() if to is None]
    if unknown:
        raise ValueError(
            f"the autoencoder holds {len(unknown)} tensors that AutoencoderKL lacks: "
            f"{some_names(unknown)}; expected f8d4, with attention in the middle only "
            "(f16d32 has more)"
        )
    return {str(to): _as_linear(str(to), kept[name]) for name, to in names.items()}


def renew_attention(state: Mapping[str, Tensor]) -> State:
    """Rename the attention of autoencoders that diffusers stored before 2023; pass others through.

    Diffusers renames on loading, but only in its own loader.
    """

    def renew(name: str) -> str:
        block, dot, leaf = name.partition(".attentions.0.")
        layer, _, kind = leaf.rpartition(".")
        return f"{block}{dot}{_OLD_ATTENTION.get(layer, layer)}.{kind}" if dot else name

    return {renew(name): _as_linear(name, tensor) for name, tensor in state.items()}


def vae_config_from_state(state: Mapping[str, Tensor], norm_num_groups: int = 32) -> dict[str, Any]:
    """Return the arguments of `AutoencoderKL` that the shapes of its tensors tell.

    Args:
        state: Autoencoder under CompVis' or diffusers' names.
        norm_num_groups: Not visible in any shape; 32 in CompVis' and REPA-E's code.

    Raises:
        ValueError: A tensor is missing, or the groups do not divide the channels.
    """
    if is_compvis_vae(state):
        state = compvis_vae_state(state)
    first = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    num_levels = max(1, count_matches(state, first.format(r"\d+", 0)))
    widths = tuple(len(find_tensor(state, first.format(i, 0))) for i in range(num_levels))
    if any(width % norm_num_groups for width in widths):
        raise ValueError(
            f"block_out_channels {list(widths)} are not divided by {norm_num_groups} groups; pass "
            "the norm_num_groups of the training"
        )
    return {
        "in_channels": find_tensor(state, "encoder.conv_in.weight").shape[1],
        "out_channels": find_tensor(state, "decoder.conv_out.weight").shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": widths,
        "layers_per_block": count_matches(state, first.format(0, r"\d+")),
        "latent_channels": find_tensor(state, "decoder.conv_in.weight").shape[1],
        "norm_num_groups": norm_num_groups,
        "scaling_factor": 1.0,  # the transformer's `bn` whitens
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
    }


_HALF, _LEVEL = r"(?P<half>encoder|decoder)", r"(?P<level>\d+)"
_RESNET = r"(?P<leaf>norm1|conv1|norm2|conv2|nin_shortcut)"
_BLOCK = rf"block\.(?P<block>\d+)\.{_RESNET}"
_DOWN, _UP = "encoder.down_blocks.{level}", "decoder.up_blocks.{reversed}"
_RENAMED_MODULES = {
    rf"encoder\.down\.{_LEVEL}\.{_BLOCK}": _DOWN + ".resnets.{block}.{leaf}",
    rf"encoder\.down\.{_LEVEL}\.downsample\.conv": _DOWN + ".downsamplers.0.conv",
    rf"decoder\.up\.{_LEVEL}\.{_BLOCK}": _UP + ".resnets.{block}.{leaf}",
    rf"decoder\.up\.{_LEVEL}\.upsample\.conv": _UP + ".upsamplers.0.conv",
    rf"{_HALF}\.mid\.block_1\.{_RESNET}": "{half}.mid_block.resnets.0.{leaf}",
    rf"{_HALF}\.mid\.block_2\.{_RESNET}": "{half}.mid_block.resnets.1.{leaf}",
    rf"{_HALF}\.mid\.attn_1\.(?P<leaf>norm|q|k|v|proj_out)": "{half}.mid_block.attentions.0.{leaf}",
    rf"{_HALF}\.(?P<leaf>conv_in|norm_out|conv_out)": "{half}.{leaf}",
    r"(?P<leaf>quant_conv|post_quant_conv)": "{leaf}",
}
_LEAVES = {
    "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "norm": "group_norm",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}  # fmt: skip
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _diffusers_name(name: str, last_level: int) -> str | None:
    module, _, kind = name.rpartition(".")
    for pattern, to in _RENAMED_MODULES.items():
        if kind in ("weight", "bias") and (match := re.fullmatch(pattern, module)):
            groups = match.groupdict("0")
            groups["leaf"] = _LEAVES.get(groups.get("leaf", ""), groups.get("leaf", ""))
            groups["reversed"] = str(last_level - int(groups.get("level", 0)))
            return f"{to.format(**groups)}.{kind}"
    return None


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Drop the two unit sides of an attention weight [C, C, 1, 1]; pass others through."""
    is_pointwise = ".attentions." in name and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0] if is_pointwise else tensor


def find_tensor(state: Mapping[str, Any], name: str) -> Tensor:
    """Return a tensor by name, or raise ValueError that shows what names there are."""
    if not isinstance(state.get(name), Tensor):
        raise ValueError(f"no tensor {name} among {some_names(state)}; is this the right file?")
    return state[name]


def count_matches(state: Mapping[str, Any], pattern: str) -> int:
    """Return how many names match a regular expression as a whole."""
    return sum(bool(re.fullmatch(pattern, name)) for name in state)


def some_names(names: Iterable[object]) -> str:
    """Return up to six names in order, and how many more there are, for messages."""
    listed = sorted(map(str, names))
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
