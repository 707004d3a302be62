"""Where a loaded model came from, so that another process can load the very same one.

A transform is pickled for every DataLoader worker that is spawned, and written as JSON by
albumentations; its model's weights are in neither, only this handle. The digest is what counts: a
folder whose weights changed since is refused.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import EMBEDDED_MODEL, ModelParts, load_model
from cytosyn_aug.model.hub import ENCODER_PATTERNS, announce_licence, find_folder

_KIND = "cytosyn_aug.TileGenerator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The arguments a model was loaded with; see `TileGenerator.from_pretrained`. No token.

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
    ) -> Origin:
        """Return these arguments, paths as text."""
        return cls(
            source=_text(source), encoder=_text(encoder), revision=revision, key_map=_text(key_map)
        )

    def located(self, token: str | None = None) -> Origin:
        """Return the same on this machine's disk, as absolute paths; fetches what is not there.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, ValueError: See
                `cytosyn_aug.model.hub.find_folder`.
        """
        source, encoder = self.source, self.encoder
        if source is not None:
            source = _absolute(find_folder(source, revision=self.revision, token=token))
        if encoder is not None and encoder != "auto":
            is_file = Path(encoder).is_file()
            found = Path(encoder) if is_file else find_folder(
                encoder, token=token, patterns=ENCODER_PATTERNS
            )  # fmt: skip
            encoder = _absolute(found)
        key_map = None if self.key_map is None else _absolute(Path(self.key_map))
        return Origin(source=source, encoder=encoder, key_map=key_map)

    def is_here(self) -> bool:
        """Return whether all paths of a located origin exist on this machine."""
        paths = [self.source, None if self.encoder == "auto" else self.encoder, self.key_map]
        return all(Path(p).exists() for p in paths if p is not None)

    def load(self, dtype: torch.dtype) -> ModelParts:
        """Return the parts of a located origin."""
        folder = EMBEDDED_MODEL if self.source is None else self.source
        return load_model(folder, encoder=self.encoder, key_map=self.key_map, dtype=dtype)

    def announce_licences(self, located: Origin) -> None:
        """Say under which licence the weights are, where their folders tell."""
        for given, place in ((self.source, located.source), (self.encoder, located.encoder)):
            if given is not None and place is not None and Path(place).is_dir():
                announce_licence(given, Path(place))


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorHandle:
    """All of a TileGenerator but its weights; it can be pickled and written as JSON.

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

    origin: Origin
    located: Origin
    digest: str
    device: str
    dtype: str
    batch_size: int
    tile: TileSpec
    has_encoder: bool

    @classmethod
    def of(
        cls, parts: ModelParts, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> GeneratorHandle:
        """Return the handle of parts that were just loaded, from their folder as a whole."""
        folder = None if parts.folder is None else _absolute(parts.folder)
        return cls(
            origin=Origin(source=folder),
            located=Origin(source=folder),
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
            FileNotFoundError, PermissionError, ConnectionError: The model is not to be found.
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

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return the handle as JSON holds it."""
        return {"kind": _KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> GeneratorHandle:
        """Invert `to_dict`.

        Raises:
            ValueError: Not the dictionary of a handle.
        """
        fields = {k: v for k, v in content.items() if k != "kind"}
        if content.get("kind") != _KIND or fields.keys() != set(cls.__dataclass_fields__):
            raise ValueError(f"got a dictionary with {sorted(content)}, expected one of {_KIND}")
        origins = {k: Origin(**fields[k]) for k in ("origin", "located")}
        return cls(**fields | origins | {"tile": TileSpec(**fields["tile"])})


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
