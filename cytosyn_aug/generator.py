"""The loaded model: encode, decode, features, velocity and sampling on one device and dtype.

It holds no policy about what to edit and draws no randomness of its own: seeds come in.
Everything runs under `torch.no_grad()`, not inference mode, so that results can enter the
backward pass of a user's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cytosyn_aug.checkpoint import EMBEDDED_MODEL, ModelParts, load_model
from cytosyn_aug.conditions import Conditions, read_conditions
from cytosyn_aug.encoder import Features
from cytosyn_aug.hub import ENCODER_PATTERNS, announce_licence, find_folder
from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.sampling import (
    adams_bashforth2,
    bind_student,
    euler_maruyama,
    flow_map,
    guide,
    linear_grid,
    polynomial_grid,
    sample_noise,
)

Sampler = Literal["student", "ab2", "euler_maruyama"]
DEFAULT_STEPS: dict[Sampler, int] = {"student": 4, "ab2": 16, "euler_maruyama": 250}


class Moments(NamedTuple):
    """Posterior of the VAE, in its own latent space: mean and std, float32 [B, C, h, w]."""

    mean: Tensor
    std: Tensor


class TileGenerator:
    """A CytoSyn-class model, ready to use.

    Attributes:
        tile: Side and scale of the tiles it was trained on.
        digest: 16 hexadecimal digits that identify all its weights.
        notes: What its folder states differently from what was expected.
        folder: Where it was read from.
        device: Where it runs.
        dtype: Floating type of the networks; the state of the samplers is float32 or wider.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> generator.sample(per_condition=2, steps=4, seed=0).shape
        torch.Size([2, 3, 224, 224])
    """

    def __init__(
        self,
        parts: ModelParts,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        self.tile, self.digest = parts.tile, parts.digest
        self.notes, self.folder = parts.notes, parts.folder
        self.device, self.dtype = torch.device(device), dtype
        self.batch_size = batch_size
        null = parts.null_condition
        self._null_condition = None if null is None else null.float().to(self.device)
        # The latent statistics are 8 numbers, and stain is in their last digits: they keep float32.
        statistics = {k: v.clone() for k, v in parts.transformer.bn.named_buffers()}
        for part in (
            parts.vae,
            parts.transformer,
            parts.encoder,
            parts.stain_probe,
            parts.student,
            parts.decoder,
        ):
            if part is not None:
                # Not diffusers' own to(): it warns about a float32 list that is empty here.
                nn.Module.to(part, self.device, dtype)
        for name, value in statistics.items():
            setattr(parts.transformer.bn, name, value.to(self.device))
        self.vae = parts.vae.to(memory_format=torch.channels_last)
        self.transformer = parts.transformer
        self.encoder = parts.encoder
        self.stain_probe = parts.stain_probe
        self.student = parts.student
        self.decoder = parts.decoder
        if self.decoder is not None:
            nn.Module.to(self.decoder, memory_format=torch.channels_last)

    @classmethod
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
    ) -> TileGenerator:
        """Load a model: the embedded `tiny`, a model folder, or a repository on the Hub.

        No code from a folder or repository is ever executed.

        Args:
            source: Model folder in diffusers' layout or a Hub id such as
                "Owkin-Bioptimus/CytoSyn"; None for the embedded `tiny`.
            encoder: "auto" takes the folder's own `encoder/`, if any; None takes none, and then
                features must be given; else a folder, a safetensors file or a Hub id such as
                "bioptimus/H0-mini".
            revision: Branch, tag or commit on the Hub.
            key_map: JSON file that renames tensors; see `cytosyn_aug.weights.KeyMap`.
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
        _check_device(device)
        folder = EMBEDDED_MODEL
        if source is not None:
            folder = find_folder(source, revision=revision, token=token)
        found = encoder
        if encoder is not None and encoder != "auto" and not Path(encoder).is_file():
            found = find_folder(encoder, token=token, patterns=ENCODER_PATTERNS)
        parts = load_model(folder, encoder=found, key_map=key_map, dtype=dtype)
        for given, place in ((source, folder), (encoder, found)):
            if given is not None and isinstance(place, Path) and place.is_dir():
                announce_licence(given, place)
        return cls(parts, device=device, dtype=dtype, batch_size=batch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of one tile's latents."""
        side = self.transformer.config["input_size"]
        return self.transformer.config["in_channels"], side, side

    @property
    def null_condition(self) -> Tensor:
        """The condition that stands for none, float32 [D]: zeros, unless one was learned."""
        if self._null_condition is not None:
            return self._null_condition
        return torch.zeros(self.transformer.config["conditioning_dim"], device=self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Return the posterior moments of uint8 images [B, 3, size, size]."""
        self.check_images(images)
        means, stds = [], []
        for part in self._batches(images):
            pixels = images_to_pixels(part, self.dtype).contiguous(
                memory_format=torch.channels_last
            )
            posterior = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        return Moments(torch.cat(means), torch.cat(stds))

    def whiten(self, latents: Tensor) -> Tensor:
        """Translate VAE latents to the whitened ones that samplers work on, float32."""
        return self.transformer.whiten(latents.float())

    @torch.no_grad()
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

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor, *, is_few_step: bool = False) -> Tensor:
        """Return float32 pixels [B, 3, size, size], not clipped; see `decode`."""
        decoder = self.decoder if is_few_step and self.decoder is not None else self._own_decoder
        decoded = []
        for part in self._batches(latents):
            raw = self.transformer.unwhiten(part.float()).to(self.dtype)
            raw = raw.contiguous(memory_format=torch.channels_last)
            decoded.append(decoder(raw).float())
        return torch.cat(decoded)

    def _own_decoder(self, raw: Tensor) -> Tensor:
        return self.vae.decode(raw).sample  # type: ignore[union-attr]

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Return the encoder's features of uint8 images [B, 3, size, size], float32.

        Raises:
            ValueError: The model was loaded without an encoder, or the images do not fit it.
        """
        if self.encoder is None:
            raise ValueError(
                "this model was loaded without an encoder, so features must be given: pass "
                'precomputed CLS vectors, or load it with encoder="bioptimus/H0-mini"'
            )
        self.check_images(images)
        found = [self.encoder(part) for part in self._batches(images)]
        return Features(
            torch.cat([f.cls.float() for f in found]),
            torch.cat([f.patches.float() for f in found]),
        )

    @torch.no_grad()
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

    @torch.no_grad()
    def average_velocity(
        self, x: Tensor, t: Tensor, condition: Tensor, r: Tensor, guidance: Tensor
    ) -> Tensor:
        """Return the student's average velocity from t to r at whitened latents.

        Args:
            x: float [B, C, h, w] at time t.
            t: float [B], 1 = noise, 0 = data.
            condition: float [B, D].
            r: float [B], r <= t.
            guidance: float [B], scales to fold in; 1 for none.

        Returns:
            u with x_r = x_t + (r - t) u, shape and dtype of `x`.

        Raises:
            ValueError: The model has no student.
        """
        if self.student is None:
            raise ValueError(
                f"{self.folder} holds no student; sample with 'ab2', or distil one with "
                "`python -m training distil`"
            )
        return self.student(x, t, condition, r, guidance)

    @torch.no_grad()
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
                `cytosyn_aug.conditions`. None for unconditional tiles.
            per_condition: Tiles k for each condition.
            steps: Evaluations of the network; None for 4 with "student", 16 with "ab2" and 250
                with "euler_maruyama".
            sampler: "student" (few jumps, for models that have one), "ab2" (few steps of the
                transformer) or "euler_maruyama" (the reference); the first two are deterministic.
                None for "student" if there is one, else "ab2".
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
        if sampler is None:
            sampler = "ab2" if self.student is None else "student"
        if sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler is {sampler!r}, expected one of {sorted(DEFAULT_STEPS)}")
        guidance = self._guidance(sampler, guidance_scale, guidance_low, guidance_high)
        conditions = self._conditions(cls, per_condition)
        count = steps if steps is not None else DEFAULT_STEPS[sampler]
        least = 1 if sampler == "student" else 2
        if count < least:
            raise ValueError(f"steps is {count}, expected at least {least} with {sampler!r}")
        images = []
        for start in range(0, len(conditions), self.batch_size):
            condition = conditions[start : start + self.batch_size]
            seeds = range(seed + start, seed + start + len(condition))
            latents = self._draw(condition, seeds, sampler, count, guidance)
            images.append(self.decode(latents, is_few_step=sampler == "student"))
        return torch.cat(images)

    def _draw(
        self,
        condition: Tensor,
        seeds: Sequence[int],
        sampler: Sampler,
        steps: int,
        guidance: tuple[float, float, float],
    ) -> Tensor:
        """Return whitened latents of one batch."""
        noise = sample_noise(seeds, self.latent_shape).to(self.device)
        if sampler == "student":
            jumps = bind_student(self.average_velocity, condition, guidance[0])
            return flow_map(jumps, noise, linear_grid(steps))
        velocity = guide(self.velocity, condition, self.null_condition, *guidance)
        if sampler == "ab2":
            return adams_bashforth2(velocity, noise, polynomial_grid(steps))
        return euler_maruyama(velocity, noise.double(), self._step_noise(seeds), num_steps=steps)

    def _guidance(
        self, sampler: Sampler, scale: float, low: float | None, high: float | None
    ) -> tuple[float, float, float]:
        """Return scale and interval, or raise if a student has learned neither."""
        taught = None if self.student is None else self.student.config["taught_guidance"]
        if sampler != "student" or taught is None:
            return scale, 0.0 if low is None else low, 0.75 if high is None else high
        largest, *interval = taught
        given = [interval[k] if x is None else x for k, x in enumerate((low, high))]
        if not 1 <= scale <= largest or given != interval:
            raise ValueError(
                f"guidance is {scale} in t from {given[0]} to {given[1]}, but the student was "
                f"taught 1 to {largest} in {interval[0]} to {interval[1]}; stay inside or use "
                "sampler='ab2'"
            )
        return scale, interval[0], interval[1]

    def check_images(self, images: Tensor) -> None:
        """Raise unless `images` are uint8 [B, 3, size, size] with the model's tile side."""
        size = self.tile.size_px
        if images.dtype != torch.uint8:
            raise TypeError(
                f"got images of {images.dtype}, expected uint8 RGB in 0 to 255; convert them first"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"got images of shape {list(images.shape)}, expected [B, 3, {size}, {size}] RGB"
            )
        if images.shape[0] == 0:
            raise ValueError(f"got an empty batch, expected [B, 3, {size}, {size}] with B >= 1")
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"tile is {images.shape[3]}x{images.shape[2]} px, the model expects "
                f"{self.tile.describe()}; re-tile the slide at that size and scale"
            )

    def _step_noise(self, seeds: Sequence[int]) -> Callable[[int], Tensor]:
        return lambda step: sample_noise(seeds, self.latent_shape, stream=step + 1)

    def _conditions(self, cls: Conditions | None, per_condition: int) -> Tensor:
        if per_condition < 1:
            raise ValueError(f"per_condition is {per_condition}, expected at least 1")
        width = len(self.null_condition)
        if cls is None:
            return self.null_condition.expand(per_condition, width)
        return read_conditions(cls, width).to(self.device).repeat_interleave(per_condition, 0)

    def _batches(self, tensor: Tensor) -> Iterator[Tensor]:
        for part in tensor.split(self.batch_size):
            yield part.to(self.device)


def _check_device(given: torch.device | str) -> None:
    """Fail before the weights are read, not after."""
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device is {given!r}, expected one like 'cuda:0' or 'cpu'") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ValueError(
            f"device is {device}, which this torch ({torch.__version__}) does not find here; "
            "install the build for it, or use device='cpu'"
        )
