"""CachedVariants: edited tiles looked up inside DataLoader workers, with no network there.

A cache of images gives the edited tile itself. A cache of latents, 24 times smaller, works in two
steps: the worker returns a `LatentVariant` for every tile, and `CachedVariants.decode` turns the
collated batch into images on the device, in the training process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

from cytosyn_aug.cache import LatentCache
from cytosyn_aug.filling import check_model
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.images import tile_key
from cytosyn_aug.misses import explain_miss
from cytosyn_aug.transforms import _is_image, _open_image, _TileTransform


class LatentVariant(NamedTuple):
    """What a worker returns for a tile; `default_collate` stacks it, `CachedVariants.decode` reads.

    Attributes:
        image: uint8 or float [..., 3, H, W], the tile as it came; a PIL image as uint8.
        latents: float16 [..., C, h, w], whitened; zeros where no variant was drawn.
        is_variant: bool [...], whether the latents replace the image.
    """

    image: Tensor
    latents: Tensor
    is_variant: Tensor


class CachedVariants(_TileTransform):
    """Replace a tile by one of its cached variants, drawn per tile; look-up only.

    Safe in DataLoader workers, forked or spawned. It goes before any transform that changes
    pixels, because tiles are found by theirs. With a cache of latents it goes last, gives a
    `LatentVariant` for every tile, and `decode` follows after collation.

    Does not support: filling the cache (`cytosyn_aug.filling`), and caches of moments.

    Args:
        cache: Filled by `fill_variants`.
        p: Probability that a tile is replaced.
        on_miss: "raise" names the tile and why it is not there; "keep" leaves the tile as it is,
            warns once, and counts in `num_missed` of the worker.
        allow_geometry_change: Accept masks and boxes although the cache's variants moved
            structure.

    Example:
        >>> import tempfile
        >>> from cytosyn_aug.filling import fill_variants, variants_spec
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> spec = variants_spec(generator, "images", num_variants=1, recipe="inverted")
        >>> with LatentCache.open(tempfile.mkdtemp(), spec) as cache:
        ...     fill_variants(generator, tiles, cache, [lambda images, seeds: 255 - images])
        2
        >>> torch.equal(CachedVariants(cache, p=1.0)(tiles), 255 - tiles)
        True
    """

    def __init__(
        self,
        cache: LatentCache,
        p: float = 0.5,
        *,
        on_miss: Literal["raise", "keep"] = "raise",
        allow_geometry_change: bool = False,
    ) -> None:
        super().__init__(p=p, keeps_structure=cache.spec.keeps_structure or allow_geometry_change)
        names = cache.spec.names
        if "is_edited" not in names:
            raise ValueError(
                f"{cache.folder} holds {', '.join(names)}, expected variants, images or latents; "
                "fill one made with variants_spec"
            )
        if on_miss not in ("raise", "keep"):
            raise ValueError(f"on_miss is {on_miss!r}, expected 'raise' or 'keep'")
        self.cache = cache
        self.on_miss = on_miss
        self.num_missed = 0
        self.is_latent = "latents" in names

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw also the variant of every tile."""
        params = super().make_params(flat_inputs)
        num = len(params["seeds"])
        params["variants"] = torch.randint(0, self.cache.spec.num_variants, (num,)).tolist()
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Look an image up; pass everything else by identity."""
        if not _is_image(inpt) or not (self.is_latent or params["chosen"].any()):
            return inpt
        tiles, restore = _open_tiles(inpt)
        index = params["chosen"].nonzero()[:, 0]
        if self.is_latent:
            return self._latent_variant(inpt, tiles, index, params)
        is_edited, images = self._look_up(tiles[index.to(tiles.device)], index, params)
        out = tiles.clone()
        out[index[is_edited].to(tiles.device)] = images[is_edited].to(tiles)
        return restore(out)

    def _latent_variant(
        self, inpt: Any, tiles: Tensor, index: Tensor, params: dict[str, Any]
    ) -> LatentVariant:
        image = inpt.as_subclass(Tensor) if isinstance(inpt, Tensor) else tiles[0]
        field = next(f for f in self.cache.spec.fields if f.name == "latents")
        latents = torch.zeros(len(tiles), *field.shape, dtype=getattr(torch, field.dtype))
        is_variant = torch.zeros(len(tiles), dtype=torch.bool)
        if len(index):
            is_edited, found = self._look_up(tiles[index.to(tiles.device)], index, params)
            latents[index], is_variant[index] = found, is_edited
        lead = image.shape[:-3]
        return LatentVariant(image, latents.view(*lead, *field.shape), is_variant.view(lead))

    def _look_up(
        self, tiles: Tensor, index: Tensor, params: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return which tiles a variant was found for, bool [n], and the payload [n, ...]."""
        tiles = (tiles if tiles.dtype == torch.uint8 else tiles.round().to(torch.uint8)).cpu()
        variants = [params["variants"][k] for k in index.tolist()]
        records = self.cache.get([tile_key(tile) for tile in tiles], variants)
        if not records.is_found.all():
            self._miss(tiles, index, variants, records.is_found)
        payload = records.fields["latents" if self.is_latent else "images"]
        return records.is_found & records.fields["is_edited"].bool(), payload

    def _miss(self, tiles: Tensor, index: Tensor, variants: list[int], is_found: Tensor) -> None:
        rows = (~is_found).nonzero()[:, 0].tolist()
        if self.on_miss == "raise" or not self.num_missed:
            first = rows[0]
            reason = explain_miss(self.cache, tiles[first], variants[first])
            sentence = (
                f"{len(rows)} of {len(tiles)} tiles are not in the cache {self.cache.folder}; tile "
                f"{int(index[first])}, variant {variants[first]}: {reason}"
            )
            if self.on_miss == "raise":
                raise ValueError(f"{sentence}; or pass on_miss='keep'")
            warnings.warn(sentence, stacklevel=2)
        self.num_missed += len(rows)

    def decode(
        self, generator: TileGenerator, batch: LatentVariant, *, is_few_step: bool = True
    ) -> Tensor:
        """Return the images of a collated batch, variants decoded on the generator's device.

        Args:
            generator: The model that the cache was filled with.
            batch: Of `default_collate`.
            is_few_step: Use the model's small decoder, if it has one.

        Returns:
            Shape and dtype of `batch.image`, on the generator's device.

        Raises:
            ValueError: The generator is another model than that of the cache.
        """
        check_model(generator, self.cache)
        image = batch.image.to(generator.device)
        if not batch.is_variant.any():
            return image
        rows = batch.is_variant.flatten().nonzero()[:, 0]
        latents = batch.latents.reshape(-1, *batch.latents.shape[-3:])
        latents = latents[rows.to(latents.device)]
        made = generator.decode(latents.float(), is_few_step=is_few_step)
        out = image.reshape(-1, *image.shape[-3:]).clone()
        if image.dtype.is_floating_point:
            made = made.float() / 255.0
        out[rows.to(out.device)] = made.to(out)
        return out.view(image.shape)


def _open_tiles(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return tiles [B, 3, H, W] in grey levels and the function that goes back to the input's type.

    Images of bytes stay bytes, unlike in other transforms: their look-up would take half as long
    again. The others come as float32.

    Raises:
        TypeError, ValueError: See `_open_image`.
    """
    if isinstance(image, PIL.Image.Image) and image.mode == "RGB":
        # By bands, because Pillow turns channels about faster than torch and numpy do.
        tile = torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))[None]
        return tile, lambda x: PIL.Image.merge(
            "RGB", [PIL.Image.fromarray(b) for b in x[0].numpy()]
        )
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[-3:-2] == (3,):
        plain = image.as_subclass(Tensor)

        def restore(x: Tensor) -> Any:
            x = x.reshape(plain.shape)
            return tv_tensors.wrap(x, like=image) if isinstance(image, tv_tensors.Image) else x

        return plain.reshape(-1, *plain.shape[-3:]), restore
    return _open_image(image)
