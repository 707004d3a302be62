"""What a step of training costs: FLOP and kept bytes of each network, counted without memory.

First the step of each stage, as passes through its networks; then what one pass costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from cytosyn_aug.model.encoder import TileEncoder
from cytosyn_aug.model.transformer import SiT
from training.build import Recipe, find_recipe
from training.stages.decoder import DecoderRecipe, build_decoder
from training.stages.discriminator import PatchDiscriminator
from training.stages.distil import DistilRecipe, build_student
from training.stages.encoder import EncoderRecipe, build_encoder
from training.stages.mean_flow import RULES
from training.stages.perception import PerceptualNetwork, texture_distance
from training.stages.repae import RepaeRecipe, frozen
from training.stages.sit import SitRecipe, build_transformer
from training.stages.vae import VaeRecipe, build_vae

# Passes of a step in units of a forward pass: a backward pass costs one for the inputs' gradient
# and one for the weights'.
_TRAINED, _PASSED_ON, _FROZEN = 3, 2, 1


class Kept(NamedTuple):
    """Bytes kept by a pass: whatever the batch, and for each of its samples."""

    fixed: float
    per_sample: float

    def scaled(self, share: float) -> Kept:
        """Return what is kept if only a share of the samples is passed, or each several times."""
        return Kept(self.fixed, share * self.per_sample)


_NOTHING = Kept(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Use:
    """A network of a step, whether it is trained, the FLOP of a sample, and what is kept."""

    name: str
    network: nn.Module
    is_trained: bool
    flop: float
    kept: Kept = _NOTHING


def step_uses(recipe: Recipe, name: str) -> list[Use]:
    """Return the networks of a step of a recipe, whose family gives those that it builds on."""
    if isinstance(recipe, EncoderRecipe):
        encoder = build_encoder(recipe)
        tile = torch.zeros(1, 3, 224, 224)
        return [
            Use(
                "encoder",
                encoder,
                True,
                _TRAINED * count_flop(encoder.vit, tile),
                kept_bytes(encoder.vit, nn.Module.__call__, tile),
            ),
        ]
    if isinstance(recipe, VaeRecipe):
        crop = torch.zeros(1, 3, recipe.crop_px, recipe.crop_px)
        vae, vgg = build_vae(recipe), _vgg()
        return [
            _use_autoencoder(vae, crop, crop),
            _use_vgg(vgg, crop, recipe.perceptual_stages, recipe.perceptual_share),
        ]
    vae_recipe = find_recipe(name, "vae")
    assert isinstance(vae_recipe, VaeRecipe)
    vae = build_vae(vae_recipe)
    if isinstance(recipe, DecoderRecipe):
        crop = torch.zeros(1, 3, recipe.crop_px, recipe.crop_px)
        small, vgg = build_decoder(recipe, 4), _vgg()
        latents = torch.zeros(1, 4, recipe.crop_px // 8, recipe.crop_px // 8)
        return [
            Use(
                "decoder",
                small,
                True,
                _TRAINED * count_flop(small, latents),
                kept_bytes(small, nn.Module.__call__, latents),
            ),
            Use("vae", vae, False, encode_flop(vae, crop) + decode_flop(vae, crop)),
            _use_vgg(vgg, crop, recipe.perceptual_stages),
        ]
    encoder, width = tile_encoder(name)
    sit_recipe = find_recipe(name, "sit")
    assert isinstance(sit_recipe, SitRecipe)
    transformer = build_transformer(sit_recipe, width)
    one = (torch.zeros(1, 4, 28, 28), torch.zeros(1), torch.zeros(1, width))
    forward = count_flop(transformer, *one)
    if isinstance(recipe, SitRecipe):  # its views are encoded once, before the run
        kept = kept_bytes(transformer, _flow, *one)
        return [Use("transformer", transformer, True, _TRAINED * forward, kept)]
    if isinstance(recipe, DistilRecipe):
        student = build_student(recipe, transformer)
        # Half of the samples: teacher with and without condition, student trained. Half: the
        # same teacher, and a derivative along the flow, which costs a pass more than it.
        kept = kept_bytes(student, partial(_teach, recipe), *one).scaled(1 / 2)
        return [
            Use("student", student, True, (_TRAINED + 1) * forward, kept),
            Use("teacher", transformer, False, 2 * forward),
        ]
    return _uses_end_to_end(recipe, vae, transformer, encoder, forward)


def _uses_end_to_end(
    recipe: RepaeRecipe, vae: nn.Module, transformer: SiT, encoder: TileEncoder, flow: float
) -> list[Use]:
    tile = torch.zeros(1, 3, 224, 224)
    window = torch.zeros(1, 3, recipe.decode_px, recipe.decode_px)
    judge, vgg = PatchDiscriminator(recipe.judge_width), _vgg()
    aligned = transformer.encoder_depth / len(transformer.blocks)
    one = (torch.zeros(1, 4, 28, 28), torch.zeros(1), torch.zeros(1, encoder.config["embed_dim"]))
    return [
        _use_autoencoder(vae, tile, window),
        Use(
            "transformer",
            transformer,
            True,
            (_TRAINED + _PASSED_ON * aligned) * flow,
            kept_bytes(transformer, _align_and_flow, *one),
        ),
        Use(
            "judge",
            judge,
            True,
            (2 * _TRAINED + _PASSED_ON) * count_flop(judge, window),
            kept_bytes(judge, _judge, window),
        ),
        Use("encoder", encoder, False, _FROZEN * count_flop(encoder.vit, tile)),
        _use_vgg(vgg, window, recipe.perceptual_stages),
    ]


def _use_autoencoder(vae: nn.Module, pixels: Tensor, window: Tensor) -> Use:
    """Return an autoencoder that is trained: it encodes pixels and decodes a window of them."""
    flop = _TRAINED * (encode_flop(vae, pixels) + decode_flop(vae, window))
    return Use("vae", vae, True, flop, kept_bytes(vae, _round_trip, pixels, _latents(window)))


def _use_vgg(vgg: nn.Module, pixels: Tensor, num_stages: int, share: float = 1.0) -> Use:
    """Return VGG that compares a share of what was made with what it should be."""
    flop = (_PASSED_ON + _FROZEN) * share * count_flop(vgg, pixels)
    kept = kept_bytes(vgg, partial(_perceive, num_stages), pixels)
    return Use("vgg", vgg, False, flop, kept.scaled(share))


def _round_trip(vae: nn.Module, pixels: Tensor, latents: Tensor) -> object:
    posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
    return posterior.mean, posterior.std, vae.decode(latents).sample  # type: ignore[operator]


def _perceive(num_stages: int, vgg: PerceptualNetwork, made: Tensor) -> object:
    maps, aims = vgg(made, num_stages), vgg(made.detach(), num_stages)
    return vgg.map_distance(maps, aims), texture_distance(maps, aims)


def _judge(judge: nn.Module, window: Tensor) -> object:
    with frozen(judge):
        verdict = judge(window)
    return verdict, judge(window.detach()), judge(window.detach())


def _flow(transformer: SiT, x: Tensor, t: Tensor, condition: Tensor) -> object:
    v, tokens = transformer.forward_tokens(x, t, condition)
    return v, transformer.projectors[0](tokens)


def _align_and_flow(transformer: SiT, x: Tensor, t: Tensor, condition: Tensor) -> object:
    with frozen(transformer):
        tokens = transformer.aligned_tokens(x, t, condition)
        projected = transformer.projectors[0](tokens)
    return projected, _flow(transformer, x, t, condition)


def _teach(recipe: DistilRecipe, student: SiT, x: Tensor, t: Tensor, condition: Tensor) -> object:
    """Pass samples through both halves of a step: of a batch, each sees one."""

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return student(x, t, condition, r, torch.ones_like(t))

    def velocity(x: Tensor, t: Tensor) -> Tensor:  # the teacher's, which keeps nothing
        return torch.zeros_like(x)

    x, t = x.detach(), t.detach()
    return u(x, t, t), RULES[recipe.target](u, velocity, x, t, t)


def tile_encoder(name: str) -> tuple[TileEncoder, int]:
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


def encode_flop(vae: nn.Module, pixels: Tensor) -> float:
    """Return what encoding one tile [1, 3, H, W] costs."""
    return count_flop(vae.encoder, pixels)  # type: ignore[arg-type]


def decode_flop(vae: nn.Module, pixels: Tensor) -> float:
    """Return what decoding to one tile [1, 3, H, W] costs."""
    return count_flop(vae.decoder, _latents(pixels))  # type: ignore[arg-type]


def _latents(pixels: Tensor) -> Tensor:
    side = pixels.shape[-1] // 8
    return torch.zeros(1, 4, side, side, device=pixels.device)


@torch.no_grad()
def count_flop(network: nn.Module, *inputs: Tensor) -> float:
    """Return the FLOP of a forward pass of one sample, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return float(counter.get_total_flops())


