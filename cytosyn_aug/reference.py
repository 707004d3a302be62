"""What a laboratory's stain looks like to a model: fitted once, saved, used by every transform.

Saved as a small JSON file with a safetensors file beside it. Both carry the digest of the model
they were fitted with, because features and latents of another model mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytosyn_aug.conditions import Conditions, read_conditions
from cytosyn_aug.config import TileSpec
from cytosyn_aug.files import write_atomically
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.stain import MIN_TISSUE, DensityMoments, tissue_moments

FORMAT_VERSION = 1
TILE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff")
MAX_TILES = 64
_KIND = "cytosyn_aug.StainReference"


@dataclass(frozen=True, kw_only=True, eq=False)
class StainReference:
    """Features and colour of a set of tiles from one laboratory or slide.

    Attributes:
        model_digest: Digest of the model it was fitted with.
        tile: Size and scale of the tiles.
        cls: float32 [N, D], features of the tissue tiles; D = 0 without an encoder.
        moments: Tissue optical density of each tile.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=4, steps=4, seed=0)
        >>> StainReference.fit(generator, tiles).cls.shape[1]
        192
    """

    model_digest: str
    tile: TileSpec
    cls: Tensor
    moments: DensityMoments

    @classmethod
    def fit(
        cls,
        generator: TileGenerator,
        tiles: Tensor | Path | str,
        *,
        max_tiles: int = MAX_TILES,
        features: Conditions | None = None,
    ) -> StainReference:
        """Fit a reference to tiles.

        Args:
            generator: The model whose features describe the stain.
            tiles: uint8 [N, 3, size, size], or a folder of tile images of that size (searched
                recursively). Blank tiles are left out.
            max_tiles: Of a larger folder, so many evenly spaced tiles are read.
            features: Precomputed CLS vectors of the tiles, one a row; without them and without an
                encoder the reference holds colour only, which restaining can do with.

        Raises:
            ValueError: No tissue in any tile, tiles of another size, or an empty folder.
            FileNotFoundError: The folder does not exist.
        """
        images = tiles if isinstance(tiles, Tensor) else _read_folder(Path(tiles), max_tiles)
        generator.check_images(images)
        moments = tissue_moments(images)
        has_tissue = moments.tissue >= MIN_TISSUE
        if not has_tissue.any():
            raise ValueError(
                f"none of the {len(images)} tiles holds tissue (at least {MIN_TISSUE:.0%} of the "
                "area); fit the reference to tiles with tissue"
            )
        return cls(
            model_digest=generator.digest,
            tile=generator.tile,
            cls=_features(generator, images, features)[has_tissue.cpu()],
            moments=DensityMoments(*(m[has_tissue].cpu() for m in moments)),
        )

    def save(self, file: Path | str) -> None:
        """Write `<name>.json` and `<name>.safetensors`; the JSON file comes last.

        Raises:
            ValueError: The name does not end in .json.
        """
        file = _json_path(file)
        tensors = {
            "cls": self.cls,
            "density_mean": self.moments.mean,
            "density_covariance": self.moments.covariance,
            "tissue": self.moments.tissue,
        }
        weights = file.with_suffix(".safetensors")
        temporary = weights.with_name(f".{weights.name}.tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(weights)
        header = {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "model_digest": self.model_digest,
            "tile": {"size_px": self.tile.size_px, "mpp": self.tile.mpp},
            "num_tiles": len(self.cls),
            "tensors": weights.name,
        }
        write_atomically(file, json.dumps(header, indent=2).encode())

    @classmethod
    def load(cls, file: Path | str) -> StainReference:
        """Read a saved reference.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: Not a reference, of another version, or corrupt.
        """
        file = _json_path(file)
        try:
            header = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is not valid JSON ({error}); fit and save it again"
            ) from error
        if not isinstance(header, dict) or header.get("kind") != _KIND:
            raise ValueError(f"{file} is not a StainReference; give the .json that save() wrote")
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {header.get('format_version')}, this release reads "
                f"{FORMAT_VERSION}; fit and save it again"
            )
        weights = file.parent / header["tensors"]
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing; copy it together with {file.name}")
        try:
            tensors = load_file(weights)
            moments = DensityMoments(
                tensors["density_mean"], tensors["density_covariance"], tensors["tissue"]
            )
            found = tensors["cls"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{weights} is corrupt ({error}); fit and save it again") from error
        return cls(
            model_digest=header["model_digest"],
            tile=TileSpec(**header["tile"]),
            cls=found,
            moments=moments,
        )

    def check_model(self, generator: TileGenerator) -> None:
        """Raise unless the reference was fitted with this very model."""
        if self.model_digest != generator.digest:
            raise ValueError(
                f"the reference was fitted with model {self.model_digest}, this generator is "
                f"{generator.digest}; fit it again with StainReference.fit(generator, tiles)"
            )


def _features(generator: TileGenerator, images: Tensor, given: Conditions | None) -> Tensor:
    if given is None:
        if generator.encoder is None:
            return torch.zeros(len(images), 0)
        return generator.features(images).cls.cpu()
    return read_conditions(given, len(generator.null_condition), len(images))


def _json_path(file: Path | str) -> Path:
    file = Path(file)
    if file.suffix != ".json":
        raise ValueError(f"a StainReference is saved as .json, got {file.name!r}")
    return file


def _read_folder(folder: Path, max_tiles: int) -> Tensor:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a folder of tiles or a tensor")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in TILE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no tiles; expected {', '.join(TILE_SUFFIXES)} files")
    step = max(1, len(files) / max_tiles)
    chosen = [files[int(i * step)] for i in range(min(len(files), max_tiles))]
    return torch.stack(list(_read_tiles(chosen)))


def _read_tiles(files: list[Path]) -> Iterator[Tensor]:
    first: tuple[int, int] | None = None
    for file in files:
        with Image.open(file) as image:
            first = first or image.size
            if image.size != first:
                raise ValueError(
                    f"{file} is {image.size[0]}x{image.size[1]} px, the tiles before it are "
                    f"{first[0]}x{first[1]}; give tiles of one size"
                )
            array = np.array(image.convert("RGB"))
        yield torch.from_numpy(array).permute(2, 0, 1)
