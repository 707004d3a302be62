"""Memory plan of a model: bytes of its weights, of what steps share, and per tile.

Counted on the operations that the networks really do, without doing them: their shapes run on the
meta device, and every tensor counts from its making to its last use. An allocator's fragments and
the work space of convolutions come on top, and were not measured here. Guidance doubles the
transformer's share, which is the smaller one where an autoencoder decodes.

Transforms edit `batch_size` tiles at a time, so the same number bounds them, for tiles of the
model's size. Of the whole batch they hold only what comes in and goes out: 10 bytes per value
of uint8 batches, 16 of float32, and `StainViews` 5 and 8 more per view.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.sampler import MAX_ROWS

# What a transform holds of a tile beside the networks, for each of its values: grey levels before
# and after as float32, and copies of both on the way.
_EDIT_BYTES = 16


class MemoryPlan(NamedTuple):
    """Bytes on the device.

    Attributes:
        weights: Of all networks.
        per_tile: Most that is alive for a tile while any of them runs.
        modulation: Of the steps that are modulated together, however small the batch.
    """

    weights: int
    per_tile: int
    modulation: int = 0

    def total(self, batch_size: int) -> int:
        """Return weights + modulation + batch_size x per_tile."""
        return self.weights + self.modulation + batch_size * self.per_tile

    def largest_batch(self, num_bytes: int) -> int:
        """Return the largest batch whose total fits; 0 if none does."""
        return max(0, (num_bytes - self.total(0)) // self.per_tile)


def plan_memory(generator: TileGenerator) -> MemoryPlan:
    """Return what a generator needs, in its own dtype, with guidance.

    Example:
        >>> plan = plan_memory(TileGenerator.from_pretrained())
        >>> plan.largest_batch(plan.total(16))
        16
    """
    parts = [
        generator.vae, generator.transformer, generator.encoder, generator.stain_probe,
        generator.student, generator.decoder,
    ]  # fmt: skip
    weights = sum(
        p.numel() * p.element_size() for part in parts if part is not None
        for p in part.parameters()
    )  # fmt: skip
    size, dtype = generator.tile.size_px, generator.dtype
    pixels = torch.zeros(1, 3, size, size, dtype=dtype, device="meta")
    latents = torch.zeros(1, *generator.latent_shape, dtype=dtype, device="meta")
    peaks = [
        _peak_of(generator.vae.encoder, pixels),
        _peak_of(generator.vae.decoder, latents),
        _peak_of_flow(generator, latents),
    ]
    if generator.encoder is not None:
        peaks.append(_peak_of(generator.encoder.vit, pixels))
    if generator.decoder is not None:
        peaks.append(_peak_of(generator.decoder, latents))
    config = generator.transformer.config
    numbers = (6 * config["depth"] + 2) * config["hidden_size"]
    per_tile = max(peaks) + _EDIT_BYTES * pixels.numel()
    return MemoryPlan(weights, per_tile, MAX_ROWS * numbers * dtype.itemsize)


def peak_bytes(function: Callable[..., object], known: Iterable[Tensor], *inputs: Tensor) -> int:
    """Return the most bytes that are alive at once while a function runs, its inputs included.

    Args:
        function: What is run.
        known: Tensors that are not counted, such as weights.
        inputs: Its arguments.
    """
    counter = _LiveBytes([*known, *inputs])
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.peak + sum(x.untyped_storage().nbytes() for x in inputs)


def _peak_of(network: nn.Module, *inputs: Tensor) -> int:
    shadow = _shadow_of(network)
    return peak_bytes(shadow, [*shadow.parameters(), *shadow.buffers()], *inputs)


def _shadow_of(network: nn.Module) -> Any:  # Any: the same class
    """Return a copy of a network on the meta device, for which no weight is copied."""
    weights = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(x): x.detach().to("meta") for x in weights})


def _peak_of_flow(generator: TileGenerator, latents: Tensor) -> int:
    """Return the transformer's peak for the two halves of a guided tile."""
    shadow = _shadow_of(generator.transformer)
    both = torch.cat([latents, latents])
    width = shadow.config["conditioning_dim"]
    t = torch.zeros(2, device="meta")
    condition = torch.zeros(2, width, dtype=latents.dtype, device="meta")
    known = [*shadow.parameters(), *shadow.buffers()]
    return peak_bytes(shadow, known, both, t, condition)


class _LiveBytes(TorchDispatchMode):
    """Adds a storage when an operation returns it and takes it off when nothing holds it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        # The mode keeps them, so that no new storage gets the identity of one that is known.
        self.known = {id(s): s for s in (x.untyped_storage() for x in known)}
        self.sizes: dict[int, int] = {}
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own signature
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)
