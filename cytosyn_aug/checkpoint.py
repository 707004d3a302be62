"""Model folders in diffusers' layout: strict loading, saving and the digest of the weights.

    model_index.json                     parts, tile specification, format version
    transformer/{config.json, diffusion_pytorch_model.safetensors}
    vae/{...}   encoder/{...}   stain_probe/{...}   (the last two are optional)

Loading never executes code from the folder and never fills a gap: missing, unexpected, misshapen
and non-finite tensors are all named in one error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cytosyn_aug.config import TileSpec
from cytosyn_aug.encoder import StainProbe, TileEncoder
from cytosyn_aug.transformer import SiT

FORMAT_VERSION = 1
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
EMBEDDED_MODEL = Path(__file__).parent / "models" / "tiny"
_PARTS: dict[str, type] = {
    "vae": AutoencoderKL,
    "transformer": SiT,
    "encoder": TileEncoder,
    "stain_probe": StainProbe,
}


class ModelParts(NamedTuple):
    """What a model folder holds, in evaluation mode, with the digest of all its weights."""

    vae: AutoencoderKL
    transformer: SiT
    encoder: TileEncoder | None
    stain_probe: StainProbe | None
    tile: TileSpec
    digest: str


def load_model(folder: Path | str) -> ModelParts:
    """Load every part of a model folder, strictly.

    Args:
        folder: Folder with a `model_index.json`.

    Returns:
        The parts, float32, on the CPU.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The folder is corrupt, partial or of another version.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json", "is this a model folder?")
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {version}, this release reads {FORMAT_VERSION}; "
            "export the model again or install the matching cytosyn-aug"
        )
    names = [name for name in _PARTS if name in index]
    missing = {"vae", "transformer"} - set(names)
    if missing:
        raise ValueError(f"{folder / 'model_index.json'} names no {sorted(missing)}; copy it again")
    parts = {name: _load_part(_PARTS[name], folder / name) for name in names}
    return ModelParts(
        vae=parts["vae"],
        transformer=parts["transformer"],
        encoder=parts.get("encoder"),
        stain_probe=parts.get("stain_probe"),
        tile=TileSpec(**index["tile"]),
        digest=folder_digest(folder, names),
    )


def save_model(folder: Path, parts: ModelParts, dtype: torch.dtype = torch.float16) -> None:
    """Write a model folder; `model_index.json` comes last, so a partial folder is not a model.

    Args:
        folder: Created if missing.
        parts: What to write; the digest in it is ignored.
        dtype: Stored floating type, but for latent statistics, which stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, object] = {
        "_class_name": "TileGenerator",
        "format_version": FORMAT_VERSION,
        "tile": asdict(parts.tile),
    }
    for name, cls in _PARTS.items():
        part = getattr(parts, name)
        if part is not None:
            index[name] = [cls.__module__.split(".models")[0], cls.__name__]
            _save_part(part, folder / name, dtype)
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2).encode())


def folder_digest(folder: Path, parts: Iterable[str]) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the configs and weights of the parts."""
    whole = hashlib.sha256()
    for part in sorted(parts):
        for name in ("config.json", WEIGHTS_NAME):
            whole.update(f"{part}/{name}".encode())
            whole.update((folder / part / name).read_bytes())
    return whole.hexdigest()[:16]


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors into a module, or raise one error that names every difference.

    Args:
        module: Receives the tensors, cast to its own dtypes.
        tensors: State dict.
        source: Where they come from, for the message.

    Raises:
        ValueError: Missing, unexpected, misshapen or non-finite tensors.
    """
    expected = module.state_dict()
    shared = expected.keys() & tensors.keys()
    problems = [f"missing: {k}" for k in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected: {k}" for k in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"shape: {k} is {list(tensors[k].shape)}, expected {list(expected[k].shape)}"
        for k in sorted(shared)
        if tensors[k].shape != expected[k].shape
    ]
    problems += [f"not finite: {k}" for k in sorted(shared) if not tensors[k].isfinite().all()]
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ValueError(f"{source} does not fit {type(module).__name__}:\n  {shown}{more}")
    module.load_state_dict(tensors)


def _load_part(cls: type, folder: Path) -> Any:  # Any: the class is the caller's
    settings = _read_json(folder / "config.json", "the model folder is partial; copy it again")
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    try:
        part = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    except TypeError as error:
        raise ValueError(
            f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}"
        ) from error
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the model folder is partial, copy it again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}); copy the model folder again") from error
    load_strictly(part, tensors, str(file))
    return part.eval().requires_grad_(False)


def _save_part(part: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: (v.to(dtype) if v.is_floating_point() and not k.startswith("bn.") else v).contiguous()
        for k, v in part.state_dict().items()
    }
    temporary = folder / f".{WEIGHTS_NAME}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_NAME)
    # Any: ConfigMixin's JSON form is untyped.
    text = part.to_json_string()  # type: ignore[operator]
    write_atomically(folder / "config.json", text.encode())


def _read_json(file: Path, advice: str) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {advice}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {advice}") from error
