"""Write the averaged weights of several runs as one model folder, reopen it and compare."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cytosyn_aug.model.checkpoint import ModelParts, load_model, save_model
from cytosyn_aug.model.transformer import SiT
from training.model_card import CardSources, write_model_card


def export(
    folder: Path,
    parts: ModelParts,
    card: CardSources,
    dtype: torch.dtype = torch.float16,
    encoder: Path | None = None,
) -> str:
    """Write a model folder without the training-only projector, with its card; return its digest.

    Args:
        folder: Where to.
        parts: Trained networks; the digest in it is ignored.
        card: What the model card is written from.
        dtype: Stored floating type.
        encoder: H0-mini, where `parts` have no encoder: the model is used, evaluated and known by
            its digest together with it, though it is not copied.

    Raises:
        ValueError: An evaluation is of another model; the weights are written, the card is not.
        RuntimeError: What was reopened differs from what was written.
    """
    trimmed = SiT(**(_settings(parts.transformer) | {"z_dims": ()}))
    state = parts.transformer.state_dict()
    trimmed.load_state_dict({k: v for k, v in state.items() if not k.startswith("projectors.")})
    parts = parts._replace(transformer=trimmed)
    save_model(folder, parts, dtype)
    reopened = load_model(folder)
    for name, old, new in zip(parts._fields, parts, reopened, strict=True):
        if isinstance(old, nn.Module):
            _compare(name, old, new, dtype)
    used = reopened if encoder is None else load_model(folder, encoder=encoder)
    write_model_card(folder, used, card)
    return used.digest


def _settings(part: SiT) -> dict[str, object]:
    return {k: v for k, v in part.config.items() if not k.startswith("_")}


def _compare(name: str, old: nn.Module, new: nn.Module, dtype: torch.dtype) -> None:
    reopened = new.state_dict()
    for key, value in old.state_dict().items():
        is_stored_short = value.is_floating_point() and not key.startswith("bn.")
        stored = value.to(dtype) if is_stored_short else value
        if not torch.equal(stored.to(reopened[key].dtype), reopened[key]):
            raise RuntimeError(f"{name}.{key} changed on disk; do not use this export")
