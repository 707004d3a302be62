"""Loading a model, here and again in another process: its source, its handle and its lazy parts.

A transform is pickled for every DataLoader worker that is spawned, and written as JSON by
albumentations; its model's weights are in neither, only a handle that says where they came from.
The digest decides: a folder whose weights have changed since is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import Json, TileSpec
from cytosyn_aug.io.json_files import from_json, to_json
from cytosyn_aug.model.checkpoint import EMBEDDED_MODEL, ModelParts, load_model, place_parts
from cytosyn_aug.model.hub import ENCODER_PATTERNS, announce_licence, find_folder

_KIND = "cytosyn_aug.TileGenerator"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The arguments of `TileGenerator.from_pretrained` that a model was loaded with, but no token.

    Attributes:
        source: Folder or Hub id; None for the embedded `tiny`.
        encoder: "auto", None, or a folder, a file or a Hub id.
        revision: Branch, tag or commit on the Hub.
        key_map: JSON file that renames tensors.
    """

    source: str | None = None
    encoder: str | None = "auto"
    revision: str | None = None
    key_map: str | None = None

    @classmethod
    def of(
        cls,
        source: Path | str | None,
        encoder: Path | str | None,
        revision: str | None,
        key_map: Path | str | None,
    ) -> ModelSource:
        """Return these arguments, paths as text."""
        return cls(
            source=_text(source), encoder=_text(encoder), revision=revision, key_map=_text(key_map)
        )

    def located(self, token: str | None = None) -> ModelSource:
        """Return the same on this machine's disk, as absolute paths; fetches what is not there.

        Raises:
            FileNotFoundError: A folder or repository does not exist, or holds no safetensors.
            PermissionError: A repository is gated, or the token was refused.
            ConnectionError: The Hub cannot be reached and its cache is not enough.
            ValueError: No such revision, or a revision for a local folder.
        """
        source, encoder = self.source, self.encoder
        if source is not None:
            source = _absolute(find_folder(source, revision=self.revision, token=token))
        if encoder is not None and encoder != "auto":
            path = Path(encoder)
            if not path.is_file():
                path = find_folder(encoder, token=token, patterns=ENCODER_PATTERNS)
            encoder = _absolute(path)
        key_map = None if self.key_map is None else _absolute(Path(self.key_map))
        return ModelSource(source=source, encoder=encoder, key_map=key_map)

    def is_here(self) -> bool:
        """Return whether all paths of a located source exist on this machine."""
        paths = [self.source, None if self.encoder == "auto" else self.encoder, self.key_map]
        return all(Path(p).exists() for p in paths if p is not None)

    def load(self, dtype: torch.dtype) -> ModelParts:
        """Read the parts of a located source, on the CPU."""
        folder = EMBEDDED_MODEL if self.source is None else self.source
        return load_model(folder, encoder=self.encoder, key_map=self.key_map, dtype=dtype)

    def announce_licences(self, located: ModelSource) -> None:
        """Say under which licence the weights are, where their folders state it."""
        for name, path in ((self.source, located.source), (self.encoder, located.encoder)):
            if name is not None and path is not None and Path(path).is_dir():
                announce_licence(name, Path(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHandle:
    """All of a TileGenerator but its weights, small enough to be pickled and written as JSON.

    Attributes:
        origin: How it was loaded.
        located: The same as paths of the machine it was loaded on, tried first: no worker then
            asks the Hub.
        digest: Digest of all weights.
        device: Device, as text.
        dtype: Floating type, without "torch.".
        batch_size: Largest number of tiles in the networks at once.
        tile: Tiles the model was trained on.
        has_encoder: Whether it has an encoder.
    """

    origin: ModelSource
    located: ModelSource
    digest: str
    device: str
    dtype: str
    batch_size: int
    tile: TileSpec
    has_encoder: bool

    @classmethod
    def of(
        cls, parts: ModelParts, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> ModelHandle:
        """Return the handle of parts that were just loaded, from their folder as a whole."""
        folder = None if parts.folder is None else _absolute(parts.folder)
        return cls(
            origin=ModelSource(source=folder),
            located=ModelSource(source=folder),
            digest=parts.digest,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            batch_size=batch_size,
            tile=parts.tile,
            has_encoder=parts.encoder is not None,
        )

    def load(self) -> ModelParts:
        """Load the parts again.

        Raises:
            ValueError: The weights are others by now.
            FileNotFoundError, PermissionError, ConnectionError: The model cannot be found.
        """
        located = self.located if self.located.is_here() else self.origin.located()
        parts = located.load(getattr(torch, self.dtype))
        if parts.digest != self.digest:
            raise ValueError(
                f"{located.source or EMBEDDED_MODEL} holds model {parts.digest}, this transform "
                f"was made with {self.digest}: the weights changed since, or were loaded in "
                "another way than by TileGenerator.from_pretrained; make the transform anew"
            )
        return parts

    def to_dict(self) -> Json:
        """Return the handle as JSON holds it."""
        return {"kind": _KIND, **to_json(self)}

    @classmethod
    def from_dict(cls, content: Json) -> ModelHandle:
        """Invert `to_dict`.

        Raises:
            ValueError: Not the dictionary of a handle.
        """
        fields = {k: v for k, v in content.items() if k != "kind"}
        if content.get("kind") != _KIND:
            raise ValueError(f"got a dictionary with {sorted(content)}, expected one of {_KIND}")
        return from_json(cls, fields)


class LazyParts:
    """The parts of a model on one device and in one dtype, read when they are first needed.

    Args:
        handle: How they are loaded, and where they are put.
        parts: Parts that were read already; None to read them at the first `get`.

    Attributes:
        handle: May be replaced until the parts are loaded.
        owner: Process that put the networks on their device; None if none has yet.
    """

    def __init__(self, handle: ModelHandle, parts: ModelParts | None = None) -> None:
        self.handle = handle
        self.owner: int | None = None
        self._parts: ModelParts | None = None
        if parts is not None:
            self._place(parts)

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""
        return self._parts is not None

    def get(self) -> ModelParts:
        """Return the parts, and load them first if they are not in memory.

        Raises:
            ValueError: The weights have changed since the handle was made, or there is no such
                device.
            FileNotFoundError, PermissionError, ConnectionError: The model cannot be found.
        """
        if self._parts is not None:
            return self._parts
        check_device(self.handle.device)
        with isolated():
            return self._place(self.handle.load())

    def _place(self, parts: ModelParts) -> ModelParts:
        dtype = getattr(torch, self.handle.dtype)
        self._parts = place_parts(parts, torch.device(self.handle.device), dtype)
        self.owner = os.getpid()
        return self._parts


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


def check_process(device: torch.device, owner: int | None) -> None:
    """Refuse a GPU that belongs to another process.

    Args:
        device: Where the networks are.
        owner: Process that put them there; None if they are not loaded yet: a worker that was
            spawned loads them itself, and may.

    Raises:
        RuntimeError: In a DataLoader worker that was forked from the process whose GPU this is.
    """
    is_foreign = owner is not None and owner != os.getpid()
    if device.type == "cuda" and is_foreign and get_worker_info() is not None:
        raise RuntimeError(
            f"the model is on {device}, and a DataLoader worker cannot use the GPU of its parent "
            "process. Two ways work: call the transform on whole batches after collation, in the "
            "training loop: `images = transform(images.to(device))`; or prepare variants "
            "beforehand and put CachedVariants in the workers"
        )


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)
