"""What a run will cost, before it starts: parameters, bytes and FLOP, counted on the meta device.

Networks are built without memory, and a sample or two go through each, so that a plan for 683 M
parameters takes seconds. What a step does with each network is in `training.costs`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from cytosyn_aug.model.checkpoint import ModelParts
from training import recipes
from training.build import find_latents_recipe, find_recipe
from training.costs import count_flop, decode_flop, encode_flop, step_uses, tile_encoder
from training.evaluation.card_numbers import NUM_SOURCES, NUM_VARIATIONS
from training.evaluation.evaluate import Evaluation
from training.stage_inputs import NEEDED, TRAINED
from training.stages.vae import VaeRecipe, build_vae

_FLOAT = 4
_CORES_PER_GPU = 12
_NOTICE_S, _SAVING_S = 600, 540  # from SLURM's signal to its end, and torchrun's part of it
_H100_FLOPS, _SHARE = 989e12, 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run costs.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Samples per step.
        num_gpus: Processes that share it, one per GPU.
        num_passes: Micro-batches that each splits its part into.
        parameters: Trained parameters of each network.
        state_bytes: Weights, gradients, optimiser and moving average of a process, all float32.
        frozen_bytes: Weights of networks that are only run.
        activation_bytes: What a pass keeps for its backward pass.
        checkpoint_bytes: One of the two checkpoints that a run keeps.
        flop_per_sample: Of a training step.
    """

    num_steps: int
    batch_size: int
    num_gpus: int
    num_passes: int
    parameters: dict[str, int]
    state_bytes: int
    frozen_bytes: int
    activation_bytes: float
    checkpoint_bytes: int
    flop_per_sample: float

    @property
    def gpu_bytes(self) -> float:
        """Of state, frozen weights and activations together; leave a tenth of a GPU to the rest."""
        return self.state_bytes + self.frozen_bytes + self.activation_bytes

    def text(self) -> str:
        """Return the plan as lines for a terminal."""
        total = self.flop_per_sample * self.batch_size * self.num_steps
        hours = total / (_H100_FLOPS * _SHARE) / 3600
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        return (
            f"steps        {self.num_steps:,} of {self.batch_size} samples\n"
            f"trained      {sizes}\n"
            f"batch        {self.num_gpus} GPUs x {self.num_passes} passes of "
            f"{self.batch_size // (self.num_gpus * self.num_passes)}\n"
            f"memory       {self.gpu_bytes / 1e9:.2f} GB per GPU: {self.state_bytes / 1e9:.2f} of "
            f"state, {self.frozen_bytes / 1e9:.2f} of frozen weights, "
            f"{self.activation_bytes / 1e9:.2f} of activations;\n"
            "             workspace of kernels and fragmentation come on top\n"
            f"checkpoints  2 of {self.checkpoint_bytes / 1e9:.2f} GB\n"
            f"compute      {self.flop_per_sample / 1e9:.1f} GFLOP a sample, {total:.2g} FLOP in "
            f"all: {hours:,.1f} H100-hours at {_SHARE:.0%} of {_H100_FLOPS / 1e12:.0f} TFLOP/s"
        )


