"""What a model folder holds: parts, parameters, digests, statistics, licence, deviations."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import timm
import torch
from torch import nn

from cytosyn_aug.config import PART_NAMES
from cytosyn_aug.model.checkpoint import EMBEDDED_MODEL
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.hub import find_folder, licence_of

RELEASED_PARAMETERS = {"transformer": (682_906_128, 674_774_800), "vae": (83_653_863,)}


def describe_model(generator: TileGenerator) -> dict[str, Any]:
    """Return what `cytosyn-aug info` prints, as JSON values.

    Args:
        generator: The loaded model.
    """
    parts = {name: getattr(generator, name) for name in PART_NAMES}
    sizes = {k: num_parameters(p) for k, p in parts.items() if p is not None}
    statistics = generator.transformer.bn
    assert statistics.running_mean is not None
    assert statistics.running_var is not None
    return {
        "folder": str(generator.folder),
        "digest": generator.digest,
        "parameters": sizes | {"all": sum(sizes.values())},
        "is_released_size": all(sizes[k] in v for k, v in RELEASED_PARAMETERS.items()),
        "tile": generator.tile.describe(),
        "condition_width": generator.transformer.config["conditioning_dim"],
        "latents": {
            "shape": list(generator.latent_shape),
            "mean": [round(x, 6) for x in statistics.running_mean.tolist()],
            "std": [round(x, 6) for x in statistics.running_var.sqrt().tolist()],
        },
        "dtype": str(generator.dtype).removeprefix("torch."),
        "licence": _licence(generator.folder),
        "notes": list(generator.notes),
    }


def _licence(folder: Path | None) -> str:
    return (folder and licence_of(folder)) or "not stated by a model card in the folder"


def inventory(source: Path | str | None, revision: str | None = None) -> dict[str, Any]:
    """Return what lies in a model folder, weights or not, for the report of one that fails.

    Args:
        source: As for `TileGenerator.from_pretrained`; None for the embedded model.
        revision: Likewise.

    Returns:
        The content of every JSON file, and of every safetensors file the size, and each tensor's
        type and shape; under the path inside the folder.
    """
    folder = EMBEDDED_MODEL if source is None else find_folder(source, revision=revision)
    files: dict[str, Any] = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json":
            files[name] = file.read_text(errors="replace")
        elif file.suffix == ".safetensors":
            files[name] = {"bytes": file.stat().st_size, "tensors": _tensors_in(file)}
    return files


def _tensors_in(file: Path) -> dict[str, str] | str:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {k: f"{part.get_dtype()} {part.get_shape()}" for k, part in parts.items()}
    except safetensors.SafetensorError as error:
        return f"cannot be read: {error}"


def num_parameters(part: nn.Module) -> int:
    """Return the number of parameters, fixed positions included, buffers not."""
    return sum(p.numel() for p in part.parameters())


def info_text(facts: dict[str, Any]) -> str:
    """Return the facts as lines for a terminal."""
    sizes = "\n".join(f"  {k:12s} {v:>13,}" for k, v in facts["parameters"].items())
    released = "as released" if facts["is_released_size"] else "not the released model's"
    notes = "\n".join(f"  - {n}" for n in facts["notes"]) or "  none"
    latents = facts["latents"]
    return (
        f"{facts['folder']}\n"
        f"digest       {facts['digest']}\n"
        f"tiles        {facts['tile']}\n"
        f"condition    {facts['condition_width']} features\n"
        f"latents      {latents['shape']}, mean {latents['mean']}, std {latents['std']}\n"
        f"licence      {facts['licence']}\n"
        f"parameters   ({released} in size)\n{sizes}\n"
        f"differences from the expected layout\n{notes}"
    )


def environment() -> dict[str, str]:
    """Return versions and machine, for bug reports."""
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, timm, safetensors)}
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
