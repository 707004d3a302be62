"""Settings that travel with weights and results: frozen, with exact JSON and a digest.

No torch here, so that the command line can show its help without loading a network library.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Preserve = Literal["color", "none"]
Method = Literal["cytosyn", "macenko", "reinhard", "transport"]  # of normalisation
Json = dict[str, Any]  # Any: whatever a JSON object holds
Triple = tuple[float, float, float]
# Folders of a model folder; the first two make a model, the others are optional.
PART_NAMES = ("transformer", "vae", "encoder", "stain_probe", "student", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSpec:
    """Tiles a model was trained on: side in pixels and scale in microns per pixel."""

    size_px: int = 224
    mpp: float = 0.5

    def __post_init__(self) -> None:
        if self.size_px < 8 or self.size_px % 8:
            raise ValueError(f"size_px is {self.size_px}, expected a positive multiple of 8")
        if not 0 < self.mpp < 100:
            raise ValueError(f"mpp is {self.mpp}, expected microns per pixel, such as 0.5")

    def describe(self) -> str:
        """Return the specification as text for messages: `224 px at 0.5 microns/pixel`."""
        return f"{self.size_px} px at {self.mpp:g} microns/pixel"


def config_json(config: object) -> str:
    """Return a configuration dataclass as canonical JSON, all fields, sorted keys."""
    return json.dumps(asdict(config), sort_keys=True)  # type: ignore[call-overload]


def config_digest(config: object) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over `config_json`."""
    return hashlib.sha256(config_json(config).encode()).hexdigest()[:16]
