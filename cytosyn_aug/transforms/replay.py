"""ReplayBank: edited tiles that a training process makes, uses a few times, and makes anew.

One slot per tile of the data set holds the latents of its latest variant. A tile that is drawn
takes what is in its slot, until that has been used `reuse` times or is older than `max_age` steps;
then a new one is made from the tile at hand, in one batch with all others of the step that need
one. A step of B tiles, of which a share p is drawn, so costs about

    p B (make / uses + decode)

once every tile has been seen, where making a variant anew every time would cost p B (make +
decode). `make` is the edit, in which the network draws; `decode` is the small decoder where the
model has one. Without `max_age`, `uses` is `reuse`. With it, a tile that comes by every T = N / B
steps has K = floor(max_age / T) chances of using a variant again before that is too old, each with
probability p:

    uses = 1 + E[min(reuse - 1, Binomial(K, p))]

exactly so for an order that is the same in every epoch, about so for a shuffled one. Reused
variants are those of earlier steps: if `reuse` is too large, a model learns them by heart.

A bank is of one process. `DistributedSampler` gives a rank other tiles in every epoch, so that of
W ranks each sees a tile once in W epochs, and variants wait, and grow old, W times as long. Give
every rank the same tiles in all epochs instead, and a bank of those:

    share = Subset(dataset, range(rank, len(dataset), world_size))
    loader = DataLoader(share, batch_size, shuffle=True)  # index: position in the share
    bank = ReplayBank(generator, edit, num_tiles=len(share))
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import finite_images
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import is_tissue
from cytosyn_aug.transforms.schedules import Scheduled, check_scheduled, value_at
from cytosyn_aug.transforms.tile_transform import TileTransform
from cytosyn_aug.transforms.variants import VariantFunction, check_draws, run_edit

_MAX_SEED = 2**62


class ReplayCounts(NamedTuple):
    """What a bank has done so far.

    Attributes:
        num_made: Tiles given to the edit.
        num_reused: Tiles replaced by variants that were made for earlier uses.
        num_kept: Drawn tiles that stay as they are: blank ones, which are not given to the edit,
            and those that it left alone.
        num_failed: Drawn tiles that stay as they are because their variant, or what it decodes to,
            is not finite. They are tried again when they are drawn next.
    """

    num_made: int
    num_reused: int
    num_kept: int
    num_failed: int


class _Lost(NamedTuple):
    """Slots that an edit left empty: it left the tile alone, or what it gave is not finite."""

    left_alone: set[int]
    failed: set[int]


class ReplayBank:
    """Variants of the tiles of one data set, for the process that trains on them.

    Call it on batches as they come from a loader, before crops and flips: a slot belongs to a tile
    as it was when its variant was made. It does not support several processes: give each rank its
    own, over its own share of the tiles (see the module).

    Args:
        generator: The model.
        edit: Makes variants: a transform, which then edits every tile it is given, whatever its
            `p`; or a function from uint8 images [n, 3, size, size] with tissue and one seed per
            tile to uint8 images, or to whitened latents [n, C, h, w] of the model.
        num_tiles: Tiles of the data set; positions in a batch's `index` are below it.
        p: Probability that a tile is replaced; or a `Ramp` over the epochs that `set_epoch` says.
        reuse: Times that a variant is used before it is made anew, also within a batch that holds
            a tile several times.
        max_age: Steps after which a variant is made anew even so; None for never.
        folder: Where latents are kept in a nameless file that the system maps, 6.3 kB a tile of
            CytoSyn; None for memory. It lives as long as the bank: variants are of one run.

    Raises:
        TypeError: An edit that is neither.
        ValueError: Numbers out of range, or a transform that draws by slide or laboratory.
        OSError: The folder cannot be written, or has no room for all latents.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=4, steps=2, seed=0)
        >>> bank = ReplayBank(generator, lambda x, seeds: 255 - x, num_tiles=4, p=1.0, reuse=2)
        >>> for _ in range(4):
        ...     images = bank(tiles, torch.arange(4))
        >>> bank.counts
        ReplayCounts(num_made=8, num_reused=8, num_kept=0, num_failed=0)
    """

    def __init__(
        self,
        generator: TileGenerator,
        edit: TileTransform | VariantFunction,
        *,
        num_tiles: int,
        p: Scheduled = 0.5,
        reuse: int = 4,
        max_age: int | None = None,
        folder: Path | str | None = None,
    ) -> None:
        check_scheduled("p", p)
        if num_tiles < 1 or reuse < 1 or (max_age is not None and max_age < 0):
            raise ValueError(
                f"num_tiles is {num_tiles}, reuse {reuse} and max_age {max_age}; expected at least "
                "1, 1 and 0"
            )
        if isinstance(edit, TileTransform):
            check_draws(edit, "the edit")
        elif not callable(edit):
            raise TypeError(
                f"edit is a {type(edit).__name__}, expected a transform of cytosyn_aug, or a "
                "function of images and seeds"
            )
        self.generator, self.edit = generator, edit
        self.p, self.reuse, self.max_age = p, reuse, max_age
        self._latents = _storage(generator, num_tiles, folder)
        self._uses = np.zeros(num_tiles, np.int32)  # of what is in the slot; 0 for an empty one
        self._made_at = np.zeros(num_tiles, np.int64)
        self._step = 0
        self._epoch = 0
        self._counts = np.zeros(4, np.int64)
        self._has_warned = False

    @property
    def counts(self) -> ReplayCounts:
        """What was made, reused and kept so far, and what failed."""
        return ReplayCounts(*self._counts.tolist())

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0, where `p` or the edit's strength is a `Ramp`."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected 0 or more")
        self._epoch = epoch
        if isinstance(self.edit, TileTransform):
            self.edit.set_epoch(epoch)

    @torch.compiler.disable  # as transforms are: every batch draws others
    @isolated()
    @torch.no_grad()
    def __call__(self, images: Tensor, index: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Return a batch with the drawn tiles replaced; draws from torch's generator.

        Args:
            images: uint8 [B, 3, size, size], any device.
            index: Position of each tile in the data set, B whole numbers.

        Returns:
            uint8 like `images`, on their device.

        Raises:
            TypeError: An index of anything but whole numbers, or an edit that gives no tensor.
            ValueError: An index out of range, or an edit that gives something else.
        """
        self.generator.check_images(images)
        slots = self._checked(index, len(images))
        is_drawn = torch.rand(len(images), dtype=torch.float32) < value_at(self.p, self._epoch)
        seeds = torch.randint(0, _MAX_SEED, (len(images),)).tolist()
        rows = is_drawn.nonzero()[:, 0].tolist()
        self._step += 1
        if not rows:
            return images
        shows_tissue = is_tissue(images[rows]).tolist()
        tissue = [row for row, shows in zip(rows, shows_tissue, strict=True) if shows]
        self._count(num_kept=len(rows) - len(tissue))
        taken = self._take(images, slots, tissue, seeds)
        return self._replaced(images, slots, taken) if taken else images

    def seconds_per_step(self, batch_size: int, make: float, decode: float) -> float:
        """Return what a step costs, at this epoch's p, once all tiles were seen; see the module.

        Args:
            batch_size: Tiles per step.
            make: Seconds that the edit of one tile takes.
            decode: Seconds that decoding one tile takes.
        """
        p = value_at(self.p, self._epoch)
        return p * batch_size * (make / self._expected_uses(batch_size, p) + decode)

    def _expected_uses(self, batch_size: int, p: float) -> float:
        """Return how often a variant is used on average; see the module."""
        if self.max_age is None:
            return float(self.reuse)
        chances = self.max_age * batch_size // len(self._uses)
        more = 0.0  # E[min(r - 1, X)] is the sum of P(X >= k) for k from 1 to r - 1
        for k in range(1, min(self.reuse - 1, chances) + 1):
            more += 1 - sum(
                math.comb(chances, n) * p**n * (1 - p) ** (chances - n) for n in range(k)
            )
        return 1 + more

    def _checked(self, index: object, num: int) -> list[int]:
        limit = len(self._uses)
        expected = (
            f"expected {num} positions from 0 to {limit - 1}, whole numbers: the data set must "
            "return each tile's own position beside it"
        )
        listed = index.tolist() if isinstance(index, Tensor | np.ndarray) else index
        if not isinstance(listed, Sequence) or not all(map(_is_whole, listed)):
            raise TypeError(f"index is {str(listed)[:60]}, {expected}")
        slots = [int(k) for k in listed]
        if len(slots) != num or any(not 0 <= slot < limit for slot in slots):
            raise ValueError(f"index is {slots[:8]}, {expected}")
        return slots

    def _spent(self, slots: list[int]) -> np.ndarray:
        """Return bool [B]: nothing there, used up, or too old."""
        uses = self._uses[slots]
        spent = (uses == 0) | (uses >= self.reuse)
        if self.max_age is not None:
            spent |= self._step - self._made_at[slots] > self.max_age
        return spent

    def _take(
        self, images: Tensor, slots: list[int], rows: list[int], seeds: list[int]
    ) -> dict[int, np.ndarray]:
        """Return the latents of a variant for each row that has one, and count their uses."""
        taken: dict[int, np.ndarray] = {}
        while rows:
            spent = self._spent(slots)
            first: dict[int, int] = {}  # a tile that is in the batch twice is made once
            for row in rows:
                if spent[row]:
                    first.setdefault(slots[row], row)
            making = list(first.values())
            lost = self._make(images, slots, making, seeds) if making else _Lost(set(), set())
            waiting = []
            for row in rows:
                slot = slots[row]
                if slot in lost.failed:
                    self._count(num_failed=1)
                elif slot in lost.left_alone:
                    self._count(num_kept=1)
                elif self._uses[slot] >= self.reuse:
                    waiting.append(row)  # those before it in the batch have used it up
                else:
                    taken[row] = self._latents[slot].copy()
                    self._uses[slot] += 1
                    self._count(num_reused=int(row not in making))
            rows = waiting
        return taken

    def _make(self, images: Tensor, slots: list[int], rows: list[int], seeds: list[int]) -> _Lost:
        """Fill the slots of rows anew; return those that are empty still, to be asked again."""
        chosen = images[torch.tensor(rows, device=images.device)]
        places = [slots[row] for row in rows]
        variants, is_failed = run_edit(self.edit, chosen, [seeds[row] for row in rows])
        is_edited = torch.ones(len(rows), dtype=torch.bool)
        if variants.dtype == torch.uint8:
            if variants.shape != chosen.shape:
                raise ValueError(
                    f"the edit gave {list(variants.shape)} for {list(chosen.shape)}, expected "
                    "the same"
                )
            is_edited = (variants.to(chosen.device) != chosen).flatten(1).any(1).cpu()
            variants = self._encode(variants[is_edited.to(variants.device)])
        num_edited = int(is_edited.sum())
        if variants.shape != (num_edited, *self.generator.latent_shape):
            raise ValueError(
                f"the edit gave latents {list(variants.shape)}, expected "
                f"{[num_edited, *self.generator.latent_shape]}"
            )
        stored = variants.half().cpu()
        is_finite = stored.isfinite().flatten(1).all(1).tolist()
        edited = [place for place, is_new in zip(places, is_edited.tolist(), strict=True) if is_new]
        self._latents[edited] = stored.numpy()
        self._uses[places], self._made_at[places] = 0, self._step
        self._count(num_made=len(rows))
        failed = {place for place, is_fine in zip(edited, is_finite, strict=True) if not is_fine}
        # A transform gives tiles that it failed on as they were, and says so.
        failed |= {place for place, fails in zip(places, is_failed.tolist(), strict=True) if fails}
        self._warn_of(failed)
        return _Lost(set(places) - set(edited) - failed, failed)

    def _replaced(self, images: Tensor, slots: list[int], taken: dict[int, np.ndarray]) -> Tensor:
        """Return the batch with rows replaced by what their latents decode to."""
        rows = torch.tensor(list(taken))
        latents = torch.from_numpy(np.stack(list(taken.values()))).float()
        pixels = self.generator.decode_pixels(latents, is_few_step=True)
        variants, is_finite = finite_images(pixels)
        failed = [slots[row] for row in rows[~is_finite.cpu()].tolist()]
        self._uses[failed] = 0
        self._count(num_failed=len(failed), num_reused=-len(failed))
        self._warn_of(failed)
        out = images.clone()
        out[rows[is_finite.cpu()].to(out.device)] = variants[is_finite].to(out.device)
        return out

    def _warn_of(self, failed: Collection[int]) -> None:
        """Name the first tile that failed, once."""
        if failed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the variant of tile {min(failed)} of the data set is not finite, so the tile "
                "comes back unchanged; counts.num_failed counts such tiles. Load the model in "
                "float32 or bfloat16, or look at the tile",
                RuntimeWarning,
                stacklevel=2,
            )

    def _count(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._counts[ReplayCounts._fields.index(name)] += number

    def _encode(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.empty(0, *self.generator.latent_shape, dtype=torch.float32)
        return self.generator.whiten(self.generator.encode(images).mean)


def _is_whole(position: object) -> bool:
    return isinstance(position, Integral) and not isinstance(position, bool)  # no mask


def _storage(generator: TileGenerator, num_tiles: int, folder: Path | str | None) -> np.ndarray:
    shape = (num_tiles, *generator.latent_shape)
    if folder is None:
        return np.zeros(shape, np.float16)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 2 * math.prod(shape)
    # Its name is gone at once, so that nobody else opens it, and the system takes the space back
    # when the process ends, however it ends.
    with tempfile.NamedTemporaryFile(prefix="replay-", suffix=".latents", dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process later on
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{folder} has no room for the latents of {num_tiles} tiles ({num_bytes:,} "
                    f"bytes): {error.strerror}; free some, or choose another folder",
                ) from error
        else:
            file.truncate(num_bytes)
        return np.memmap(file, np.float16, "r+", shape=shape)
