"""Training checkpoints of REPA-E and SiT, translated once to this package's model folder.

Functions on state dicts do the work; `convert` reads files, writes a folder and reads it back.
Checkpoints are pickles: they are opened as tensors and plain values only, and nothing in them is
executed. What cannot be translated exactly is refused.

Sources: Leng et al. (2025), REPA-E (train_repae.py, save_vae_weights.py); Ma et al. (2024), SiT
(models.py, transport/path.py); Rombach et al. (2022) for the autoencoder.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import ModelParts, load_model, save_model
from cytosyn_aug.model.compvis import (
    State,
    compvis_vae_state,
    count_matches,
    find_tensor,
    is_compvis_vae,
    renew_attention,
    some_names,
    vae_config_from_state,
)
from cytosyn_aug.model.parts import load_strictly
from cytosyn_aug.model.transformer import SiT

_XL_WIDTH, _XL_HEADS = 1152, 16
# What the training scripts call the one path and prediction this package computes. The words
# differ, so they also tell the two directions of time apart.
_TRAINED_AS: Mapping[str, Mapping[str, str]] = {
    "repae": {"path_type": "linear", "prediction": "v"},
    "sit": {"path_type": "Linear", "prediction": "velocity"},
}


def convert(
    source: Path,
    out: Path,
    *,
    tile: TileSpec,
    vae: Path | None = None,
    latent_stats: Path | None = None,
    weights: Literal["ema", "model"] = "ema",
    time: Literal["repae", "sit"] = "repae",
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint as a model folder, reopen it and compare every tensor.

    Args:
        source: A `.pt` of REPA-E's or SiT's training, conditioned on features.
        out: The folder; must not exist, or be empty. A failure leaves nothing there.
        tile: Tiles it was trained on; no checkpoint records their scale.
        vae: `.pt` or `.safetensors` of the autoencoder; wins over the checkpoint's own.
        latent_stats: REPA-E's `*-latents-stats.pt`; wins over `bn.*` of the weights.
        weights: The average over training steps, or the last step's.
        time: Whose direction of time: REPA-E's is this package's, SiT's is reversed exactly.
        num_heads: Attention heads; None for the width of SiT-XL only, which has 16.
        dtype: Stored floating type; float16 rounds, float32 keeps every bit.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no such checkpoint, or does not fit the others.
        OSError: What was reopened is not what was read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it")
    checkpoint = read_checkpoint(source)
    trained = _training_arguments(checkpoint, time)
    transformer = repae_transformer_state(checkpoint, weights)
    if time == "sit":
        transformer = reverse_time(transformer)
    if latent_stats is not None:
        transformer |= repae_statistics(read_checkpoint(latent_stats))
    config = transformer_config_from_state(transformer, num_heads, trained.get("encoder_depth"))
    autoencoder = _vae_state(vae, checkpoint)
    vae_config = vae_config_from_state(autoencoder)
    _check_fit(transformer, config, vae_config, tile)
    networks = {"vae": AutoencoderKL(**vae_config), "transformer": SiT(**config)}
    states = {"vae": autoencoder, "transformer": transformer}
    for part, network in networks.items():
        load_strictly(network, states[part], f"{part} of {source}")
    parts = ModelParts(**networks, encoder=None, stain_probe=None, tile=tile, digest="")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        draft = Path(work) / out.name
        save_model(draft, parts, dtype)
        _compare(draft, states, dtype)
        if out.exists():
            out.rmdir()  # empty, as checked above
        draft.rename(out)
    return out


def convert_tensors(source: Path, out: Path) -> Path:
    """Write the tensors of a pickled state dict as safetensors, names and values unchanged.

    For parts that are stored as `pytorch_model.bin` or `diffusion_pytorch_model.bin` only.

    Args:
        source: `.bin` or `.pt` that holds a flat dict of tensors.
        out: `.safetensors` to write; must not exist.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: `source` is missing.
        ValueError: `source` holds more than tensors, or `out` exists.
        OSError: What was reopened is not what was read.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another file or remove it")
    state = _without_wrappers(read_checkpoint(source), str(source))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        draft = Path(work) / out.name
        # Copies, since safetensors refuses tensors that share memory.
        save_file({k: v.clone().contiguous() for k, v in state.items()}, draft)
        stored = load_file(draft)
        different = [k for k, v in state.items() if not torch.equal(v, stored[k])]
        if different:
            raise OSError(f"{some_names(different)} changed on disk; nothing was kept, try again")
        draft.rename(out)
    return out


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Map a `.pt` or `.safetensors` file into memory without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds more than tensors, plain values and a command line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a checkpoint file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # REPA-E and SiT store their command line, a plain argparse.Namespace, with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch advises to load it anyway
        raise ValueError(
            f"{file} refers to {named[1] if named else 'more than data'}, which may execute code, "
            "and was not loaded; expected tensors, plain values and an argparse.Namespace. If you "
            "trust it, save only its state dicts again: torch.save({'ema': ..., 'vae': ...}, new)"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{file} is corrupt, or older than torch 1.6 ({str(error).splitlines()[0]}); copy it "
            "again, or save it again with a recent torch"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def repae_transformer_state(
    checkpoint: Mapping[str, Any], weights: Literal["ema", "model"] = "ema"
) -> State:
    """Return the transformer's tensors of a checkpoint; REPA-E's names are this package's.

    Args:
        checkpoint: Keys `ema` and `model`; others are not looked at.
        weights: Which of the two.

    Raises:
        ValueError: They are not there, or are conditioned on classes.
    """
    if weights not in ("ema", "model") or weights not in checkpoint:
        raise ValueError(
            f"the checkpoint holds {some_names(checkpoint)} but no {weights!r}; expected 'ema' or "
            "'model' of REPA-E's or SiT's training script"
        )
    state = _without_wrappers(checkpoint[weights], weights)
    if "y_embedder.embedding_table.weight" in state:
        shape = list(state["y_embedder.embedding_table.weight"].shape)
        raise ValueError(
            f"the checkpoint is conditioned on classes (y_embedder.embedding_table.weight {shape});"
            " this package conditions on features through y_embedder.linear. Convert a model that "
            "was trained on features"
        )
    return state


def reverse_time(state: Mapping[str, Tensor]) -> State:
    """Return the weights of an original SiT with its direction of time reversed, exactly.

    SiT has noise at t = 0 and v = x - eps; here noise is at t = 1 and v = eps - x, so that
    v_here(x, t) = -v_sit(x, 1 - t). The network sees t only as [cos(w t), sin(w t)], and

        cos(w (1 - t)) = cos(w) cos(w t) + sin(w) sin(w t)
        sin(w (1 - t)) = sin(w) cos(w t) - cos(w) sin(w t)

    is linear in it, so the first layer of the time embedder absorbs it; the last layer takes the
    sign. With a learned sigma the last layer has 2 C outputs at each position of a patch, channels
    innermost; SiT's forward uses the first C, and only those are kept.

    Args:
        state: Tensors of an original SiT.

    Source: Ma et al. (2024), SiT, models.py and transport/path.py.
    """
    of_cos, of_sin = find_tensor(state, "t_embedder.mlp.0.weight").double().chunk(2, dim=1)
    half = of_cos.shape[1]
    # Frequencies are rounded to float32, as the network computes them.
    w = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32)).double()
    cos, sin = w.cos(), w.sin()
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    out: State = {**state, "t_embedder.mlp.0.weight": turned.float()}
    channels, side = find_tensor(state, "x_embedder.proj.weight").shape[1:3]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        last = find_tensor(state, name)
        if len(last) not in (side * side * channels, 2 * side * side * channels):
            raise ValueError(
                f"{name} has {len(last)} outputs, expected {side * side} positions of {channels} "
                f"channels, or of {2 * channels} with a learned sigma; this is no SiT"
            )
        out[name] = -last.unflatten(0, (side * side, -1))[:, :channels].flatten(0, 1)
    return out


