"""Networks that each stage builds on, by name, and the folders that they are read from.

No torch here: the command line names what is missing before it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAINED = ("vae", "encoder", "sit", "repae", "distil", "decoder")
"""Stages that train a network, in the order in which a model is built."""

NEEDED = {
    "latents": ("vae", "encoder"),
    "sit": ("vae", "encoder", "latents"),
    "repae": ("vae", "encoder"),
    "distil": ("vae", "encoder", "latents", "teacher"),
    "decoder": ("vae",),
    "export": ("vae", "encoder", "sit"),
}
"""What a stage cannot do without, besides tiles."""

OPTIONAL = {"repae": ("sit", "latents"), "export": ("student", "decoder")}
"""What a stage makes use of where it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInputs:
    """Run folders or model folders that a stage takes its networks from.

    Attributes:
        recipe: Name before the underscore in `training.recipes`; runs are shaped by it.
        vae: Autoencoders, whose weights are averaged.
        encoder: Also a folder or safetensors file of H0-mini under timm's names.
        latents: Folder that the latents stage wrote.
        sit: Transformer.
        teacher: Transformer that is distilled.
        student: Few-step transformer.
        decoder: Small decoder.
    """

    recipe: str
    vae: tuple[Path, ...] = ()
    encoder: Path | None = None
    latents: Path | None = None
    sit: Path | None = None
    teacher: Path | None = None
    student: Path | None = None
    decoder: Path | None = None
