"""Parts of a model before their weights are read: networks that take no memory, and tensors.

Reads what files say and compares it with what the classes expect; one report covers all parts. Only
then do tensors become weights. It refuses to know which parts make a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from cytosyn_aug.config import Json, TileSpec
from cytosyn_aug.io.json_files import read_json
from cytosyn_aug.model.compvis import (
    compvis_vae_state,
    is_compvis_vae,
    renew_attention,
    vae_config_from_state,
)
from cytosyn_aug.model.decoder import SmallDecoder
from cytosyn_aug.model.differences import compare, report
from cytosyn_aug.model.encoder import StainProbe, TileEncoder, read_encoder
from cytosyn_aug.model.released import (
    LatentStatistics,
    known_settings,
    latent_statistics,
    transformer_settings,
)
from cytosyn_aug.model.tensors import KeyMap, assign, read_tensors, weight_files
from cytosyn_aug.model.transformer import SiT

PARTS: dict[str, type] = {
    "vae": AutoencoderKL,
    "transformer": SiT,
    "encoder": TileEncoder,
    "stain_probe": StainProbe,
    "student": SiT,
    "decoder": SmallDecoder,
}


class UnfilledPart(NamedTuple):
    """A part before its weights are read: network without memory, tensors, remarks, files."""

    network: Any  # Any: the class depends on the part
    holder: nn.Module  # the network, or the module in it whose names the tensors bear
    config: Json
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def read_part(name: str, folder: Path, answers: KeyMap, is_ours: bool) -> UnfilledPart:
    """Return a part of a model folder.

    Args:
        name: Key of `PARTS`.
        folder: The part's own folder.
        answers: The user's key map.
        is_ours: Whether this package wrote it, which leaves nothing to be noted.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is corrupt, or its configuration is not of this class.
    """
    cls, file = PARTS[name], folder / "config.json"
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
        tensors = renew_attention(tensors) if cls is AutoencoderKL else tensors
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
    return UnfilledPart(network, network, config, tensors, notes, (file, *files))


def read_encoder_part(source: Path, answers: KeyMap, tile: TileSpec) -> UnfilledPart:
    """Return H0-mini from timm's names, with or without a config beside them."""
    if source.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(
            f"{source} is a pickle, which is not loaded here; translate it once: "
            f"`cytosyn-aug convert {source} {source.with_suffix('.safetensors')}`"
        )
    is_file = source.suffix == ".safetensors"
    files = [source] if is_file else weight_files(source, "model.safetensors")
    config_file = files[0].parent / "config.json"
    has_config = config_file.is_file()
    config = read_json(config_file, "copy it again") if has_config else {}
    tensors = answers.rename("encoder", read_tensors(files))
    network, tensors, notes = read_encoder(config, tensors, tile.size_px)
    read = (*files, config_file) if has_config else tuple(files)
    return UnfilledPart(network, network.vit, config, tensors, notes, read)


class _Statistics(NamedTuple):
    """How latent statistics were found: problems, remarks, numbers that no part's files hold."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unfiled: tuple[float, ...] = ()


def fill_statistics(unfilled: dict[str, UnfilledPart], index: Json, answers: KeyMap) -> _Statistics:
    """Put the latent statistics of a folder into the transformer's tensors."""
    transformer = unfilled["transformer"]
    tensors, channels = transformer.tensors, transformer.network.config["in_channels"]
    try:
        statistics = latent_statistics(
            tensors, transformer.config, unfilled["vae"].config, index, answers, channels
        )
    except ValueError as error:
        # Under a wrapper's prefix they are there; then the names are what to report.
        is_prefixed = any(name.endswith(".bn.running_mean") for name in tensors)
        problems = () if is_prefixed else (str(error),)
        statistics = LatentStatistics(torch.zeros(channels), torch.ones(channels), "bn.")
    else:
        problems = ()
    tensors["bn.running_mean"] = statistics.mean.expand(channels).contiguous()
    tensors["bn.running_var"] = statistics.variance.expand(channels).contiguous()
    tensors.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    if statistics.source.startswith("bn."):
        return _Statistics(problems)
    in_index = statistics.source.startswith("model_index")
    unfiled = (*statistics.mean.tolist(), *statistics.variance.tolist()) if in_index else ()
    return _Statistics(problems, (f"latent statistics come from {statistics.source}",), unfiled)


def assign_weights(
    unfilled: dict[str, UnfilledPart], source: str, dtype: torch.dtype, problems: Sequence[str]
) -> None:
    """Put the tensors of all parts into their networks, or name all that does not fit.

    Args:
        unfilled: By name of the part.
        source: Where they come from, for the message.
        dtype: Floating type wanted; latent statistics stay float32.
        problems: Sentences that belong to the same report.

    Raises:
        ValueError: Any difference, or any problem.
    """
    differences = [
        compare(type(d.network).__name__, d.holder, d.tensors, part=k) for k, d in unfilled.items()
    ]
    if any(differences) or problems:
        raise ValueError(report(source, [d for d in differences if d], problems))
    for part in unfilled.values():
        assign(part.holder, part.tensors, dtype)
        part.network.eval().requires_grad_(False)


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
