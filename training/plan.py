"""What a run will cost, before it starts: parameters, bytes and FLOP, counted on the meta device.

Networks are built without memory, and one sample goes through each, so that a plan for 683 M
parameters takes seconds. What a step does with each network is written down here once a stage.
Activations are not in it: they depend on the batch, and num_micro_batches bounds them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cytosyn_aug.checkpoint import ModelParts
from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.transformer import SiT
from training.card import NUM_SOURCES, NUM_VARIATIONS
from training.decoder import DecoderRecipe, build_decoder
from training.discriminator import PatchDiscriminator
from training.distil import DistilRecipe, build_student
from training.encoder import EncoderRecipe, build_encoder
from training.evaluate import Evaluation
from training.perception import PerceptualNetwork
from training.repae import RepaeRecipe
from training.sit import SitRecipe, build_transformer
from training.stages import Recipe, find_latents_recipe, find_recipe
from training.vae import VaeRecipe, build_vae

# Passes of a step in units of a forward pass: a backward pass costs one for the inputs' gradient
# and one for the weights'.
_TRAINED, _PASSED_ON, _FROZEN = 3, 2, 1
_FLOAT = 4
_H100_FLOPS, _SHARE = 989e12, 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run costs.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Samples a step.
        parameters: Trained parameters of each network.
        state_bytes: Weights, gradients, optimiser and moving average of a process, all float32.
        frozen_bytes: Weights of networks that are only run.
        checkpoint_bytes: One of the two checkpoints that a run keeps.
        flop_per_sample: Of a training step.
    """

    num_steps: int
    batch_size: int
    parameters: dict[str, int]
    state_bytes: int
    frozen_bytes: int
    checkpoint_bytes: int
    flop_per_sample: float

    def text(self) -> str:
        """Return the plan as lines for a terminal."""
        total = self.flop_per_sample * self.batch_size * self.num_steps
        hours = total / (_H100_FLOPS * _SHARE) / 3600
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        return (
            f"steps        {self.num_steps:,} of {self.batch_size} samples\n"
            f"trained      {sizes}\n"
            f"memory       {self.state_bytes / 1e9:.2f} GB of state and "
            f"{self.frozen_bytes / 1e9:.2f} GB of frozen weights a process, plus activations\n"
            f"checkpoints  2 of {self.checkpoint_bytes / 1e9:.2f} GB\n"
            f"compute      {self.flop_per_sample / 1e9:.1f} GFLOP a sample, {total:.2g} FLOP in "
            f"all: {hours:,.1f} H100-hours at {_SHARE:.0%} of {_H100_FLOPS / 1e12:.0f} TFLOP/s"
        )


def plan(name: str, stage: str) -> Plan:
    """Return what the run of a recipe costs.

    Args:
        name: Recipe, as in `training.recipes` before the underscore.
        stage: One of `training.stages.TRAINED`.

    Raises:
        ValueError: There is no such recipe, or none of a network it builds on.
    """
    recipe = find_recipe(name, stage)
    with torch.device("meta"):
        uses = _uses(recipe, name)
    trained = {use.name: _count(use.network) for use in uses if use.is_trained}
    total = sum(trained.values())
    # Muon keeps one number a weight, AdamW two; counted as AdamW's.
    frozen = sum(_count(use.network) for use in uses if not use.is_trained)
    return Plan(
        num_steps=recipe.loop.num_steps,
        batch_size=recipe.batch_size,
        parameters=trained,
        state_bytes=5 * _FLOAT * total,
        frozen_bytes=_FLOAT * frozen,
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
            f"compute      {self.flop_per_view / 1e9:.1f} GFLOP a view: {hours:,.1f} H100-hours at "
            f"{_SHARE:.0%} of {_H100_FLOPS / 1e12:.0f} TFLOP/s"
        )


def plan_latents(name: str) -> LatentsPlan:
    """Return what the latents stage of a recipe costs.

    Raises:
        ValueError: There is no such recipe, or none of a network it needs.
    """
    recipe, vae_recipe = find_latents_recipe(name), find_recipe(name, "vae")
    assert isinstance(vae_recipe, VaeRecipe)
    with torch.device("meta"):
        vae, (encoder, width) = build_vae(vae_recipe), _tile_encoder(name)
        tile = torch.zeros(1, 3, 224, 224)
        flop = _encode(vae, tile) + count_flop(encoder.vit, tile)
    num_numbers = 2 * 4 * 28 * 28 + width * (1 + 196 * recipe.has_patches)
    return LatentsPlan(
        num_views=recipe.num_views,
        num_bytes=2 * num_numbers * recipe.num_views,
        flop_per_view=flop,
    )


@dataclass(frozen=True, slots=True)
class _Use:
    """A network of a step, whether it is trained, and the FLOP a sample spends in it."""

    name: str
    network: nn.Module
    is_trained: bool
    flop: float


