"""Model folders in diffusers' layout: strict loading, saving and the digest of the weights.

    model_index.json                     parts, tile specification, format version
    transformer/{config.json, diffusion_pytorch_model.safetensors}
    vae/{...}
    encoder/{...}   stain_probe/{...}   student/{...}   decoder/{...}   (optional)

Released folders have the same layout without `format_version`; `cytosyn_aug.model.released` reads
what they say otherwise. Loading never executes code from a folder and never fills a gap: missing,
unexpected, misshapen and non-finite tensors of all parts are named in one error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from cytosyn_aug.config import Json, TileSpec, config_json
from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.io.json_files import from_json, read_json, to_json
from cytosyn_aug.model.decoder import SmallDecoder
from cytosyn_aug.model.encoder import StainProbe, TileEncoder
from cytosyn_aug.model.parts import (
    PARTS,
    assign_weights,
    fill_statistics,
    read_encoder_part,
    read_part,
)
from cytosyn_aug.model.released import index_notes
from cytosyn_aug.model.tensors import WEIGHTS_NAME, KeyMap
from cytosyn_aug.model.transformer import SiT

FORMAT_VERSION = 1
EMBEDDED_MODEL = Path(__file__).parent.parent / "models" / "tiny"
# What `model_index.json` names as the home of each part. Folders outlive the layout of the code, so
# these words are part of the format, and nothing reads them back.
_LIBRARIES = {
    "vae": "diffusers",
    "transformer": "cytosyn_aug.transformer",
    "encoder": "cytosyn_aug.encoder",
    "stain_probe": "cytosyn_aug.encoder",
    "student": "cytosyn_aug.transformer",
    "decoder": "cytosyn_aug.small_decoder",
}
_REQUIRED = ("transformer", "vae")
_OF_THE_ENCODER = ("encoder", "stain_probe")


class ModelParts(NamedTuple):
    """What a model folder holds, in evaluation mode, with the digest of all its weights.

    Attributes:
        student: Jumps along the flow of `transformer` in a few forwards.
        decoder: Decodes the latents of `vae` faster than its own decoder.
        null_condition: float32 [D] that stands for no condition; None for the zero vector.
        notes: Remarks on what the folder states differently from what was expected.
    """

    vae: AutoencoderKL
    transformer: SiT
    encoder: TileEncoder | None
    stain_probe: StainProbe | None
    tile: TileSpec
    digest: str
    null_condition: Tensor | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    student: SiT | None = None
    decoder: SmallDecoder | None = None


def place_parts(parts: ModelParts, device: torch.device, dtype: torch.dtype) -> ModelParts:
    """Return parts on a device and in a floating type, to be computed with.

    The same networks, moved. The null condition is float32, zeros where none was learned.
    """
    null = parts.null_condition
    if null is None:
        null = torch.zeros(parts.transformer.config["conditioning_dim"])
    # The latent statistics are 8 numbers, and stain is in their last digits: they keep float32.
    statistics = {k: v.clone() for k, v in parts.transformer.bn.named_buffers()}
    for part in parts:
        if isinstance(part, nn.Module):
            # Not diffusers' own to(): it warns about a float32 list that is empty here.
            nn.Module.to(part, device, dtype)
    for name, value in statistics.items():
        setattr(parts.transformer.bn, name, value.to(device))
    for convolutions in (parts.vae, parts.decoder):
        if convolutions is not None:
            nn.Module.to(convolutions, memory_format=torch.channels_last)
    return parts._replace(null_condition=null.float().to(device))


def load_model(
    folder: Path | str,
    *,
    encoder: Path | str | None = "auto",
    key_map: Path | str | KeyMap | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelParts:
    """Load every part of a model folder, strictly: this package's layout or the released one.

    Weights are mapped into memory: loading in the stored type takes no more than the files' size.
    Another `dtype` takes a converted copy besides, while it loads.

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
    is_ours = "format_version" in index
    left_out = () if encoder == "auto" else _OF_THE_ENCODER
    stored = [k for k in PARTS if is_ours and k in index and k not in left_out]
    names = [k for k in PARTS if k in _REQUIRED or k in stored]
    unfilled = {k: read_part(k, folder / k, answers, is_ours) for k in names}
    tile, tile_notes = _tile(index, unfilled["transformer"].network)
    source = _encoder_source(folder, encoder, is_ours)
    if source is not None:
        unfilled["encoder"] = read_encoder_part(source, answers, tile)
    null_condition = unfilled["transformer"].tensors.pop("null_condition", None)
    statistics = fill_statistics(unfilled, index, answers)
    assign_weights(unfilled, str(folder), dtype, statistics.problems)
    parts = {name: part.network for name, part in unfilled.items()}
    _check_fit(parts, tile, null_condition)
    if "student" in parts:
        _check_student(parts["student"], parts["transformer"], folder)
    notes = [*index_notes(index), *tile_notes, *statistics.notes]
    return ModelParts(
        vae=parts["vae"],
        transformer=parts["transformer"],
        encoder=parts.get("encoder"),
        stain_probe=parts.get("stain_probe"),
        tile=tile,
        digest=parts_digest({k: d.files for k, d in unfilled.items()}, answers, statistics.unfiled),
        null_condition=None if null_condition is None else null_condition.float(),
        notes=(*notes, *(note for part in unfilled.values() for note in part.notes)),
        folder=folder,
        student=parts.get("student"),
        decoder=parts.get("decoder"),
    )


