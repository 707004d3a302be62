"""Model folders in diffusers' layout: strict loading, saving and the digest of the weights.

    model_index.json                     parts, tile specification, format version
    transformer/{config.json, diffusion_pytorch_model.safetensors}
    vae/{...}   encoder/{...}   stain_probe/{...}   (the last two are optional)

Released folders have the same layout without `format_version`; `cytosyn_aug.released` reads what
they say otherwise. Loading never executes code from a folder and never fills a gap: missing,
unexpected, misshapen and non-finite tensors of all parts are named in one error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from cytosyn_aug.compvis import compvis_vae_state, is_compvis_vae, vae_config_from_state
from cytosyn_aug.config import TileSpec
from cytosyn_aug.encoder import StainProbe, TileEncoder, read_encoder
from cytosyn_aug.files import write_atomically
from cytosyn_aug.released import known_settings, latent_statistics, transformer_settings
from cytosyn_aug.transformer import SiT
from cytosyn_aug.weights import (
    WEIGHTS_NAME,
    KeyMap,
    assign,
    compare,
    read_json,
    read_tensors,
    report,
    weight_files,
)

FORMAT_VERSION = 1
EMBEDDED_MODEL = Path(__file__).parent / "models" / "tiny"
_PARTS: dict[str, type] = {
    "vae": AutoencoderKL,
    "transformer": SiT,
    "encoder": TileEncoder,
    "stain_probe": StainProbe,
}
_REQUIRED = ("transformer", "vae")


class ModelParts(NamedTuple):
    """What a model folder holds, in evaluation mode, with the digest of all its weights.

    `notes` are remarks on what the folder states differently from what was expected.
    """

    vae: AutoencoderKL
    transformer: SiT
    encoder: TileEncoder | None
    stain_probe: StainProbe | None
    tile: TileSpec
    digest: str
    notes: tuple[str, ...] = ()
    folder: Path | None = None


def load_model(
    folder: Path | str,
    *,
    encoder: Path | str | None = "auto",
    key_map: Path | str | KeyMap | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelParts:
    """Load every part of a model folder, strictly: this package's layout or the released one.

    Weights are mapped into memory; only tensors stored in another type than `dtype` are copied.

    Args:
        folder: Folder with `model_index.json`, `transformer/` and `vae/`.
        encoder: "auto" takes the folder's own `encoder/`, if any; None takes none; else a folder
            or safetensors file of H0-mini in timm's names.
        key_map: JSON file (or `KeyMap`) that answers a report of differences.
        dtype: Floating type of the parts; latent statistics stay float32.

    Returns:
        The parts, on the CPU.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The folder is corrupt, partial or of another version, or its weights do not
            fit; one message names all differences of all parts.
    """
    folder = Path(folder)
    answers = key_map if isinstance(key_map, KeyMap) else KeyMap.load(key_map)
    index = _read_index(folder)
    names = [k for k in _PARTS if k in index or k in _REQUIRED]
    if encoder != "auto":
        names = [k for k in names if k in _REQUIRED]
    drafts = {k: _draft(k, folder / k, answers, "format_version" in index) for k in names}
    if encoder is not None and encoder != "auto":
        drafts["encoder"] = _draft_encoder(Path(encoder), answers)
    statistics = _fill_statistics(drafts, index, answers)
    _assign_all(drafts, str(folder), dtype)
    parts = {name: draft.network for name, draft in drafts.items()}
    tile, tile_notes = _tile(index, parts["transformer"])
    notes = [note for draft in drafts.values() for note in draft.notes]
    return ModelParts(
        vae=parts["vae"],
        transformer=parts["transformer"],
        encoder=parts.get("encoder"),
        stain_probe=parts.get("stain_probe"),
        tile=tile,
        digest=parts_digest({k: d.files for k, d in drafts.items()}, answers),
        notes=(*tile_notes, *statistics, *notes),
        folder=folder,
    )


def save_model(folder: Path, parts: ModelParts, dtype: torch.dtype = torch.float16) -> None:
    """Write a model folder; `model_index.json` comes last, so a partial folder is not a model.

    Args:
        folder: Created if missing.
        parts: What to write; the digest and notes in it are ignored.
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


