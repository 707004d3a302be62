"""Base class of all transforms: the grammar of torchvision v2 for tiles, batches and samples.

`make_params` draws everything random, for every tile of the sample, from torch's generator, which
the ranks of a job must seed differently, or they draw alike; `transform` is pure. PIL images, uint8
and float tensors and tv_tensors come out as they went in; tiles that are not edited keep their very
bits, and autocast around a call changes nothing. Masks, boxes, key points and everything else pass
by identity, or are refused by an edit that would make masks wrong. As in torchvision, of several
plain tensors only the first is an image, and none where the sample holds a PIL image or `Image`.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import (
    check_image,
    is_image_tensor,
    num_tiles,
    open_image,
    sides_of,
    tile_key,
)
from cytosyn_aug.transforms.draws import MAX_SEED, DrawScope, slide_generator
from cytosyn_aug.transforms.sample_metadata import (
    NO_METADATA,
    SLIDE,
    SampleMetadata,
    read_labels,
    read_value,
)
from cytosyn_aug.transforms.schedules import Probability, Ramp, check_probability, probabilities
from cytosyn_aug.transforms.worker_state import SharedCount, SharedEpoch

_STRUCTURE = (tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)


class EditedTiles(NamedTuple):
    """Edited grey levels, float32 [n, 3, H, W], and bool [n]: which tiles to take from there."""

    grey: Tensor
    is_edited: Tensor


class TileTransform(v2.Transform):
    """Find the images of a sample, draw for every tile, and edit those that were chosen.

    Any: a sample may hold anything, and torchvision types its hooks so.

    Args:
        p: Probability that a tile is edited; a `Ramp` over epochs, or one of them by class, and
            then samples carry labels: {"image": ..., "label": ...} or (image, label).
        keeps_structure: Whether masks, boxes and key points stay right.
        mode: "tile" draws for every tile; "slide" for every slide and epoch, in all workers alike,
            and then samples carry the name of the slide under "slide".
        seed: Of the draws of mode "slide", which do not depend on torch's generator.
    """

    _transformed_types = (PIL.Image.Image, tv_tensors.Image, is_image_tensor)

    def __init__(
        self, *, p: Probability, keeps_structure: bool, mode: DrawScope = "tile", seed: int = 0
    ) -> None:
        super().__init__()
        check_probability(p)
        if mode not in ("tile", "slide"):
            raise ValueError(f"mode is {mode!r}, expected 'tile' or 'slide'")
        self.p = p if isinstance(p, Mapping | Ramp) else float(p)
        self.keeps_structure = keeps_structure
        self.mode = mode
        self.seed = seed
        self._epoch = SharedEpoch()
        self._failed = SharedCount()
        self._warned_epoch = SharedCount()

    @property
    def num_failed(self) -> int:
        """Tiles, in all workers, that came back as they were because a network failed on them."""
        return self._failed.total()

    @property
    def epoch(self) -> int:
        """The epoch that was set last, 0 before that."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0, for schedules and slide-wise draws.

        Reaches DataLoader workers that persist; what they have prefetched is done already.
        """
        self._epoch.set(epoch)

    def extra_repr(self) -> str:
        """Show plain settings, and of lists the length: references hold tensors."""
        shown = []
        for name, value in vars(self).items():
            if isinstance(value, str | int | float | Mapping | Ramp) and name[0] != "_":
                shown.append(f"{name}={value!r}")
            elif isinstance(value, list):
                shown.append(f"{name}={len(value)}")
        return ", ".join(s for s in shown if not s.startswith(("_", "training=")))

    # A compiled training step would otherwise be traced into it and compiled anew for every draw.
    @torch.compiler.disable
    def forward(self, *inputs: Any) -> Any:
        """Edit the images of a sample.

        torchvision's own forward, which forgets the keys of the sample that metadata are found by.
        `torch.compile` around it leaves it as it is; `TileGenerator.compile` is for the networks.
        """
        if not inputs:
            raise TypeError("got no sample; call the transform on an image, or a sample with one")
        sample = inputs if len(inputs) > 1 else inputs[0]
        flat, spec = tree_flatten(sample)
        is_image = self._needs_transform_list(flat)
        self._check_parts(flat, is_image)
        images = [x for x, edits in zip(flat, is_image, strict=True) if edits]
        params = self.make_params(images, self.read_metadata(sample, images))
        done = [
            self.transform(x, params) if edits else x
            for x, edits in zip(flat, is_image, strict=True)
        ]
        return self._assemble(done, is_image, spec)

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse samples that this transform would make wrong.

        Raises:
            TypeError: No image, or a video.
            ValueError: Masks, boxes or key points beside an edit that moves structure; or images
                of one sample with different numbers of tiles, or none.
        """
        self._check_parts(flat_inputs, self._needs_transform_list(flat_inputs))

    def _check_parts(self, flat_inputs: list[Any], is_image: list[bool]) -> None:
        images = [x for x, edits in zip(flat_inputs, is_image, strict=True) if edits]
        if any(isinstance(x, tv_tensors.Video) for x in flat_inputs):
            raise TypeError(
                "the sample carries a tv_tensors.Video, whose frames would stay as they are; wrap "
                "them in tv_tensors.Image, which are drawn for frame by frame"
            )
        if not images:
            names = sorted({type(x).__name__ for x in flat_inputs})
            raise TypeError(
                f"got no image among {names}; pass a PIL image or an image tensor [..., 3, H, W]"
            )
        rest = [x for x, edits in zip(flat_inputs, is_image, strict=True) if not edits]
        moved = [type(x).__name__ for x in rest if isinstance(x, _STRUCTURE)]
        moved += [f"a tensor {list(x.shape)}" for x in rest if _may_be_mask(x, images)]
        if moved and not self.keeps_structure:
            raise ValueError(
                f"{type(self).__name__} moves structure, and the sample carries {moved}; drop "
                "them (a second image wrap in tv_tensors.Image, a mask in tv_tensors.Mask), keep "
                "structure, or pass allow_geometry_change=True"
            )
        counts = {num_tiles(x) for x in images}
        if 0 in counts:
            raise ValueError("got an empty batch, expected at least one tile")
        if len(counts) > 1:
            raise ValueError(
                f"images of one sample differ in batch size: {sorted(counts)}; they are edited "
                "alike, tile by tile, so give as many of each"
            )

    def make_params(
        self, flat_inputs: list[Any], metadata: SampleMetadata = NO_METADATA
    ) -> dict[str, Any]:
        """Draw, for every tile of the sample, whether it is edited and with which seed.

        Args:
            flat_inputs: The images of the sample.
            metadata: What the sample says of its tiles.

        Returns:
            Lists with one entry per tile, which JSON can hold: `chosen` and `seeds`.
        """
        return self._draw_tiles(num_tiles(flat_inputs[0]), metadata)[0]

    def _draw_tiles(
        self, num: int, metadata: SampleMetadata
    ) -> tuple[dict[str, Any], list[torch.Generator | None]]:
        """Draw `chosen` and `seeds`; return also where each tile's further draws come from.

        That is torch's own generator (None), or in mode "slide" one that all tiles of a slide
        begin anew, so that all of them must draw the same things in the same order.
        """
        p = probabilities(self.p, self.epoch, metadata.labels, num)
        if self.mode == "tile":
            uniform = torch.rand(num, dtype=torch.float64, device="cpu").tolist()
            seeds = torch.randint(0, MAX_SEED, (num,), device="cpu").tolist()
            chosen = [x < limit for x, limit in zip(uniform, p, strict=True)]
            return {"chosen": chosen, "seeds": seeds}, [None] * num
        sources = [slide_generator(x, self.epoch, self.seed) for x in self._slides(metadata)]
        params: dict[str, Any] = {"chosen": [], "seeds": []}
        for k, source in enumerate(sources):
            drawn = torch.rand((), dtype=torch.float64, generator=source, device="cpu")
            params["chosen"].append(float(drawn) < p[k])
            seed = torch.randint(0, MAX_SEED, (), generator=source, device="cpu")
            params["seeds"].append(int(seed))
        return params, [*sources]

    def _slides(self, metadata: SampleMetadata) -> list[Hashable]:
        if metadata.slides is None:
            raise ValueError(missing_value(SLIDE))
        if not self._epoch.is_set:
            warn_once(
                self._warned_epoch,
                "mode='slide' draws the same for a slide until transform.set_epoch(epoch) says "
                "that another epoch has begun, and it was never called; call it before each",
            )
        return metadata.slides

    @isolated()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Edit an image as drawn; the same image and params give the same result."""
        index = [k for k, is_chosen in enumerate(params["chosen"]) if is_chosen]
        self._check_size(*sides_of(inpt))
        if not index:
            check_image(inpt)
            return inpt
        grey, restore = open_image(inpt)
        is_edited = torch.zeros(len(grey), dtype=torch.bool, device=grey.device)
        size = self._tiles_at_once(grey)
        for start in range(0, len(index), size):
            part = index[start : start + size]
            rows = torch.tensor(part, device=grey.device)
            edit = self._edit(grey[rows], {k: _pick(v, part) for k, v in params.items()})
            is_edited[rows] = edit.is_edited.to(grey.device)
            grey[rows] = edit.grey.to(grey)
        return restore(grey, is_edited)

    def _check_size(self, height_px: int, width_px: int) -> None:
        """Raise ValueError for images of a size that cannot be edited."""

    def _tiles_at_once(self, grey: Tensor) -> int:
        """Return how many tiles are edited at once: intermediate results of all may not fit."""
        return len(grey)

    def _edit(self, grey: Tensor, params: dict[str, Any]) -> EditedTiles:
        """Edit the chosen tiles, float32 grey levels [n, 3, H, W], 0 to 255; params are theirs."""
        raise NotImplementedError

    def read_metadata(self, sample: object, images: list[Any]) -> SampleMetadata:
        """Return what draws go by, one value per tile; only what is asked for."""
        num = num_tiles(images[0])
        return SampleMetadata(
            labels=read_labels(sample, num) if isinstance(self.p, Mapping) else None,
            slides=read_value(sample, SLIDE, num) if self.mode == "slide" else None,
        )

    def _assemble(self, done: list[Any], is_image: list[bool], spec: TreeSpec) -> Any:
        return tree_unflatten(done, spec)

    def _count_failed(self, grey: Tensor, is_failed: Tensor) -> None:
        """Count tiles that a network failed on; name the first, once in all processes."""
        number = int(is_failed.sum())
        if not number:
            return
        if self._failed.total() == 0:
            first = int(is_failed.nonzero()[0, 0])
            name = tile_key(grey[first].round().to(torch.uint8))[:16]
            warnings.warn(
                f"{type(self).__name__}: the network's output for tile {name} (the first digits "
                "of its tile_key) is not finite, so it comes back unchanged; num_failed counts "
                "such tiles. Load the model in float32 or bfloat16, or look at the tile",
                RuntimeWarning,
                stacklevel=2,
            )
        self._failed.add(number)


def missing_value(name: str) -> str:
    """Return what to say where `make_params` was not told what draws go by."""
    return (
        f"draws go by {name}, and make_params was not told which; call the transform on a sample "
        f'that carries it: {{"image": ..., "{name}": ...}}'
    )


def warn_once(counter: SharedCount, sentence: str) -> None:
    """Warn once in all processes."""
    if not counter.total():
        counter.add(1)
        warnings.warn(sentence, stacklevel=2)


def _may_be_mask(x: object, images: list[Any]) -> bool:
    """Return whether a plain tensor has the sides of an image: torchvision would leave it alone."""
    if not isinstance(x, Tensor) or isinstance(x, tv_tensors.TVTensor) or x.ndim < 2:
        return False
    return (x.shape[-2], x.shape[-1]) in {sides_of(y) for y in images}


def _pick(values: Sequence[Any], index: list[int]) -> list[Any]:
    return [values[k] for k in index]
