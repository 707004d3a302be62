"""StainReference: the stain of a laboratory as a model sees it, fitted once and saved.

Saved as a small JSON file with a safetensors file beside it. Both carry the digest of the model
they were fitted with, because features and latents of another model mean something else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import Json, TileSpec
from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.io.json_files import FORMAT_VERSION, check_kind, from_json, read_json, to_json
from cytosyn_aug.io.tile_source import MAX_TILES, TileSource, read_tiles
from cytosyn_aug.model.conditions import Conditions, check_finite, read_conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import MIN_TISSUE, DensityMoments, pool_moments, tissue_moments

_KIND = "cytosyn_aug.StainReference"


@dataclass(frozen=True, kw_only=True, eq=False)
class StainReference:
    """Features and colour of a set of tiles from one laboratory or slide.

    Attributes:
        model_digest: Digest of the model it was fitted with.
        tile: Size and scale of the tiles.
        cls: float32 [N, D], features of the tissue tiles; D = 0 without an encoder.
        moments: Tissue optical density of each tile.
        laboratory: Name of the laboratory; references of equal name are drawn as one.

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
    laboratory: str = ""

    @classmethod
    @isolated()
    def fit(
        cls,
        generator: TileGenerator,
        tiles: TileSource,
        *,
        max_tiles: int = MAX_TILES,
        features: Conditions | None = None,
        laboratory: str = "",
    ) -> StainReference:
        """Fit a reference to tiles.

        Args:
            generator: The model whose features describe the stain.
            tiles: uint8 [N, 3, size, size], a folder of tile images of that size (searched
                recursively), a slide, or several of these two. Blank tiles are left out.
            max_tiles: Of a larger folder or slide, so many evenly spaced tiles are read.
            features: Precomputed CLS vectors of the tiles, one per row; without them and without an
                encoder the reference holds colour only, which restaining can do with.
            laboratory: Name of the laboratory the tiles come from.

        Raises:
            ValueError: No tissue in any tile, tiles of another size, an empty folder, a slide that
                cannot be read, or features that are not finite.
            FileNotFoundError: The folder or slide does not exist.
        """
        images = read_tiles(tiles, generator.tile, max_tiles)
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
            laboratory=laboratory,
        )

    def pooled(self) -> StainReference:
        """Return the reference as if of a single tile, a few kilobytes: all that restaining reads.

        The stain probe is linear, so features may be averaged before it; results change by less
        than a grey level. Pooling twice changes nothing.
        """
        cls = self.cls.double().mean(0, keepdim=True).float()
        moments = pool_moments(DensityMoments(*self.moments))
        return replace(self, cls=cls, moments=moments)

    def save(self, file: Path | str) -> None:
        """Write `<name>.json` and `<name>.safetensors`; the JSON file comes last.

        Raises:
            ValueError: The name does not end in .json.
        """
        file = _json_path(file)
        weights = file.with_suffix(".safetensors")
        temporary = weights.with_name(f".{weights.name}.tmp")
        save_file(self._tensors(), temporary)
        temporary.replace(weights)
        header = {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "model_digest": self.model_digest,
            "tile": to_json(self.tile),
            "laboratory": self.laboratory,
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
        header = check_kind(read_json(file, "fit and save it again"), _KIND, str(file))
        weights = file.parent / header["tensors"]
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing; copy it together with {file.name}")
        try:
            return cls._from_tensors(header, load_file(weights))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{weights} is corrupt ({error}); fit and save it again") from error

    @classmethod
    def _from_tensors(cls, header: Json, tensors: dict[str, Tensor]) -> StainReference:
        return cls(
            model_digest=header["model_digest"],
            tile=from_json(TileSpec, header["tile"]),
            cls=tensors["cls"],
            moments=DensityMoments(
                tensors["density_mean"], tensors["density_covariance"], tensors["tissue"]
            ),
            laboratory=header.get("laboratory", ""),
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "cls": self.cls,
            "density_mean": self.moments.mean,
            "density_covariance": self.moments.covariance,
            "tissue": self.moments.tissue,
        }
        return {k: v.contiguous() for k, v in tensors.items()}

    def to_dict(self) -> Json:
        """Return all of the reference as JSON holds it, tensors as base64: about 100 KB."""
        content = base64.b64encode(save(self._tensors())).decode()
        return {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "model_digest": self.model_digest,
            "tile": to_json(self.tile),
            "laboratory": self.laboratory,
            "tensors": content,
        }

    @classmethod
    def from_dict(cls, content: Json) -> StainReference:
        """Invert `to_dict`."""
        check_kind(content, _KIND, "the dictionary")
        tensors = load(base64.b64decode(content["tensors"]))
        return cls._from_tensors(content, tensors)

    def check_model(self, generator: TileGenerator) -> None:
        """Raise unless the reference was fitted with this very model."""
        if self.model_digest != generator.digest:
            raise ValueError(
                f"the reference was fitted with model {self.model_digest}, this generator is "
                f"{generator.digest}; fit it again with StainReference.fit(generator, tiles)"
            )


def list_references(given: object) -> list[StainReference]:
    """Return the references a transform is given as a list, read once: it may be a generator.

    Raises:
        TypeError: A single reference, or what holds or names something else.
    """
    if isinstance(given, StainReference):
        raise TypeError(
            "references is a single StainReference, expected a list; pass references=[reference]"
        )
    if isinstance(given, Mapping):
        raise TypeError(
            f"references is a {type(given).__name__}, expected a list of StainReference; pass "
            "list(references.values()), and name laboratories with "
            "StainReference.fit(..., laboratory=...)"
        )
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"references is a {type(given).__name__}, expected a list of StainReference; read a "
            "saved one with StainReference.load(file), and pass references=[reference]"
        )
    listed = list(given)
    for k, reference in enumerate(listed):
        check_reference(f"references[{k}]", reference)
    return listed


def check_reference(name: str, value: object) -> None:
    """Raise TypeError unless an argument of this name is a StainReference."""
    if not isinstance(value, StainReference):
        raise TypeError(
            f"{name} is a {type(value).__name__}, expected a StainReference; fit one with "
            "StainReference.fit(generator, tiles), or read one with StainReference.load(file)"
        )


def _features(generator: TileGenerator, images: Tensor, given: Conditions | None) -> Tensor:
    if given is None:
        if generator.encoder is None:
            return torch.zeros(len(images), 0)
        cls = generator.cls_features(images).cpu()
        if not cls.isfinite().all():
            raise ValueError(
                f"the encoder's features of the tiles are not finite in {generator.dtype}; load "
                "the model with dtype=torch.bfloat16 or torch.float32"
            )
        return cls
    cls = read_conditions(given, len(generator.null_condition), len(images))
    check_finite(cls)
    return cls


def _json_path(file: Path | str) -> Path:
    file = Path(file)
    if file.suffix != ".json":
        raise ValueError(f"a StainReference is saved as .json, got {file.name!r}")
    return file
