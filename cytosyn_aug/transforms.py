"""torchvision v2 transforms over a tile generator: stain transfer, normalisation, resampling.

Everything random is drawn per sample in `make_params`, from torch's generator; `transform` is
pure. PIL images, uint8 and float tensors and tv_tensors come out as they went in, single or
batched. Masks, boxes and key points pass by identity when the edit keeps structure, and are
refused when it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from cytosyn_aug.config import Preserve
from cytosyn_aug.editing import EditRecipe, redraw, resample, stain_change
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.reference import StainReference
from cytosyn_aug.stain import apply_density_map, blend_with_identity

_STRUCTURE = (tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)
_MAX_SEED = 2**62


class _TileTransform(v2.Transform):
    """What the transforms share: finding images, drawing per sample, types out = types in."""

    def __init__(self, *, p: float, keeps_structure: bool) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}, expected a probability between 0 and 1")
        self.p = p
        self.keeps_structure = keeps_structure

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse samples that this transform would make wrong."""
        images = [x for x in flat_inputs if _is_image(x)]
        if not images:
            names = sorted({type(x).__name__ for x in flat_inputs})
            raise TypeError(f"got no image among {names}; pass a PIL image or an image tensor")
        moved = [type(x).__name__ for x in flat_inputs if isinstance(x, _STRUCTURE)]
        if moved and not self.keeps_structure:
            raise ValueError(
                f"{type(self).__name__} moves structure, and the sample carries {moved}; drop "
                "them, keep structure, or pass allow_geometry_change=True"
            )
        sizes = {_num_tiles(x) for x in images}
        if 0 in sizes:
            raise ValueError("got an empty batch, expected at least one tile")
        if len(sizes) > 1:
            raise ValueError(f"images of one sample differ in batch size: {sorted(sizes)}")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw, for every tile of the sample, whether it is edited and with which seed."""
        num = _num_tiles(next(x for x in flat_inputs if _is_image(x)))
        chosen = torch.rand(num) < self.p
        seeds = torch.randint(0, _MAX_SEED, (num,)).tolist()
        return {"chosen": chosen, "seeds": seeds}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Edit an image; pass everything else by identity."""
        if not _is_image(inpt) or not params["chosen"].any():
            return inpt
        grey, restore = _open_image(inpt)
        index = params["chosen"].nonzero()[:, 0]
        edited = self._edit(grey[index.to(grey.device)], index, params)
        out = grey.clone()
        out[index.to(grey.device)] = edited.to(grey)
        return restore(out)

    def _edit(self, grey: Tensor, index: Tensor, params: dict[str, Any]) -> Tensor:
        """Edit float32 grey levels [n, 3, H, W] in 0 to 255; rows are `index` of the sample."""
        raise NotImplementedError


