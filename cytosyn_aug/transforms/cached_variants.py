"""CachedVariants: edited tiles looked up inside DataLoader workers, with no network there.

A cache of images gives the edited tile itself. A cache of latents, 24 times smaller, works in two
steps: the worker returns a `LatentVariant` for every tile, and `CachedVariants.decode` turns the
collated batch into images on the device, in the training process.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.cache.diagnosis import explain_miss
from cytosyn_aug.cache.encodings import check_model
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.images import (
    check_image,
    num_tiles,
    open_tiles,
    pixels_to_images,
    tile_key,
)
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.transforms.draws import DrawScope
from cytosyn_aug.transforms.sample_metadata import NO_METADATA, SampleMetadata
from cytosyn_aug.transforms.schedules import Probability
from cytosyn_aug.transforms.tile_transform import TileTransform
from cytosyn_aug.transforms.worker_state import SharedCount


class LatentVariant(NamedTuple):
    """What a worker returns for a tile; `default_collate` stacks it, `CachedVariants.decode` reads.

    Attributes:
        image: uint8 or float [..., 3, H, W], the tile as it came; a PIL image as uint8.
        latents: float16 [..., C, h, w], whitened; zeros where no variant was drawn.
        is_variant: bool [...], whether the latents replace the image.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import DataLoader
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> edits = [ConditionedResample(generator, steps=2)]
        >>> cache = LatentCache.open(tempfile.mkdtemp(), variants_spec(generator, "latents", edits))
        >>> filled = fill_variants(generator, tiles, cache, edits)
        >>> variants = CachedVariants(cache, p=0.5)
        >>> loader = DataLoader([variants(tile) for tile in tiles], batch_size=2)
        >>> [variants.decode(generator, batch).shape for batch in loader]
        [torch.Size([2, 3, 224, 224])]
    """

    image: Tensor
    latents: Tensor
    is_variant: Tensor


class CachedVariants(TileTransform):
    """Replace a tile by one of its cached variants, drawn per tile; look-up only.

    Safe in DataLoader workers, forked or spawned. It goes before any transform that changes
    pixels, because tiles are found by theirs, uint8 or float of any type. With a cache of latents
    it goes last, gives a `LatentVariant` for every tile, and `decode` follows after collation.

    Does not support: filling the cache (`cytosyn_aug.transforms.variants`), and caches of moments.

    Args:
        cache: Filled by `fill_variants`.
        p: Probability that a tile is replaced; a `Ramp` over epochs, or one of them by class.
        on_miss: "raise" names the tile and why it is not there; "keep" leaves the tile as it is,
            warns once, and counts in `num_missed`.
        mode: "tile" or "slide", which gives all tiles of a slide the same variant in an epoch, or
            none, and then samples carry the name of the slide under "slide".
            Where a variant is one laboratory (a `StainNormalize` each), a slide has one stain.
        seed: Of the draws of mode "slide".
        allow_geometry_change: Accept masks and boxes although the cache's variants moved
            structure.

    Example:
        >>> import tempfile
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> edits = [StainNormalize(generator, StainReference.fit(generator, tiles[:1]))]
        >>> with LatentCache.open(
        ...     tempfile.mkdtemp(), variants_spec(generator, "images", edits)
        ... ) as cache:
        ...     fill_variants(generator, tiles, cache, edits)
        Filled(num_filled=2, num_failed=0)
        >>> torch.equal(CachedVariants(cache, p=1.0)(tiles), edits[0](tiles))
        True
    """

    def __init__(
        self,
        cache: LatentCache,
        p: Probability = 0.5,
        *,
        on_miss: Literal["raise", "keep"] = "raise",
        mode: DrawScope = "tile",
        seed: int = 0,
        allow_geometry_change: bool = False,
    ) -> None:
        keeps_structure = cache.spec.keeps_structure or allow_geometry_change
        super().__init__(p=p, keeps_structure=keeps_structure, mode=mode, seed=seed)
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
        self.is_latent = "latents" in names
        self._missed = SharedCount()

    @property
    def num_missed(self) -> int:
        """Tiles, in all workers, that were not in the cache and came back as they were."""
        return self._missed.total()

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw also the variant of every tile."""
        params, sources = self._draw_tiles(num_tiles(flat_inputs[0]), metadata)
        num_variants = self.cache.spec.num_variants
        drawn = [
            int(torch.randint(num_variants, (), generator=source, device="cpu"))
            for source in sources
        ]
        return params | {"variants": drawn}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Look an image up; of a cache of latents, return a `LatentVariant`.

        Not by way of the float32 grey levels of other transforms, which take longer than the
        look-up itself.
        """
        index = [k for k, is_chosen in enumerate(params["chosen"]) if is_chosen]
        if not index and not self.is_latent:
            check_image(inpt)
            return inpt
        tiles, restore = open_tiles(inpt)
        is_edited = torch.zeros(len(tiles), dtype=torch.bool, device="cpu")
        payload: Tensor | None = None
        if index:
            chosen = tiles if len(index) == len(tiles) else tiles[index]
            is_edited[index], payload = self._look_up(chosen, index, params)
        if self.is_latent:
            image = inpt.as_subclass(Tensor) if isinstance(inpt, Tensor) else tiles[0]
            return self._latent_variant(image, index, payload, is_edited)
        if payload is None or not is_edited.any():
            return inpt  # nothing found may be of another size
        edited = payload.to(tiles.device)
        if len(index) < len(tiles):
            edited = tiles.clone()
            edited[index] = payload.to(tiles.device)
        return restore(edited, is_edited)

    def _latent_variant(
        self, image: Tensor, index: list[int], payload: Tensor | None, is_variant: Tensor
    ) -> LatentVariant:
        field = next(f for f in self.cache.spec.fields if f.name == "latents")
        shape, dtype = (len(is_variant), *field.shape), getattr(torch, field.dtype)
        latents = torch.zeros(shape, dtype=dtype, device="cpu")
        if payload is not None:
            latents[index] = payload
        lead = image.shape[:-3]
        return LatentVariant(image, latents.view(*lead, *field.shape), is_variant.view(lead))

    def _look_up(
        self, tiles: Tensor, index: list[int], params: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return which tiles a variant was found for, bool [n], and the payload [n, ...]."""
        tiles = tiles.cpu()
        variants = [params["variants"][k] for k in index]
        records = self.cache.get([tile_key(tile) for tile in tiles], variants)
        if not records.is_found.all():
            self._miss(tiles, index, variants, records.is_found)
        payload = records.fields["latents" if self.is_latent else "images"]
        return records.is_found & records.fields["is_edited"].bool(), payload

    def _miss(self, tiles: Tensor, index: list[int], variants: list[int], is_found: Tensor) -> None:
        rows = (~is_found).nonzero()[:, 0].tolist()
        if self.on_miss == "raise" or not self.num_missed:
            first = rows[0]
            reason = explain_miss(self.cache, tiles[first], variants[first])
            sentence = (
                f"{len(rows)} of {len(tiles)} tiles are not in the cache {self.cache.folder}; tile "
                f"{index[first]}, variant {variants[first]}: {reason}"
            )
            if self.on_miss == "raise":
                raise ValueError(f"{sentence}; or pass on_miss='keep'")
            warnings.warn(sentence, stacklevel=2)
        self._missed.add(len(rows))

    def decode(
        self, generator: TileGenerator, batch: LatentVariant, *, is_few_step: bool = True
    ) -> Tensor:
        """Return the images of a collated batch, variants decoded on the generator's device.

        Args:
            generator: The model that the cache was filled with.
            batch: Of `default_collate`.
            is_few_step: Use the model's small decoder, if it has one.

        Returns:
            Shape and dtype of `batch.image`, on the generator's device. Tiles whose decoded
            variant is not finite are `batch.image`'s own; `num_failed` counts them.

        Raises:
            TypeError: Not a `LatentVariant`.
            ValueError: The generator is another model than that of the cache.
        """
        if not isinstance(batch, LatentVariant):
            raise TypeError(
                f"got a {type(batch).__name__}, expected a LatentVariant, which default_collate "
                "keeps; of a sample that holds more pass that part, as batch['image']"
            )
        check_model(generator, self.cache)
        image = batch.image.to(generator.device)
        if not batch.is_variant.any():
            return image
        rows = batch.is_variant.flatten().nonzero()[:, 0]
        latents = batch.latents.reshape(-1, *batch.latents.shape[-3:])
        latents = latents[rows.to(latents.device)]
        pixels = generator.decode_pixels(latents.float(), is_few_step=is_few_step)
        is_finite = pixels.isfinite().flatten(1).all(1)
        rows = rows.to(image.device)
        out = image.reshape(-1, *image.shape[-3:]).clone()
        is_float = image.dtype.is_floating_point
        self._count_failed(out[rows] * (255.0 if is_float else 1), ~is_finite)
        decoded = pixels_to_images(pixels[is_finite])
        out[rows[is_finite]] = (decoded.float() / 255.0 if is_float else decoded).to(out)
        return out.view(image.shape)
