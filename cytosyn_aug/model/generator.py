"""TileGenerator, the loaded model: encode, decode, features, velocity and sampling.

It holds no policy about what to edit and draws no randomness of its own: seeds come in.
Everything runs under `torch.no_grad()`, not inference mode, so that results can enter the
backward pass of a user's own model; and in the networks' own dtype, also under a user's autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import check_images, images_to_pixels, pixels_to_images
from cytosyn_aug.model.batching import MicroBatches
from cytosyn_aug.model.checkpoint import ModelParts
from cytosyn_aug.model.conditions import Conditions, read_conditions
from cytosyn_aug.model.decoder import SmallDecoder
from cytosyn_aug.model.encoder import Features, StainProbe, TileEncoder
from cytosyn_aug.model.loading import (
    LazyParts,
    ModelHandle,
    ModelSource,
    check_device,
    check_process,
)
from cytosyn_aug.model.sampler import (
    DEFAULT_STEPS,
    Forward,
    Guidance,
    Sampler,
    choose_guidance,
    compile_forward,
    compile_rows,
    draw_latents,
    time_grid,
)
from cytosyn_aug.model.solvers import sample_noise
from cytosyn_aug.model.transformer import SiT

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Moments(NamedTuple):
    """Posterior of the VAE, in its own latent space: mean and std, float32 [B, C, h, w]."""

    mean: Tensor
    std: Tensor


def _at_border(
    method: Callable[Concatenate[TileGenerator, _P], _R],
) -> Callable[Concatenate[TileGenerator, _P], _R]:
    """Run a method without the caller's gradients and autocast, and not in a forked worker."""

    @functools.wraps(method)
    def run(self: TileGenerator, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self.check_process()
        with torch.no_grad(), isolated():
            return method(self, *args, **kwargs)

    return run


class TileGenerator:
    """A CytoSyn-class model, ready to use.

    Attributes:
        tile: Side and scale of the tiles it was trained on.
        digest: 16 hexadecimal digits that identify all its weights.
        has_encoder: Whether it can compute features.
        device: Where it runs.
        dtype: Floating type of the networks; the state of the samplers is float32 or wider.
        batches: Cuts batches for the networks.

    Pickling one, as happens to transforms on their way to spawned DataLoader workers, keeps where
    it came from and its digest, neither weights nor what was compiled: the other process loads it
    when it is first needed. Copies in one process are the same object.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> generator.sample(per_condition=2, steps=4, seed=0).shape
        torch.Size([2, 3, 224, 224])
    """

    # Several transforms of one pipeline share a model in another process as they do in the first.
    _by_handle: ClassVar[WeakValueDictionary[ModelHandle, TileGenerator]] = WeakValueDictionary()

    def __init__(
        self,
        parts: ModelParts,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        handle = ModelHandle.of(parts, torch.device(device), dtype, batch_size)
        self._set_up(LazyParts(handle, parts), can_travel=parts.folder is not None)

    def _set_up(self, parts: LazyParts, can_travel: bool) -> None:
        handle = parts.handle
        self.tile, self.digest = handle.tile, handle.digest
        self.has_encoder = handle.has_encoder
        self.device, self.dtype = torch.device(handle.device), getattr(torch, handle.dtype)
        self.batches = MicroBatches(self.device, handle.batch_size)
        self._compiled: dict[str, Callable[..., Tensor]] = {}  # by name; never travels
        self._parts = parts
        self._can_travel = can_travel
        if can_travel:
            self._set_handle(handle)

    def _set_handle(self, handle: ModelHandle) -> None:
        self._parts.handle = handle
        self._by_handle.setdefault(handle, self)

    @classmethod
    @isolated()
    def from_pretrained(
        cls,
        source: Path | str | None = None,
        *,
        encoder: Path | str | None = "auto",
        revision: str | None = None,
        key_map: Path | str | None = None,
        token: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load a model: the embedded `tiny`, a model folder, or a repository on the Hub.

        No code from a folder or repository is ever executed.

        Args:
            source: Model folder in diffusers' layout or a Hub id such as
                "Owkin-Bioptimus/CytoSyn"; None for the embedded `tiny`.
            encoder: "auto" takes the folder's own `encoder/`, if any; None takes none, and then
                features must be given; else a folder, a safetensors file or a Hub id such as
                "bioptimus/H0-mini".
            revision: Branch, tag or commit on the Hub.
            key_map: JSON file that renames tensors; its form stands at
                `cytosyn_aug.model.tensors.KeyMap`.
            token: Access token for the Hub; None for the one you are logged in with.
            device: Device of the networks.
            dtype: Floating type of the networks: float32, bfloat16 or float16.
            batch_size: Largest number of tiles in the networks at once.

        Raises:
            FileNotFoundError: The folder, a file in it or the repository does not exist.
            PermissionError: The repository is gated and access has not been granted.
            ConnectionError: The Hub cannot be reached and nothing usable is in the cache.
            ValueError: The folder does not hold a model of this kind, every difference named; or
                there is no such device.
        """
        check_device(device)
        origin = ModelSource.of(source, encoder, revision, key_map)
        located = origin.located(token)
        parts = located.load(dtype)
        origin.announce_licences(located)
        generator = cls(parts, device=device, dtype=dtype, batch_size=batch_size)
        generator._set_handle(replace(generator.handle(), origin=origin, located=located))
        return generator

    def handle(self) -> ModelHandle:
        """Return all of this generator but its weights, for another process.

        Raises:
            ValueError: It was put together in memory, so no other process could load it.
        """
        if not self._can_travel:
            raise ValueError(
                "this generator was built from parts in memory, which another process cannot load; "
                "save them with cytosyn_aug.model.checkpoint.save_model and load the folder"
            )
        # The size fell if memory ran out.
        self._set_handle(replace(self._parts.handle, batch_size=self.batch_size))
        return self._parts.handle

    @classmethod
    def from_handle(cls, handle: ModelHandle) -> Self:
        """Return the generator of a handle: one that is loaded already, or one that loads later.

        What loading can raise (the model is gone, or its digest differs) is raised at first use.
        """
        known = cls._by_handle.get(handle)
        if isinstance(known, cls):
            return known
        generator = cls.__new__(cls)
        generator._set_up(LazyParts(handle), can_travel=True)
        return generator

    def load_on(self, device: torch.device | str) -> None:
        """Load the networks of a generator that came as a handle, on a device of this machine.

        Raises:
            ValueError: The weights have changed since the handle was made, or there is no such
                device.
            FileNotFoundError, PermissionError, ConnectionError: The model cannot be found.
        """
        if self.is_loaded:
            assert str(self.device) == str(device)
            return
        self.device = self.batches.device = torch.device(device)
        self._set_handle(replace(self._parts.handle, device=str(device)))
        self._parts.get()

    def __reduce__(self) -> tuple[Any, ...]:  # Any: as Python types it
        return type(self).from_handle, (self.handle(),)

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are here; False for a handle's, until they are first needed."""
        return self._parts.is_loaded

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self._parts.get().vae

    @property
    def transformer(self) -> SiT:
        """The network of the flow."""
        return self._parts.get().transformer

    @property
    def encoder(self) -> TileEncoder | None:
        """The encoder of features, if any."""
        return self._parts.get().encoder

    @property
    def stain_probe(self) -> StainProbe | None:
        """The layer that reads the stain of a slide from the features of a tile, if any."""
        return self._parts.get().stain_probe

    @property
    def student(self) -> SiT | None:
        """The network that samples in a few forwards, if any."""
        return self._parts.get().student

    @property
    def decoder(self) -> SmallDecoder | None:
        """The decoder that is faster than the autoencoder's own, if any."""
        return self._parts.get().decoder

    @property
    def null_condition(self) -> Tensor:
        """float32 [D] that stands for no condition: zeros, unless one was learned."""
        null = self._parts.get().null_condition
        assert null is not None  # placing the parts fills it in
        return null

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model's folder states differently from what was expected."""
        return self._parts.get().notes

    @property
    def folder(self) -> Path | None:
        """Where the model was read from; None for one built in memory."""
        return self._parts.get().folder

    @property
    def batch_size(self) -> int:
        """Most tiles in the networks at once; falls when a device runs out of memory."""
        return self.batches.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of one tile's latents."""
        side = self.transformer.config["input_size"]
        return self.transformer.config["in_channels"], side, side

    def check_process(self) -> None:
        """Raise RuntimeError in a forked DataLoader worker, where its parent's GPU is no use."""
        check_process(self.device, self._parts.owner)

    @_at_border
    def encode(self, images: Tensor) -> Moments:
        """Return the posterior moments of uint8 images [B, 3, size, size]."""
        self.check_images(images)
        return Moments(*self.batches.map(self._encode, images))

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images_to_pixels(images, self.dtype).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
        return posterior.mean.float(), posterior.std.float()

    @_at_border
    def whiten(self, latents: Tensor) -> Tensor:
        """Translate VAE latents to the whitened ones that samplers work on, float32."""
        return self.transformer.whiten(latents.float())

    @_at_border
    def decode(self, latents: Tensor, *, is_few_step: bool = False) -> Tensor:
        """Return uint8 images of whitened latents.

        Args:
            latents: float [B, C, h, w].
            is_few_step: Use the model's small decoder, if it has one: after few forwards the
                autoencoder's own would take most of the time.

        Returns:
            uint8 [B, 3, size, size].

        Raises:
            FloatingPointError: The decoder's range was left, as happens in float16.
        """
        pixels = self.decode_pixels(latents, is_few_step=is_few_step)
        if not pixels.isfinite().all():
            raise FloatingPointError(
                f"decoding in {self.dtype} gave values that are not finite; load the model with "
                "dtype=torch.bfloat16 or torch.float32"
            )
        return pixels_to_images(pixels)

    @_at_border
    def decode_pixels(self, latents: Tensor, *, is_few_step: bool = False) -> Tensor:
        """Return float32 pixels [B, 3, size, size], not clipped.

        Args:
            latents: Whitened, float [B, C, h, w].
            is_few_step: Use the model's small decoder, if it has one.
        """
        network, name = _decoder_of(self.vae), "vae_decoder"
        if is_few_step and self.decoder is not None:
            network, name = self.decoder, "decoder"
        decoder = self._compiled.get(name, network)

        def decode(part: Tensor) -> tuple[Tensor]:
            raw = self.transformer.unwhiten(part.float()).to(self.dtype)
            return (decoder(raw.contiguous(memory_format=torch.channels_last)).float(),)

        return self.batches.map(decode, latents)[0]

    @_at_border
    def features(self, images: Tensor) -> Features:
        """Return the encoder's features of uint8 images [B, 3, size, size], float32.

        Raises:
            ValueError: The model was loaded without an encoder, or the images do not fit it.
        """
        encoder = self._encoder_for(images)

        def encode(part: Tensor) -> tuple[Tensor, Tensor]:
            features = encoder(part)
            return features.cls.float(), features.patches.float()

        return Features(*self.batches.map(encode, images))

    @_at_border
    def cls_features(self, images: Tensor) -> Tensor:
        """Return `features(images).cls`, without keeping those of patches, 256 times as many.

        Raises:
            ValueError: The model was loaded without an encoder, or the images do not fit it.
        """
        encoder = self._encoder_for(images)

        def encode(part: Tensor) -> tuple[Tensor]:
            return (encoder(part).cls.to(torch.float32, copy=True),)  # no view of all tokens

        return self.batches.map(encode, images)[0]

    def _encoder_for(self, images: Tensor) -> TileEncoder:
        if self.encoder is None:
            raise ValueError(
                "this model was loaded without an encoder, so features must be given: pass "
                'precomputed CLS vectors, or load it with encoder="bioptimus/H0-mini"'
            )
        self.check_images(images)
        return self.encoder

    @_at_border
    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the transformer's velocity at whitened latents.

        Args:
            x: float [B, C, h, w] at time t.
            t: float [B], 1 = noise, 0 = data.
            condition: float [B, D].

        Returns:
            Velocity eps - x, shape and dtype of `x`.
        """
        return self.transformer(x, t, condition)

    @_at_border
    def draw(
        self,
        start: Tensor,
        condition: Tensor,
        *,
        sampler: Sampler | None = None,
        steps: int | None = None,
        start_time: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Return latents that the flow leads to from `start`.

        Args:
            start: Whitened latents [B, C, h, w] at `start_time`, any device.
            condition: [B, D].
            sampler: "student", "ab2" or "euler_maruyama"; None for "student" if there is one, else
                "ab2".
            steps: Evaluations of the network; None for 4 with "student", 16 with "ab2" and 250
                with "euler_maruyama".
            start_time: 1 = noise; less where latents were noised only so far.
            guidance_scale: Classifier-free guidance; 1 for none.
            guidance_low: Lower end of the guidance interval in t (1 = noise); None for 0, or for
                what the student was taught.
            guidance_high: Upper end; None for 0.75, or for what the student was taught.
            seeds: One per row, for the noise of "euler_maruyama"; None for 0, 1, ...

        Returns:
            float32 [B, C, h, w] at t = 0, on the generator's device.

        Raises:
            ValueError: No student, too few steps, or guidance that the student was not taught.
        """
        chosen = self._sampler(sampler)
        guidance = self._guidance(chosen, guidance_scale, guidance_low, guidance_high)
        times = time_grid(chosen, DEFAULT_STEPS[chosen] if steps is None else steps, start_time)
        rows = range(len(start)) if seeds is None else seeds
        network = self.student if chosen == "student" else self.transformer
        assert network is not None
        forward: Forward = self._compiled.get(chosen, network.forward_modulated)

        def draw(start: Tensor, condition: Tensor, seeds: Sequence[int]) -> tuple[Tensor]:
            is_stochastic = chosen == "euler_maruyama"
            latents = draw_latents(
                network,
                start.double() if is_stochastic else start.float(),
                times,
                condition,
                self.null_condition,
                sampler=chosen,
                guidance=guidance,
                step_noise=self._step_noise(seeds) if is_stochastic else None,
                forward=forward,
            )
            return (latents.float(),)

        return self.batches.map(draw, start, condition, rows)[0]

    @_at_border
    def sample(
        self,
        cls: Conditions | None = None,
        *,
        per_condition: int = 1,
        steps: int | None = None,
        sampler: Sampler | None = None,
        guidance_scale: float = 1.0,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Generate tiles from noise, with or without conditions.

        Args:
            cls: Conditions [N, D] (encoder CLS vectors), or a file of them; see
                `cytosyn_aug.model.conditions`. None for unconditional tiles.
            per_condition: Tiles k for each condition.
            steps: Evaluations of the network; None for 4 with "student", 16 with "ab2" and 250
                with "euler_maruyama".
            sampler: "student" (few jumps, for models that have one), "ab2" (few steps of the
                transformer) or "euler_maruyama" (the reference, for comparison: its noise is drawn
                on the host in every step); the first two are deterministic. None for "student" if
                there is one, else "ab2".
            guidance_scale: Classifier-free guidance; 1 for none. A student costs the same with it.
            guidance_low: Lower end of the guidance interval in t (1 = noise); None for 0, or for
                what the student was taught.
            guidance_high: Upper end; None for 0.75, no guidance in the noisiest quarter, or for
                what the student was taught.
            seed: Tile i of the result has seed `seed + i`.

        Returns:
            uint8 [N k, 3, size, size]; the k tiles of a condition follow each other.

        Raises:
            ValueError: Conditions of another width, counts below 1, no student, or guidance that
                the student was not taught.
        """
        chosen = self._sampler(sampler)
        conditions = self._conditions(cls, per_condition)
        seeds = range(seed, seed + len(conditions))
        images = []
        size = self.batch_size  # which falls underway if memory runs out
        for start in range(0, len(conditions), size):
            part = slice(start, start + size)
            latents = self.draw(
                sample_noise(seeds[part], self.latent_shape),
                conditions[part],
                sampler=chosen,
                steps=steps,
                guidance_scale=guidance_scale,
                guidance_low=guidance_low,
                guidance_high=guidance_high,
                seeds=seeds[part],
            )
            images.append(self.decode(latents, is_few_step=chosen == "student"))
        return torch.cat(images)

    def compile(self) -> None:
        """Compile the networks, whole, for batches that are padded to `batch_size`.

        The first batch then takes minutes, and so does the first with guidance, whose two halves
        are one batch, and the first after memory ran out. Results move by rounding, less than a
        grey level.
        """
        self.batches.is_static = True
        forward = compile_forward(self.transformer)
        self._compiled = {"ab2": forward, "euler_maruyama": forward}
        self._compiled["vae_decoder"] = compile_rows(_decoder_of(self.vae))
        if self.student is not None:
            self._compiled["student"] = compile_forward(self.student)
        if self.decoder is not None:
            self._compiled["decoder"] = compile_rows(self.decoder)

    def _sampler(self, given: Sampler | None) -> Sampler:
        if given is None:
            return "ab2" if self.student is None else "student"
        if given == "student" and self.student is None:
            raise ValueError(
                f"{self.folder} holds no student; sample with 'ab2', or distil one with "
                "`python -m training distil`"
            )
        if given not in DEFAULT_STEPS:
            raise ValueError(f"sampler is {given!r}, expected one of {sorted(DEFAULT_STEPS)}")
        return given

    def check_images(self, images: Tensor) -> None:
        """Raise unless `images` are uint8 [B, 3, size, size] with the model's tile side."""
        check_images(images, self.tile)

    def check_drawing(
        self, *, steps: int | None, guidance_scale: float, start_time: float = 1.0
    ) -> None:
        """Raise ValueError for what `draw` would refuse, so that no transform fails at a tile.

        A generator that came as a handle is not loaded for it, and refuses at its first draw.
        """
        if not self.is_loaded:
            return
        sampler = self._sampler(None)
        self._guidance(sampler, guidance_scale)
        time_grid(sampler, DEFAULT_STEPS[sampler] if steps is None else steps, start_time)

    def _guidance(
        self, sampler: Sampler, scale: float, low: float | None = None, high: float | None = None
    ) -> Guidance:
        taught = None
        if sampler == "student" and self.student is not None:
            taught = self.student.config["taught_guidance"]
        return choose_guidance(scale, low, high, taught)

    def _step_noise(self, seeds: Sequence[int]) -> Callable[[int], Tensor]:
        return lambda step: sample_noise(seeds, self.latent_shape, stream=step + 1)

    def _conditions(self, cls: Conditions | None, per_condition: int) -> Tensor:
        if per_condition < 1:
            raise ValueError(f"per_condition is {per_condition}, expected at least 1")
        width = len(self.null_condition)
        if cls is None:
            return self.null_condition.expand(per_condition, width)
        return read_conditions(cls, width).to(self.device).repeat_interleave(per_condition, 0)


def _decoder_of(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    # Not a method: compiled, it would keep its generator alive, and all weights on the device.
    return lambda raw: vae.decode(raw).sample  # type: ignore[union-attr]