def _uses(recipe: Recipe, name: str) -> list[_Use]:
    if isinstance(recipe, EncoderRecipe):
        encoder = build_encoder(recipe)
        tile = torch.zeros(1, 3, 224, 224)
        return [
            _Use("encoder", encoder, True, _TRAINED * count_flop(encoder.vit, tile)),
        ]
    if isinstance(recipe, VaeRecipe):
        crop = torch.zeros(1, 3, recipe.crop_px, recipe.crop_px)
        vae, vgg = build_vae(recipe), _vgg()
        perceived = _PASSED_ON + _FROZEN
        return [
            _Use("vae", vae, True, _TRAINED * (_encode(vae, crop) + _decode(vae, crop))),
            _Use("vgg", vgg, False, perceived * recipe.perceptual_share * count_flop(vgg, crop)),
        ]
    vae_recipe = find_recipe(name, "vae")
    assert isinstance(vae_recipe, VaeRecipe)
    vae = build_vae(vae_recipe)
    if isinstance(recipe, DecoderRecipe):
        crop = torch.zeros(1, 3, recipe.crop_px, recipe.crop_px)
        small, vgg = build_decoder(recipe, 4), _vgg()
        latents = torch.zeros(1, 4, recipe.crop_px // 8, recipe.crop_px // 8)
        return [
            _Use("decoder", small, True, _TRAINED * count_flop(small, latents)),
            _Use("vae", vae, False, _encode(vae, crop) + _decode(vae, crop)),
            _Use("vgg", vgg, False, (_PASSED_ON + _FROZEN) * count_flop(vgg, crop)),
        ]
    encoder, width = _tile_encoder(name)
    sit_recipe = find_recipe(name, "sit")
    assert isinstance(sit_recipe, SitRecipe)
    transformer = build_transformer(sit_recipe, width)
    one = (torch.zeros(1, 4, 28, 28), torch.zeros(1), torch.zeros(1, width))
    forward = count_flop(transformer, *one)
    if isinstance(recipe, SitRecipe):  # its views are encoded once, before the run
        return [_Use("transformer", transformer, True, _TRAINED * forward)]
    if isinstance(recipe, DistilRecipe):
        student = build_student(recipe, transformer)
        # Half of the samples: teacher with and without condition, student trained. Half: the
        # same teacher, and a derivative along the flow, which costs a pass more than it.
        return [
            _Use("student", student, True, (_TRAINED + 1) * forward),
            _Use("teacher", transformer, False, 2 * forward),
        ]
    return _uses_end_to_end(recipe, vae, transformer, encoder, forward)


def _uses_end_to_end(
    recipe: RepaeRecipe, vae: nn.Module, transformer: SiT, encoder: TileEncoder, flow: float
) -> list[_Use]:
    tile = torch.zeros(1, 3, 224, 224)
    window = torch.zeros(1, 3, recipe.decode_px, recipe.decode_px)
    judge, vgg = PatchDiscriminator(recipe.judge_width), _vgg()
    aligned = transformer.encoder_depth / len(transformer.blocks)
    return [
        _Use("vae", vae, True, _TRAINED * (_encode(vae, tile) + _decode(vae, window))),
        _Use("transformer", transformer, True, (_TRAINED + _PASSED_ON * aligned) * flow),
        _Use("judge", judge, True, (2 * _TRAINED + _PASSED_ON) * count_flop(judge, window)),
        _Use("encoder", encoder, False, _FROZEN * count_flop(encoder.vit, tile)),
        _Use("vgg", vgg, False, (_PASSED_ON + _FROZEN) * count_flop(vgg, window)),
    ]


def _tile_encoder(name: str) -> tuple[TileEncoder, int]:
    """Return the encoder of a recipe's family; H0-mini where none is trained."""
    try:
        recipe = find_recipe(name, "encoder")
    except ValueError:
        return TileEncoder(), 768
    assert isinstance(recipe, EncoderRecipe)
    return build_encoder(recipe), recipe.embed_dim


def _vgg() -> PerceptualNetwork:
    with torch.device("cpu"):  # its weights come from a file
        network = PerceptualNetwork("vgg")
    return network.to("meta")


def _encode(vae: nn.Module, pixels: Tensor) -> float:
    return count_flop(vae.encoder, pixels)  # type: ignore[arg-type]


def _decode(vae: nn.Module, pixels: Tensor) -> float:
    side = pixels.shape[-1] // 8
    latents = torch.zeros(1, 4, side, side, device=pixels.device)
    return count_flop(vae.decoder, latents)  # type: ignore[arg-type]


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
    found = {
        "encode": _encode(vae, pixels),
        "decode": _decode(vae, pixels),
        "forward": count_flop(transformer, latents, time, condition),
    }
    if parts.encoder is not None:
        found["features"] = count_flop(copy.deepcopy(parts.encoder.vit).to("meta"), pixels)
    if parts.decoder is not None:
        found["small_decode"] = count_flop(copy.deepcopy(parts.decoder).to("meta"), latents)
    return found


@torch.no_grad()
def count_flop(network: nn.Module, *inputs: Tensor) -> float:
    """Return the FLOP of a forward pass of one sample, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return float(counter.get_total_flops())


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
