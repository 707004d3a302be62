"""The parts of a model on one device and in one dtype, loaded now or when they are first needed.

A transform is pickled for every DataLoader worker that is spawned; of its model only a handle
travels (`cytosyn_aug.model.origin`), neither weights nor what was compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.model.batching import MicroBatches
from cytosyn_aug.model.checkpoint import ModelParts, place_parts
from cytosyn_aug.model.decoder import SmallDecoder
from cytosyn_aug.model.encoder import StainProbe, TileEncoder
from cytosyn_aug.model.origin import GeneratorHandle, Origin, check_process
from cytosyn_aug.model.transformer import SiT


class LoadedModel:
    """What `cytosyn_aug.TileGenerator` computes with; see there for the attributes."""

    vae: AutoencoderKL
    transformer: SiT
    encoder: TileEncoder | None
    stain_probe: StainProbe | None
    student: SiT | None
    decoder: SmallDecoder | None
    null_condition: Tensor
    notes: tuple[str, ...]
    folder: Path | None
    # Several transforms of one pipeline share a model in the other process as they do in the first.
    _alive: ClassVar[WeakValueDictionary[GeneratorHandle, LoadedModel]] = WeakValueDictionary()

    def __init__(
        self,
        parts: ModelParts,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        handle = GeneratorHandle.of(parts, torch.device(device), dtype, batch_size)
        self._prepare(handle, can_travel=parts.folder is not None)
        self._hold(parts)

    def _prepare(self, handle: GeneratorHandle, can_travel: bool) -> None:
        """Set up everything but the networks."""
        self.tile, self.digest = handle.tile, handle.digest
        self.has_encoder = handle.has_encoder
        self.device, self.dtype = torch.device(handle.device), getattr(torch, handle.dtype)
        self.batches = MicroBatches(self.device, handle.batch_size)
        self._compiled: dict[str, Callable[..., Tensor]] = {}  # by name; never travels
        self._handle: GeneratorHandle | None = None
        if can_travel:
            self._came_from(handle)

    def _came_from(self, handle: GeneratorHandle) -> None:
        self._handle = handle
        self._alive.setdefault(handle, self)

    def _hold(self, parts: ModelParts) -> None:
        """Take the networks in, as attributes, on this generator's device and in its type."""
        self._pid = os.getpid()
        vars(self).update(place_parts(parts, self.device, self.dtype)._asdict())

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
            key_map: JSON file that renames tensors; see `cytosyn_aug.model.tensors.KeyMap`.
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
        origin = Origin.of(source, encoder, revision, key_map)
        located = origin.located(token)
        parts = located.load(dtype)
        origin.announce_licences(located)
        made = cls(parts, device=device, dtype=dtype, batch_size=batch_size)
        made._came_from(replace(made.handle(), origin=origin, located=located))
        return made

    def handle(self) -> GeneratorHandle:
        """Return all of this generator but its weights, for another process.

        Raises:
            ValueError: It was put together in memory, so no other process could load it.
        """
        if self._handle is None:
            raise ValueError(
                "this generator was built from parts in memory, which another process cannot load; "
                "save them with cytosyn_aug.model.checkpoint.save_model and load the folder"
            )
        # The size fell if memory ran out.
        self._came_from(replace(self._handle, batch_size=self.batch_size))
        return self._handle

    @classmethod
    def from_handle(cls, handle: GeneratorHandle) -> Self:
        """Return the generator of a handle: one that is loaded already, or one that loads later.

        What loading can raise (the model is gone, or its digest differs) is raised at first use.
        """
        found = cls._alive.get(handle)
        if isinstance(found, cls):
            return found
        made = cls.__new__(cls)
        made._prepare(handle, can_travel=True)
        return made

    @isolated()
    def load_on(self, device: torch.device | str) -> None:
        """Load the networks of a generator that came as a handle, on a device of this machine.

        Raises:
            ValueError, OSError: See `from_pretrained`.
        """
        assert self._handle is not None
        if self.is_loaded:
            assert str(self.device) == str(device)
            return
        self.device = self.batches.device = torch.device(device)
        self._came_from(replace(self._handle, device=str(device)))
        _ = self.vae  # what is asked for first loads all

    def __reduce__(self) -> tuple[Any, ...]:  # Any: as Python types it
        return type(self).from_handle, (self.handle(),)

    if not TYPE_CHECKING:  # or a misspelt attribute would pass the type checker

        def __getattr__(self, name: str) -> Any:
            # Python asks only for what is not there: the networks, before they are loaded.
            if name not in ModelParts._fields or "_handle" not in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            check_device(self.device)
            self._hold(self.handle().load())
            return getattr(self, name)

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are here; False for a handle's, until they are first needed."""
        return "vae" in vars(self)

    def check_process(self) -> None:
        """Raise RuntimeError in a forked DataLoader worker, where its parent's GPU is no use."""
        check_process(self.device, vars(self).get("_pid"))

    @property
    def batch_size(self) -> int:
        """Most tiles in the networks at once; falls when a device runs out of memory."""
        return self.batches.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of one tile's latents."""
        side = self.transformer.config["input_size"]
        return self.transformer.config["in_channels"], side, side


def check_device(given: torch.device | str) -> None:
    """Fail before weights are read, not after.

    Raises:
        ValueError: This torch knows or finds no such device.
    """
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