def plan(name: str, stage: str) -> Plan:
    """Return what the run of a recipe costs.

    Args:
        name: Recipe, as in `training.recipes` before the underscore.
        stage: One of `training.stage_inputs.TRAINED`.

    Raises:
        ValueError: There is no such recipe, or none of a network it builds on.
    """
    recipe = find_recipe(name, stage)
    with torch.device("meta"):
        uses = step_uses(recipe, name)
    trained = {use.name: _count(use.network) for use in uses if use.is_trained}
    total = sum(trained.values())
    # Muon keeps one number a weight, AdamW two; counted as AdamW's.
    frozen_weights = sum(_count(use.network) for use in uses if not use.is_trained)
    num_gpus, num_passes = recipes.NUM_GPUS.get(name, 1), recipe.loop.num_micro_batches
    num_rows = recipe.batch_size // (num_gpus * num_passes)
    return Plan(
        num_steps=recipe.loop.num_steps,
        batch_size=recipe.batch_size,
        num_gpus=num_gpus,
        num_passes=num_passes,
        parameters=trained,
        state_bytes=5 * _FLOAT * total,
        frozen_bytes=_FLOAT * frozen_weights,
        activation_bytes=sum(use.kept.fixed + num_rows * use.kept.per_sample for use in uses),
        checkpoint_bytes=4 * _FLOAT * total,
        flop_per_sample=sum(use.flop for use in uses),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsPlan:
    """What a latents stage costs.

    Attributes:
        num_views: Views that are encoded.
        num_bytes: Of all shards.
        flop_per_view: Of both encoders.
    """

    num_views: int
    num_bytes: int
    flop_per_view: float

    def text(self) -> str:
        """Return the plan as lines for a terminal."""
        total = self.flop_per_view * self.num_views
        hours = total / (_H100_FLOPS * _SHARE) / 3600
        return (
            f"views        {self.num_views:,} of {self.num_bytes / self.num_views:,.0f} bytes\n"
            f"disk         {self.num_bytes / 1e9:,.2f} GB\n"
            f"compute      {self.flop_per_view / 1e9:.1f} GFLOP per view: {hours:,.1f} H100-hours "
            f"at {_SHARE:.0%} of {_H100_FLOPS / 1e12:.0f} TFLOP/s"
        )


def plan_latents(name: str) -> LatentsPlan:
    """Return what the latents stage of a recipe costs.

    Raises:
        ValueError: There is no such recipe, or none of a network it needs.
    """
    recipe, vae_recipe = find_latents_recipe(name), find_recipe(name, "vae")
    assert isinstance(vae_recipe, VaeRecipe)
    with torch.device("meta"):
        vae, (encoder, width) = build_vae(vae_recipe), tile_encoder(name)
        tile = torch.zeros(1, 3, 224, 224)
        flop = encode_flop(vae, tile) + count_flop(encoder.vit, tile)
    num_numbers = 2 * 4 * 28 * 28 + width * (1 + 196 * recipe.has_patches)
    return LatentsPlan(
        num_views=recipe.num_views,
        num_bytes=2 * num_numbers * recipe.num_views,
        flop_per_view=flop,
    )


def launch_text(name: str, stage: str) -> str:
    """Return the command of a stage that several GPUs share, and that of all stages under SLURM.

    Empty for a recipe of one process. Words in capitals are for the user to fill in.
    """
    num_gpus = recipes.NUM_GPUS.get(name, 1)
    if num_gpus == 1:
        return ""
    given = " ".join(f"--{need} {need.upper()}" for need in NEEDED.get(stage, ()))
    compiled = " --compile" if stage in TRAINED else ""
    return (
        f"\nlaunch       TORCH_ELASTIC_SHUTDOWN_TIMEOUT={_SAVING_S} torchrun --standalone "
        f"--nproc-per-node {num_gpus} --max-restarts 3 -m training {stage} "
        f"--recipe {name} --data TILES --out OUT {given}{compiled}"
        f"\nall stages   sbatch --nodes 1 --gpus-per-node {num_gpus} "
        f"--cpus-per-task {_CORES_PER_GPU * num_gpus} --time 2-0 --requeue "
        f"--signal B:TERM@{_NOTICE_S} training/full.sh SLIDES GDC_MANIFEST SD_VAE H0_MINI OUT"
    )


def plan_evaluation(parts: ModelParts, config: Evaluation, num_held_out: int) -> str:
    """Return what an evaluation makes and costs, as lines for a terminal; judging is not in it.

    Args:
        parts: The model's.
        config: What is asked for.
        num_held_out: Tiles of held-out slides that there are.
    """
    num_real = min(num_held_out, config.num_tiles or num_held_out) * (2 if config.extractors else 1)
    num_varied = NUM_SOURCES * NUM_VARIATIONS
    passes = config.num_forwards * (2 if config.guidance_scale != 1 else 1)
    costs = tile_flop(parts)
    drawn = passes * costs["forward"] + costs["decode"]
    real = costs["encode"] + costs["decode"] + costs.get("features", 0.0)
    total = num_real * real + (num_real + num_varied) * drawn
    return (
        f"real tiles   {num_real:,}, each with a round trip\n"
        f"generated    {num_real + num_varied:,} in {passes} passes of the transformer\n"
        f"compute      {total / 1e12:,.1f} TFLOP, without the networks that judge"
    )


def tile_flop(parts: ModelParts) -> dict[str, float]:
    """Return what one tile costs in each part of a model, FLOP, 2 a multiply-add.

    Returns:
        `encode`, `decode`, `forward` of the transformer and, where there are such parts,
        `features` of the encoder and `small_decode`.
    """
    size, config = parts.tile.size_px, parts.transformer.config
    vae, transformer = (copy.deepcopy(p).to("meta") for p in (parts.vae, parts.transformer))
    with torch.device("meta"):  # counters miss attention elsewhere
        pixels = torch.zeros(1, 3, size, size)
        latents = torch.zeros(1, config["in_channels"], size // 8, size // 8)
        time, condition = torch.zeros(1), torch.zeros(1, config["conditioning_dim"])
    flop = {
        "encode": encode_flop(vae, pixels),
        "decode": decode_flop(vae, pixels),
        "forward": count_flop(transformer, latents, time, condition),
    }
    if parts.encoder is not None:
        flop["features"] = count_flop(copy.deepcopy(parts.encoder.vit).to("meta"), pixels)
    if parts.decoder is not None:
        flop["small_decode"] = count_flop(copy.deepcopy(parts.decoder).to("meta"), latents)
    return flop


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
