"""Weights of a stage, read from its run folder or from a model folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from cytosyn_aug.model.checkpoint import load_model
from cytosyn_aug.model.parts import load_strictly
from training.engine.checkpoints import is_run, read_newest

_AUTOENCODER = "AutoencoderKL"

# Names of the networks inside an end-to-end run.
_OF_REPAE = {"vae": "vae.", "sit": "transformer."}


def stage_weights(source: Path, stage: str) -> dict[str, Tensor]:
    """Return the averaged weights of a run, or the same weights out of a model folder.

    A model folder holds no heads of the encoder stage but the stain probe's.
    An autoencoder may also be a folder of diffusers' `AutoencoderKL`, as SD-VAE's is. Of a run
    whose newest checkpoint was cut short, the one before is taken, and a run that is not at its end
    is taken as it is; both are said on stderr.

    Args:
        source: Run folder of the same stage, or a model folder.
        stage: "vae", "encoder", "sit", "repae", "distil" or "decoder". Autoencoder and transformer
            may also come from an end-to-end run.

    Raises:
        FileNotFoundError: The folder is neither.
        ValueError: No checkpoint of the run can be read.
    """
    if is_run(source):
        state = read_newest(source)
        _say_if_unfinished(source, state)
        weights: dict[str, Tensor] = state["average"]
        prefix = _OF_REPAE.get(stage, "")
        inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        return inside or weights
    if stage == "vae" and (bare := bare_autoencoder(source)) is not None:
        return bare.state_dict()
    parts = load_model(source)
    named = {"": parts.transformer if stage == "sit" else parts.vae}
    if stage == "encoder":
        named = {"encoder.": parts.encoder, "stain_probe.": parts.stain_probe}
    elif stage == "repae":
        named = {"vae.": parts.vae, "transformer.": parts.transformer}
    elif stage == "decoder":
        named = {"": parts.decoder}
    elif stage == "distil":
        named = {"student.": parts.student}
    return {p + k: v for p, part in named.items() for k, v in _state(part).items()}


def bare_autoencoder(source: Path) -> AutoencoderKL | None:
    """Return the autoencoder of a diffusers folder that holds nothing else, or None."""
    config = source / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("_class_name") != _AUTOENCODER:
        return None
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(
        source, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    return vae


def _say_if_unfinished(source: Path, state: dict[str, Any]) -> None:
    num_steps = json.loads(state["recipe"]).get("loop", {}).get("num_steps", state["step"])
    if state["step"] < num_steps:
        print(
            f"{source} is at step {state['step']:,} of {num_steps:,}; its weights are taken as "
            "they are. Run its stage again to finish it",
            file=sys.stderr,
        )


def _state(part: nn.Module | None) -> dict[str, Tensor]:
    return {} if part is None else part.state_dict()


def mean_weights(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several runs' weights, which lies between what they were trained for.

    Meaningful for runs that started from the same weights.

    Source: Wortsman et al. (2022), model soups.
    """
    if len(states) == 1:  # to the bit: a mean would turn -0 into 0, and so change the digest
        return states[0]
    return {k: torch.stack([s[k].float() for s in states]).mean(0) for k in states[0]}


def load_stage(source: Path, stage: str, network: nn.Module, prefix: str = "") -> nn.Module:
    """Load `stage_weights` into a network, strictly.

    Args:
        source: Run folder of the same stage, or a model folder.
        stage: "vae", "encoder", "sit", "repae", "distil" or "decoder".
        network: Receives the weights.
        prefix: Only weights whose name starts so are loaded, without it.

    Returns:
        `network` in evaluation mode, without gradients.
    """
    weights = stage_weights(source, stage)
    chosen = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    load_strictly(network, chosen, str(source))
    return network.eval().requires_grad_(False)