def transformer_config_from_state(
    state: Mapping[str, Tensor], num_heads: int | None = None, encoder_depth: int | None = None
) -> dict[str, Any]:
    """Return the arguments of `SiT` that the shapes of its tensors tell.

    Args:
        state: The transformer's tensors.
        num_heads: Not visible in any shape, and a wrong number loads without error but computes
            something else; so None is accepted for the width of SiT-XL only, which has 16.
        encoder_depth: Block whose tokens training aligns. None takes REPA-E's 8, or the last
            block of a shallower network.

    Raises:
        ValueError: A tensor is missing, or the number of heads is needed or does not divide.
    """
    width, channels, patch_size = find_tensor(state, "x_embedder.proj.weight").shape[:3]
    heads = _XL_HEADS if num_heads is None and width == _XL_WIDTH else num_heads
    if not heads or width % heads:
        raise ValueError(
            f"num_heads is {num_heads} for a width of {width}; heads cannot be read off shapes, "
            "pass the training's number, a divisor of the width (SiT-S 6, SiT-B 12, SiT-L 16)"
        )
    grid_size = math.isqrt(find_tensor(state, "pos_embed").shape[1])
    depth = count_matches(state, r"blocks\.\d+\.attn\.qkv\.weight")
    num_projectors = count_matches(state, r"projectors\.\d+\.4\.weight")
    targets = [find_tensor(state, f"projectors.{i}.4.weight") for i in range(num_projectors)]
    return {
        "input_size": patch_size * grid_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": find_tensor(state, "blocks.0.mlp.fc1.weight").shape[0] / width,
        "conditioning_dim": find_tensor(state, "y_embedder.linear.weight").shape[1],
        "encoder_depth": encoder_depth or min(8, depth),
        "z_dims": tuple(len(target) for target in targets),
        "projector_dim": targets[0].shape[1] if targets else 2048,
    }


