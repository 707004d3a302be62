"""The encoder stage: a small vision transformer learns texture from VGG, and colour.

Three targets, each standardised to unit variance over the training tiles:

* texture, per 14-px patch: the leading principal components of VGG's relu3_3 and relu4_3 on the
  tile as it is. The student sees the tile restained at random, so its texture ignores stain.
* colour, per patch: mean and spread of the optical density that the student does see. Texture
  alone would leave the encoder colour-blind, and a colour-blind condition cannot restain.
* stain, from CLS: the tissue moments of the whole slide, restained alike. One tile must tell what
  its slide looks like, which teaches CLS to tell stain from composition.

CLS also learns mean and spread of the patch targets over the tile.

Source: Gatys et al. (2015) for feature statistics as a description of texture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cytosyn_aug.images import images_to_pixels, optical_density
from cytosyn_aug.model.encoder import StainProbe, TileEncoder
from cytosyn_aug.stain.density import (
    DensityMoments,
    moment_statistics,
    pool_moments,
    tissue_moments,
)
from training.data.batches import Batches, TileSet, change_stain, stain_maps, step_generator
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.losses import standardised_error
from training.stages.perception import PerceptualNetwork

_GRID = 16
_CHUNK = 64
_NUM_STAIN = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRecipe:
    """An encoder run: shape, teacher views, the loop.

    Attributes:
        num_views: Tiles the teacher looks at, once.
        num_components: Principal components kept of each teacher layer.
        stain_jitter: Size of random changes of stain; 0 for none.
        cls_weight: Weight of the tile-level loss beside the patch-level one.
    """

    loop: LoopConfig
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    batch_size: int
    num_views: int
    num_components: int
    stain_jitter: float
    cls_weight: float
    seed: int


def build_encoder(recipe: EncoderRecipe) -> TileEncoder:
    """Return an untrained encoder of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    return TileEncoder(
        embed_dim=recipe.embed_dim,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        mlp_ratio=recipe.mlp_ratio,
        init_values=None,
    )