def load_encoder(
    source: Path | str, tile: TileSpec | None = None, dtype: torch.dtype = torch.float32
) -> TileEncoder:
    """Load H0-mini alone, strictly, as `load_model` does beside a model.

    Args:
        source: Folder or safetensors file, in timm's names.
        tile: Tiles it will see; None for 224 px.
        dtype: Floating type.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is corrupt, or its weights do not fit; one message names all differences.
    """
    part = read_encoder_part(Path(source), KeyMap(), tile or TileSpec())
    assign_weights({"encoder": part}, str(source), dtype, ())
    return part.network  # type: ignore[no-any-return]


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
        "tile": to_json(parts.tile),
    }
    for name, cls in PARTS.items():
        part = getattr(parts, name)
        if part is not None:
            index[name] = [_LIBRARIES[name], cls.__name__]
            null = parts.null_condition if name == "transformer" else None
            _save_part(part, folder / name, dtype, null)
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2).encode())


def parts_digest(
    files: Mapping[str, Sequence[Path]], answers: KeyMap, unfiled: Sequence[float] = ()
) -> str:
    """Return 16 hexadecimal digits of SHA-256 over all that decides what a model computes.

    Args:
        files: Weights and configurations of each part.
        answers: The user's key map.
        unfiled: Numbers that stand in none of these files.
    """
    whole = hashlib.sha256()
    for part in sorted(files):
        for file in files[part]:
            whole.update(f"{part}/{file.name}".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    whole.update(block)
    if answers != KeyMap():
        whole.update(config_json(answers).encode())
    if unfiled:
        whole.update(json.dumps(list(unfiled)).encode())
    return whole.hexdigest()[:16]


def _encoder_source(folder: Path, encoder: Path | str | None, is_ours: bool) -> Path | None:
    """Return where H0-mini lies in timm's names: given, or as `encoder/` of a released folder."""
    if encoder is None or encoder != "auto":
        return None if encoder is None else Path(encoder)
    beside = folder / "encoder"
    return beside if not is_ours and beside.is_dir() else None


def _check_fit(parts: dict[str, Any], tile: TileSpec, null_condition: Tensor | None) -> None:
    """Refuse parts that load each by itself and do not belong together."""
    transformer, vae = parts["transformer"].config, parts["vae"].config
    if vae["latent_channels"] != transformer["in_channels"]:
        raise ValueError(
            f"the autoencoder has {vae['latent_channels']} latent channels, the transformer "
            f"{transformer['in_channels']}; they are not of one model"
        )
    size_px = transformer["input_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    if size_px != tile.size_px:
        raise ValueError(
            f"the networks make tiles of {size_px} px, model_index.json states {tile.size_px}"
        )
    width = transformer["conditioning_dim"]
    encoder = parts.get("encoder")
    if encoder is not None and encoder.config["embed_dim"] != width:
        raise ValueError(
            f"the encoder gives {encoder.config['embed_dim']} features, the transformer takes "
            f"{width}; pass the encoder it was trained with"
        )
    if null_condition is not None and null_condition.shape != (width,):
        raise ValueError(
            f"null_condition is {list(null_condition.shape)}, expected [{width}], in the space of "
            "the features; a null in the space of the embedding is not supported"
        )


def _check_student(student: SiT, transformer: SiT, folder: Path) -> None:
    """Raise unless a student can stand in for the transformer: same latents, same conditions."""
    shared = ("input_size", "in_channels", "conditioning_dim")
    problems = [
        f"{k} {student.config[k]} for {transformer.config[k]}"
        for k in shared
        if student.config[k] != transformer.config[k]
    ]
    statistics = ("bn.running_mean", "bn.running_var")
    actual, expected = student.state_dict(), transformer.state_dict()
    problems += [f"another {k}" for k in statistics if not torch.equal(actual[k], expected[k])]
    settings = ("decoupled_depth", "taught_guidance")
    problems += [f"no {k}" for k in settings if student.config[k] is None]
    if problems:
        raise ValueError(
            f"{folder / 'student'} is no student of the transformer beside it: "
            f"{'; '.join(problems)}; distil it from this transformer"
        )


def _tile(index: Json, transformer: SiT) -> tuple[TileSpec, tuple[str, ...]]:
    if "tile" in index:
        return from_json(TileSpec, index["tile"], "model_index.json: tile"), ()
    tile = TileSpec(size_px=8 * transformer.config["input_size"])
    return tile, (f"model_index.json states no tiles; {tile.describe()} assumed",)


def _read_index(folder: Path) -> Json:
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


def _save_part(part: nn.Module, folder: Path, dtype: torch.dtype, null: Tensor | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {} if null is None else {"null_condition": null.contiguous()}
    tensors |= {
        k: (v.to(dtype) if v.is_floating_point() and not k.startswith("bn.") else v).contiguous()
        for k, v in part.state_dict().items()
    }
    temporary = folder / f".{WEIGHTS_NAME}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_NAME)
    # Any: ConfigMixin's JSON form is untyped.
    text = part.to_json_string()  # type: ignore[operator]
    write_atomically(folder / "config.json", text.encode())