def repae_statistics(stats: Mapping[str, Any]) -> State:
    """Return `bn.*` for latent statistics that whiten as (latents - bias) scale.

    Args:
        stats: `latents_bias` and `latents_scale`, C values each in any shape.
    """
    scale = find_tensor(stats, "latents_scale").flatten().double()
    return {
        "bn.running_mean": find_tensor(stats, "latents_bias").flatten().float(),
        "bn.running_var": scale.square().reciprocal().float(),
        "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }


def _training_arguments(checkpoint: Mapping[str, Any], time: str) -> dict[str, Any]:
    """Return the training's command line, empty if not stored; refuse another path or target."""
    if time not in _TRAINED_AS:
        raise ValueError(f"time is {time!r}, expected one of {list(_TRAINED_AS)}")
    stored = checkpoint.get("args")
    arguments = vars(stored) if isinstance(stored, argparse.Namespace) else dict(stored or {})
    for name, expected in _TRAINED_AS[time].items():
        if arguments.get(name, expected) != expected:
            raise ValueError(
                f"the checkpoint was trained with {name} {arguments[name]!r}, expected {expected!r}"
                f" for time {time!r}; only velocities of the linear path can be converted, of the "
                "original SiT with time 'sit', of REPA-E with 'repae'"
            )
    return arguments


def _vae_state(file: Path | None, checkpoint: Mapping[str, Any]) -> State:
    """Return the autoencoder under diffusers' names."""
    if file is None and "vae" not in checkpoint:
        raise ValueError(
            f"the checkpoint holds {some_names(checkpoint)} but no 'vae'; pass its file"
        )
    content = checkpoint["vae"] if file is None else read_checkpoint(file)
    if file is not None:
        content = content.get("state_dict", content)
    state = _without_wrappers(content, str(file or "vae"))
    return compvis_vae_state(state) if is_compvis_vae(state) else renew_attention(state)


def _without_wrappers(state: object, what: str) -> State:
    """Check that a value is a state dict, and take DDP's and torch.compile's prefixes off it."""
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        held = some_names(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{what} holds {held}, expected a state dict of tensors only")
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}
    if len(plain) != len(state):
        raise ValueError(f"{what} holds names both with and without `module.` or `_orig_mod.`")
    return plain


def _check_fit(
    transformer: State, config: dict[str, Any], vae: dict[str, Any], tile: TileSpec
) -> None:
    if "bn.running_mean" not in transformer:
        raise ValueError(
            "the checkpoint holds no latent statistics (bn.*); pass latent_stats, a file with "
            "latents_bias and latents_scale of each channel (0 and 0.18215 for SiT on SD's VAE)"
        )
    if vae["latent_channels"] != config["in_channels"]:
        raise ValueError(
            f"the autoencoder has {vae['latent_channels']} latent channels, expected the "
            f"transformer's {config['in_channels']}; pass the autoencoder of its training"
        )
    size_px = config["input_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    if tile.size_px != size_px:
        raise ValueError(
            f"tile is {tile.size_px} px, expected {size_px} for latents {config['input_size']} "
            "wide; pass the tiles of its training"
        )


def _compare(folder: Path, states: Mapping[str, State], dtype: torch.dtype) -> None:
    """Reopen a folder and require every tensor as read, rounded to `dtype` where stored so."""
    reopened, different = load_model(folder), []
    for part, state in states.items():
        stored = getattr(reopened, part).state_dict()
        different += [f"{part}/{name}" for name in state.keys() ^ stored.keys()]
        for name in state.keys() & stored.keys():
            is_rounded = state[name].is_floating_point() and not name.startswith("bn.")
            read = state[name].to(stored[name].dtype)
            if not torch.equal(read.to(dtype).to(read) if is_rounded else read, stored[name]):
                different.append(f"{part}/{name}")
    if different:
        raise OSError(f"{some_names(different)} changed on disk; nothing was kept, try again")