class EncoderStage:
    """Train an encoder on the teacher's targets; see the module."""

    def __init__(
        self,
        recipe: EncoderRecipe,
        tiles: TileSet,
        validation: TileSet,
        device: torch.device,
        cache: Path,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.device = recipe, device
        teacher = _Teacher(recipe, tiles, device, cache)
        order = _seeded_order(len(tiles), recipe.num_views, recipe.seed)
        self.train_views = teacher.views(tiles, order, "train")
        held_out = _seeded_order(len(validation), 128, recipe.seed)
        self.held_views = teacher.views(validation, held_out, "val")
        num = len(order)
        names = [tiles.name(row) for row in order.tolist()]  # tiles themselves may be freed
        self.batches = Batches(num, recipe.batch_size, recipe.seed, names.__getitem__)
        sample = self.train_views.take(torch.arange(0, num, max(1, num // 960)))
        patch, cls = _targets(sample, sample.images, torch.eye(3).expand(len(sample.images), 3, 3))
        self.scales = (_scale(patch.flatten(0, 1)), _scale(cls))
        self.network: nn.Module = nn.ModuleDict(
            {
                "encoder": build_encoder(recipe),
                "patch_head": nn.Linear(recipe.embed_dim, patch.shape[-1]),
                "tile_head": nn.Linear(recipe.embed_dim, cls.shape[-1] - _NUM_STAIN),
                "stain_probe": self._stain_probe(),
            }
        ).to(device)
        self.compute = torch.compile(self._compute) if compiles else self._compute

    def _stain_probe(self) -> StainProbe:
        probe = StainProbe(conditioning_dim=self.recipe.embed_dim)
        mean, std = self.scales[1]
        probe.shift.copy_(mean[-_NUM_STAIN:])
        probe.scale.copy_(std[-_NUM_STAIN:])
        return probe

    def read(self, step: int, rows: slice) -> _Views:
        """Return the views of these rows."""
        return self.train_views.take(self.batches.index(step)[rows])

    def losses(self, step: int, rows: slice, samples: _Views) -> dict[str, Tensor]:
        """Return patch, tile and stain errors; 1 is what predicting the mean would score."""
        draw = step_generator(self.recipe.seed, step)
        maps = stain_maps(self.batches.size, draw, jitter=self.recipe.stain_jitter)
        return self._errors(self.network, samples, maps[rows])

    def _errors(self, network: nn.Module, views: _Views, maps: Tensor) -> dict[str, Tensor]:
        images = change_stain(views.images, maps)
        patch, cls = (
            ((t - mean) / std).to(self.device)
            for t, (mean, std) in zip(_targets(views, images, maps), self.scales, strict=True)
        )
        compute = self.compute if network is self.network else self._compute
        return compute(network, images.to(self.device), patch, cls)

    def _compute(
        self, network: nn.Module, images: Tensor, patch: Tensor, cls: Tensor
    ) -> dict[str, Tensor]:
        assert isinstance(network, nn.ModuleDict)
        with mixed_precision(self.device):
            features = network["encoder"](images)
            seen_patch = network["patch_head"](features.patches)
            seen_tile = network["tile_head"](features.cls)
            seen_stain = network["stain_probe"](features.cls)
        tile, stain = cls.split([cls.shape[1] - _NUM_STAIN, _NUM_STAIN], dim=1)
        parts = {
            "patch": standardised_error(seen_patch, patch),
            "tile": standardised_error(seen_tile, tile),
            "stain": standardised_error(seen_stain, stain),
        }
        total = parts["patch"] + self.recipe.cls_weight * (parts["tile"] + parts["stain"])
        return {"loss": total} | parts

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Return the unexplained variance on restained tiles of validation slides."""
        rows = []
        for start in range(0, len(self.held_views.images), _CHUNK):
            stop = min(start + _CHUNK, len(self.held_views.images))
            views = self.held_views.take(torch.arange(start, stop))
            draw = step_generator(self.recipe.seed, start, stream=3)
            maps = stain_maps(stop - start, draw, jitter=self.recipe.stain_jitter)
            rows.append(self._errors(network, views, maps))
        return {f"val_{k}": float(torch.stack([r[k] for r in rows]).mean()) for k in rows[0]}


@dataclass(frozen=True, slots=True)
class _Views:
    """Tiles with the teacher's texture [B, 256, T] and the moments of their slides."""

    images: Tensor
    texture: Tensor
    slide_mean: Tensor
    slide_covariance: Tensor

    def take(self, index: Tensor) -> _Views:
        return _Views(
            self.images[index],
            self.texture[index],
            self.slide_mean[index],
            self.slide_covariance[index],
        )


class _Teacher:
    """VGG features reduced to principal components, computed once and kept on disk."""

    def __init__(
        self, recipe: EncoderRecipe, tiles: TileSet, device: torch.device, cache: Path
    ) -> None:
        self.recipe, self.device, self.cache = recipe, device, cache
        self.network = PerceptualNetwork("vgg").to(device)
        self.bases: list[tuple[Tensor, Tensor]] = []
        sample = tiles.images[:: max(1, len(tiles) // 96)][:96]
        maps = [self._maps(part) for part in sample.split(8)]
        for layer in range(len(maps[0])):
            tokens = torch.cat([m[layer] for m in maps]).flatten(0, 1).double()
            _, vectors = torch.linalg.eigh(torch.cov(tokens.T))
            leading = vectors.flip(1)[:, : recipe.num_components]
            self.bases.append((tokens.mean(0).float(), leading.float()))

    @torch.no_grad()
    def _maps(self, images: Tensor) -> list[Tensor]:
        pixels = images_to_pixels(images.to(self.device))
        pixels = pixels.to(memory_format=torch.channels_last)
        with mixed_precision(self.device):
            maps = self.network(pixels, num_stages=4)[2:]
        pooled = [F.adaptive_avg_pool2d(m.float(), _GRID) for m in maps]
        return [m.flatten(2).transpose(1, 2).cpu() for m in pooled]

    def _texture(self, images: Tensor) -> Tensor:
        maps = self._maps(images)
        parts = [(m - mean) @ basis for m, (mean, basis) in zip(maps, self.bases, strict=True)]
        return torch.cat(parts, -1).half()

    def views(self, tiles: TileSet, order: Tensor, name: str) -> _Views:
        """Return tiles in this order with their targets, reading finished chunks."""
        self.cache.mkdir(parents=True, exist_ok=True)
        chunks = []
        for k, index in enumerate(order.split(_CHUNK)):
            file = self.cache / f"{name}_{k:05d}.safetensors"
            if not file.exists():
                texture = [self._texture(part) for part in tiles.images[index].split(8)]
                temporary = file.with_suffix(".tmp")
                save_file({"texture": torch.cat(texture)}, temporary)
                temporary.replace(file)
            chunks.append(load_file(file)["texture"])
        slides = [_slide_moments(tiles, k) for k in range(len(tiles.slides))]
        own = tiles.slide_index[order]
        return _Views(
            tiles.images[order],
            torch.cat(chunks),
            torch.cat([m.mean for m in slides]).float()[own],
            torch.cat([m.covariance for m in slides]).float()[own],
        )


def _seeded_order(num_tiles: int, num_views: int, seed: int) -> Tensor:
    order = torch.randperm(num_tiles, generator=step_generator(seed, 0, stream=2))
    return order[:num_views]


def _slide_moments(tiles: TileSet, slide: int) -> DensityMoments:
    """Return the tissue moments of one slide's tiles together."""
    images = tiles.images[tiles.slide_index == slide]
    parts = [tissue_moments(part) for part in images.split(_CHUNK)]
    return pool_moments(DensityMoments(*(torch.cat(x) for x in zip(*parts, strict=True))))


def _targets(views: _Views, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return raw patch targets [B, 256, T + 6] and tile targets [B, 2 (T + 6) + _NUM_STAIN].

    Args:
        views: Tiles and what the teacher said of them.
        images: The tiles as the student sees them, restained.
        maps: What restained them, [B, 3, 3].
    """
    density = optical_density(images)
    mean = F.adaptive_avg_pool2d(density, _GRID)
    square = F.adaptive_avg_pool2d(density.square(), _GRID)
    spread = (square - mean.square()).clamp_min(0).sqrt()
    colours = [x.flatten(2).transpose(1, 2) for x in (mean, spread)]
    patch = torch.cat([views.texture.float(), *colours], -1)
    slide_mean = (maps @ views.slide_mean[:, :, None])[:, :, 0]
    covariance = maps @ views.slide_covariance @ maps.transpose(1, 2)
    stain = moment_statistics(slide_mean, covariance)
    return patch, torch.cat([patch.mean(1), patch.std(1), stain], -1)


def _scale(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(0), samples.std(0).clamp_min(1e-4)