def kept_bytes(network: nn.Module, call: Callable[..., object], *inputs: Tensor) -> Kept:
    """Return what a pass keeps on a GPU under autocast to bfloat16.

    Args:
        network: On the meta device, where it stays. Convolutions in it are laid out channels last,
            as stages do: norms on a GPU then keep a copy of their input.
        call: Takes the network and the inputs; gradients flow to both.
        inputs: Of one sample, on the meta device.
    """
    network = copy.deepcopy(network)
    nn.Module.to(network, memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True), FusedAttention():
        network = network.to_empty(device="cuda")
        one, two = (_kept_by(network, call, inputs, num) for num in (1, 2))
    return Kept(2 * one - two, two - one)


def saved_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Return the bytes of all storages that autograd saves in a call, without weights."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    found = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # kept, so that its address is not given away again
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in found.values())


def _kept_by(
    network: nn.Module, call: Callable[..., object], inputs: tuple[Tensor, ...], num: int
) -> int:
    given = [
        torch.zeros(num, *x.shape[1:], dtype=x.dtype, device="cuda", requires_grad=True)
        for x in inputs
    ]
    with gpu_autocast():
        return saved_bytes(network, lambda: call(network, *given))


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Do what `torch.autocast("cuda", torch.bfloat16)` does, which needs a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class FusedAttention(TorchFunctionMode):
    """Attend as a GPU does; torch looks for one before it chooses, and writes attention out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: whatever is called
        is_fused = torch.backends.cuda.flash_sdp_enabled()  # not where a step asks for the formula
        if func is F.scaled_dot_product_attention and is_fused:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))