class StainTransfer(_TileTransform):
    """Restain tiles to another laboratory, keeping every nucleus where it is.

    A reference is drawn per tile. With `preserve="color"` the colour change, estimated on the
    centre of the image at the model's size and scale, is applied to the original pixels, for any
    image size; with "none" the recoloured tile is drawn anew by the diffusion model (texture and
    sharpness change too, tiles must have the model's size, and samples with masks are refused
    unless `allow_geometry_change`). Blank tiles come back unchanged.

    Does not support: grey-scale, RGBA and 16-bit images; float images outside [0, 1].

    Args:
        generator: The model.
        references: Laboratories to choose from.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        p: Probability that a tile is restained.
        recipe: How the model edits.
        features: Gives CLS vectors [B, D] of uint8 tiles at the model's size and scale, such as
            `features_cached`; None asks the encoder. Not asked where `source` is given.
        allow_geometry_change: Accept masks and boxes although structure may move.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=4, steps=4, seed=0)
        >>> transfer = StainTransfer(generator, [StainReference.fit(generator, tiles)], p=1.0)
        >>> transfer(tiles).shape
        torch.Size([4, 3, 224, 224])
    """

    def __init__(
        self,
        generator: TileGenerator,
        references: Sequence[StainReference],
        *,
        source: StainReference | None = None,
        strength: float = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        p: float = 0.5,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        if preserve not in ("color", "none"):
            raise ValueError(f"preserve is {preserve!r}, expected 'color' or 'none'")
        if not references:
            raise ValueError("references is empty; fit at least one StainReference")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}, expected 0 to 1")
        for reference in (*references, *([source] if source is not None else [])):
            reference.check_model(generator)
        if preserve == "none" and generator.encoder is None:
            raise ValueError(
                "preserve='none' draws tiles from the features of their new colours, and this "
                'model was loaded without an encoder; load it with encoder="bioptimus/H0-mini" or '
                "use preserve='color'"
            )
        keeps_structure = preserve == "color" or allow_geometry_change
        super().__init__(p=p, keeps_structure=keeps_structure)
        self.generator = generator
        self.references = list(references)
        self.source = source
        self.features = features
        self.strength = strength
        self.preserve = preserve
        self.mpp = mpp
        self.recipe = recipe if recipe is not None else EditRecipe()
        _check_scale(generator, mpp)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw also the reference of every tile."""
        params = super().make_params(flat_inputs)
        num = len(params["seeds"])
        params["references"] = torch.randint(0, len(self.references), (num,)).tolist()
        return params

    def _edit(self, grey: Tensor, index: Tensor, params: dict[str, Any]) -> Tensor:
        edited = torch.empty_like(grey)
        drawn = [params["references"][i] for i in index.tolist()]
        for number in sorted(set(drawn)):
            rows = torch.tensor([k for k, d in enumerate(drawn) if d == number])
            seeds = [params["seeds"][int(index[k])] for k in rows]
            edited[rows.to(grey.device)] = self._restain(
                grey[rows.to(grey.device)], self.references[number], seeds
            )
        return edited

    def _restain(self, grey: Tensor, reference: StainReference, seeds: list[int]) -> Tensor:
        if self.preserve == "none":
            self.generator.check_images(grey.round().to(torch.uint8))
        tiles = _model_tiles(grey, self.mpp, self.generator)
        ask = self.features if self.source is None else None
        cls = None if ask is None else ask(tiles)
        estimate = stain_change(self.generator, tiles, reference, self.source, self.recipe, cls)
        strength = torch.full((len(grey),), self.strength, device=grey.device)
        recoloured = apply_density_map(grey, blend_with_identity(estimate.change, strength))
        if self.preserve == "none":
            tiles = recoloured.round().to(torch.uint8)
            recoloured = redraw(self.generator, tiles, self.recipe, seeds).to(grey)
        return torch.where(estimate.is_tissue[:, None, None, None], recoloured, grey)


class StainNormalize(StainTransfer):
    """Restain every tile to one reference, the same way every time.

    StainTransfer with one reference, probability 1 and a fixed seed. For tiles of one slide give
    `source`, fitted to tiles of that slide, so that neighbouring tiles are changed alike.

    Args:
        generator: The model.
        reference: Laboratory to normalise to.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        strength: 1 goes to the reference, 0 stays.
        preserve: "color" or "none".
        mpp: Scale of the images in microns per pixel.
        recipe: How the model edits.
        features: See `StainTransfer`.
        seed: Seed of the model's noise, for every tile.
    """

    def __init__(
        self,
        generator: TileGenerator,
        reference: StainReference,
        *,
        source: StainReference | None = None,
        strength: float = 1.0,
        preserve: Preserve = "color",
        mpp: float = 0.5,
        recipe: EditRecipe | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            generator,
            [reference],
            source=source,
            strength=strength,
            preserve=preserve,
            mpp=mpp,
            p=1.0,
            recipe=recipe,
            features=features,
        )
        self.seed = seed

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose every tile, with the same seed; nothing is random."""
        num = _num_tiles(next(x for x in flat_inputs if _is_image(x)))
        chosen = torch.ones(num, dtype=torch.bool)
        return {"chosen": chosen, "seeds": [self.seed] * num, "references": [0] * num}


