"""Write the averaged weights of three runs as one model folder, reopen it and compare."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from cytosyn_aug.checkpoint import load_model, save_model
from cytosyn_aug.config import TileSpec
from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.transformer import SiT


def export(
    folder: Path,
    vae: AutoencoderKL,
    encoder: TileEncoder,
    transformer: SiT,
    tile: TileSpec,
    dtype: torch.dtype = torch.float16,
) -> str:
    """Write a model folder without the training-only projector and return its digest.

    Raises:
        RuntimeError: What was reopened differs from what was written.
    """
    trimmed = SiT(**(_settings(transformer) | {"z_dims": ()}))
    state = transformer.state_dict()
    trimmed.load_state_dict({k: v for k, v in state.items() if not k.startswith("projectors.")})
    save_model(folder, vae, trimmed, encoder, tile, dtype)
    parts = load_model(folder)
    assert parts.encoder is not None
    for name, old, new in (
        ("vae", vae, parts.vae),
        ("encoder", encoder, parts.encoder),
        ("transformer", trimmed, parts.transformer),
    ):
        _compare(name, old, new, dtype)
    return parts.digest


def _settings(part: SiT) -> dict[str, object]:
    return {k: v for k, v in part.config.items() if not k.startswith("_")}


def _compare(name: str, old: nn.Module, new: nn.Module, dtype: torch.dtype) -> None:
    reopened = new.state_dict()
    for key, value in old.state_dict().items():
        stored = value.to(dtype) if value.is_floating_point() and "bn." not in key else value
        if not torch.equal(stored.to(reopened[key].dtype), reopened[key]):
            raise RuntimeError(f"{name}.{key} changed on disk; do not use this export")