def parts_digest(files: Mapping[str, Sequence[Path]], answers: KeyMap) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the files of all parts and the key map."""
    whole = hashlib.sha256()
    for part in sorted(files):
        for file in files[part]:
            whole.update(f"{part}/{file.name}".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    whole.update(block)
    if answers != KeyMap():
        whole.update(json.dumps(asdict(answers), sort_keys=True).encode())
    return whole.hexdigest()[:16]


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module, or raise one error that names every difference.

    Args:
        module: Receives the tensors, cast to its own dtypes.
        tensors: State dict.
        source: Where they come from, for the message.

    Raises:
        ValueError: Missing, unexpected, misshapen or non-finite tensors.
    """
    differences = compare(type(module).__name__, module, tensors)
    if differences:
        raise ValueError(report(source, [differences]))
    module.load_state_dict(tensors)


class _Draft(NamedTuple):
    """A part before its weights are in: network without memory, tensors, remarks, files."""

    network: Any  # Any: the class depends on the part
    holder: nn.Module  # the network, or the module in it whose names the tensors bear
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def _draft(name: str, folder: Path, answers: KeyMap, is_ours: bool) -> _Draft:
    cls, file = _PARTS[name], folder / "config.json"
    config = read_json(file, "the model folder is partial; copy it again")
    files = weight_files(folder)
    tensors = answers.rename(name, read_tensors(files))
    if cls is SiT:
        settings, notes = transformer_settings(config, tensors, cls)
    elif cls is AutoencoderKL and is_compvis_vae(tensors):
        tensors = compvis_vae_state(tensors)
        settings, notes = vae_config_from_state(tensors), ("vae: CompVis' names were translated",)
    else:
        settings, notes = known_settings(config, cls, name)
    if is_ours and notes:
        raise ValueError(f"{file} does not describe a {cls.__name__}: {'; '.join(notes)}")
    try:
        with torch.device("meta"):  # no memory, and no time for initial values
            network = cls(**settings)
    except (TypeError, ValueError, ZeroDivisionError, AssertionError) as error:
        raise ValueError(f"{file} does not describe a {cls.__name__}: {error}") from error
    if cls is SiT and "pos_embed" not in tensors:
        tensors["pos_embed"] = network.fixed_positions()
        notes = (*notes, "transformer: fixed positions are not stored, and were computed")
    return _Draft(network, network, config, tensors, notes, (file, *files))


def _draft_encoder(source: Path, answers: KeyMap) -> _Draft:
    """Return H0-mini from timm's names, with or without a config beside them."""
    files = (
        [source] if source.suffix == ".safetensors" else weight_files(source, "model.safetensors")
    )
    config_file = files[0].parent / "config.json"
    config = read_json(config_file, "") if config_file.is_file() else {}
    tensors = answers.rename("encoder", read_tensors(files))
    with torch.device("meta"):
        network, notes = read_encoder(config, tensors)
    return _Draft(network, network.vit, config, tensors, notes, tuple(files))


def _fill_statistics(
    drafts: dict[str, _Draft], index: dict[str, Any], answers: KeyMap
) -> tuple[str, ...]:
    """Put the latent statistics of a folder into the transformer's tensors; return a remark."""
    transformer = drafts["transformer"]
    tensors, channels = transformer.tensors, transformer.network.config["in_channels"]
    found = latent_statistics(tensors, transformer.config, drafts["vae"].config, index, answers)
    if found.mean.numel() not in (1, channels):
        raise ValueError(
            f"{found.source} states latent statistics of {found.mean.numel()} channels, "
            f"expected {channels}"
        )
    tensors["bn.running_mean"] = found.mean.expand(channels).contiguous()
    tensors["bn.running_var"] = found.variance.expand(channels).contiguous()
    tensors.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    expected = found.source.startswith("bn.")
    return () if expected else (f"latent statistics come from {found.source}",)


def _assign_all(drafts: dict[str, _Draft], source: str, dtype: torch.dtype) -> None:
    differences = [
        compare(type(d.network).__name__, d.holder, d.tensors, part=k) for k, d in drafts.items()
    ]
    if any(differences):
        raise ValueError(report(source, [d for d in differences if d]))
    for draft in drafts.values():
        assign(draft.holder, draft.tensors, dtype)
        draft.network.eval().requires_grad_(False)


def _tile(index: dict[str, Any], transformer: SiT) -> tuple[TileSpec, tuple[str, ...]]:
    if "tile" in index:
        return TileSpec(**index["tile"]), ()
    tile = TileSpec(size_px=8 * transformer.config["input_size"])
    return tile, (f"model_index.json states no tiles; {tile.describe()} assumed",)


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json", "is this a model folder?")
    version = index.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {version}, this release reads {FORMAT_VERSION}; "
            "export the model again or install the matching cytosyn-aug"
        )
    missing = set(_REQUIRED) - index.keys()
    if missing:
        raise ValueError(f"{folder / 'model_index.json'} names no {sorted(missing)}; copy it again")
    return index


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