class ConditionedResample(_TileTransform):
    """Replace a tile by a new one with the same features.

    Structure is new: samples with masks or boxes are refused unless `allow_geometry_change`.
    A tile whose new version is less similar than `min_similarity` or more than `max_similarity`
    (a copy) comes back as it was, and is counted in `num_rejected`. Blank tiles come back too.

    Args:
        generator: The model.
        min_similarity: Least cosine similarity of the CLS features of old and new tile.
        max_similarity: Largest one.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance, in t <= 0.75 (1 = noise); 1 for none.
        p: Probability that a tile is replaced.
        features: Gives CLS vectors [B, D] of uint8 tiles [B, 3, size, size], such as a
            `FeatureTable`; None asks the model's encoder. A model without one cannot tell
            similarity, so it needs features and no bounds.
        allow_geometry_change: Accept masks and boxes although structure changes.
    """

    def __init__(
        self,
        generator: TileGenerator,
        *,
        min_similarity: float = -1.0,
        max_similarity: float = 1.0,
        steps: int | None = None,
        guidance_scale: float = 1.0,
        p: float = 0.3,
        features: Callable[[Tensor], Tensor] | None = None,
        allow_geometry_change: bool = False,
    ) -> None:
        super().__init__(p=p, keeps_structure=allow_geometry_change)
        self.generator = generator
        if not -1 <= min_similarity <= max_similarity <= 1:
            raise ValueError(
                f"similarities are {min_similarity} and {max_similarity}, expected "
                "-1 <= min_similarity <= max_similarity <= 1"
            )
        is_bounded = (min_similarity, max_similarity) != (-1.0, 1.0)
        if generator.encoder is None and (features is None or is_bounded):
            raise ValueError(
                "this model was loaded without an encoder: pass features (a FeatureTable of "
                "precomputed ones) and leave min_similarity and max_similarity alone, or load it "
                'with encoder="bioptimus/H0-mini"'
            )
        self.features = features
        self.min_similarity = min_similarity
        self.max_similarity = max_similarity
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.num_rejected = 0

    def _edit(self, grey: Tensor, index: Tensor, params: dict[str, Any]) -> Tensor:
        tiles = grey.round().to(torch.uint8)
        seeds = [params["seeds"][i] for i in index.tolist()]
        result = resample(
            self.generator,
            tiles,
            seeds,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            cls=None if self.features is None else self.features(tiles),
        )
        # Negated, since a similarity that nobody could tell is no reason to refuse.
        low, high = self.min_similarity, self.max_similarity
        accepted = ~((result.similarity < low) | (result.similarity > high))
        self.num_rejected += int((result.is_tissue & ~accepted).sum())
        keep = (accepted & result.is_tissue).to(grey.device)[:, None, None, None]
        return torch.where(keep, result.images.to(grey), grey)


def _is_image(x: Any) -> bool:
    if isinstance(x, _STRUCTURE):
        return False
    return isinstance(x, PIL.Image.Image | tv_tensors.Image) or type(x) is Tensor


def _num_tiles(x: Any) -> int:
    if isinstance(x, Tensor) and x.ndim > 3:
        return int(np.prod(x.shape[:-3]))
    return 1


def _open_image(image: Any) -> tuple[Tensor, Any]:
    """Return float32 grey levels [B, 3, H, W] and the function that goes back to the input's type.

    Raises:
        TypeError, ValueError: Not RGB, not 8-bit or float in [0, 1], or an empty batch.
    """
    if isinstance(image, PIL.Image.Image):
        if image.mode != "RGB":
            raise ValueError(
                f"got a PIL image of mode {image.mode}, expected RGB; use image.convert('RGB')"
            )
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        return array, lambda x: PIL.Image.fromarray(
            x[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        )
    if image.ndim < 3 or image.shape[-3] != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [..., 3, H, W] RGB; "
            "repeat grey-scale channels, drop alpha"
        )
    shape, dtype = image.shape, image.dtype
    plain = image.as_subclass(Tensor) if isinstance(image, tv_tensors.TVTensor) else image
    grey = plain.reshape(-1, *shape[-3:]).float()
    if dtype.is_floating_point:
        low, high = grey.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"got a float image in [{float(low):g}, {float(high):g}], expected [0, 1]; "
                "divide by the largest value, and normalise after this transform"
            )
        grey = grey * 255.0
    elif dtype != torch.uint8:
        raise TypeError(f"got an image of {dtype}, expected uint8 or float in [0, 1]")

    def restore(x: Tensor) -> Tensor:
        x = x.reshape(shape)
        x = (x / 255.0).to(dtype) if dtype.is_floating_point else x.round().to(dtype)
        return tv_tensors.wrap(x, like=image) if isinstance(image, tv_tensors.TVTensor) else x

    return grey, restore


def _check_scale(generator: TileGenerator, mpp: float) -> None:
    ratio = mpp / generator.tile.mpp
    if not 0.2 <= ratio <= 2.0:
        raise ValueError(
            f"mpp is {mpp}, the model expects {generator.tile.describe()}; give the scale of the "
            "images in microns per pixel, between a fifth of and twice the model's"
        )


def _model_tiles(grey: Tensor, mpp: float, generator: TileGenerator) -> Tensor:
    """Return the centre of each image as uint8 tiles at the model's size and scale.

    Raises:
        ValueError: The image covers less than the model's tile.
    """
    size, ratio = generator.tile.size_px, mpp / generator.tile.mpp
    height, width = (round(n * ratio) for n in grey.shape[2:])
    if min(height, width) < size:
        raise ValueError(
            f"image is {grey.shape[3]}x{grey.shape[2]} px at {mpp:g} microns/pixel, the model "
            f"expects at least {generator.tile.describe()}; re-tile larger or correct mpp"
        )
    if (height, width) != tuple(grey.shape[2:]):
        grey = F.interpolate(grey, (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    crop = grey[:, :, top : top + size, left : left + size]
    return crop.round().clamp(0, 255).to(torch.uint8)
