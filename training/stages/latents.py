"""The latents stage: views of tiles, encoded once, that transformers train on instead of pixels.

    OUT/<number>.safetensors  mean and std of the posterior, features, and the sums of both;
                              names of the tiles, JSON as bytes
    OUT/latents.json          written last: what is here, of which networks, and its statistics

Views (turned, mirrored, half of them restained) go through the final autoencoder and the encoder.
Moments are kept rather than latents: every training step draws its own latents from the
posterior. Shards are complete or absent, so a run that was stopped goes on, and any number of
processes may share one. They are read through memory maps: sets may exceed memory.

A set belongs to the networks, tiles and recipe that made it. Training on latents of another
autoencoder would go unnoticed until the samples are looked at, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cytosyn_aug.io.files import write_atomically
from training.data.batches import (
    Batches,
    TilesOfSplit,
    change_stain,
    crop_and_turn,
    draw_views,
    stain_maps,
    step_generator,
)
from training.engine.distributed import world
from training.stages.latent_space import LatentSpace, Views, channel_sums, token_sum

FORMAT_VERSION = 1
DESCRIPTION_NAME = "latents.json"
_STAINED_SHARE = 0.5
_MAX_OPEN_SHARDS = 128
_SUMS = ("latent_sums", "patch_sum")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsRecipe:
    """What is encoded.

    A view takes 12.5 kB of moments, 2 bytes a feature, and with patches 392 bytes a feature more:
    90 kB for `tiny`, 315 kB with H0-mini (13 kB without patches).

    Attributes:
        num_views: Views of the training tiles, each tile equally often.
        shard_size: Views a file; no more than there are tiles.
        has_patches: Keep patch tokens too, which the `sit` stage aligns to and `distil` ignores.
        stain_jitter: Size of random changes of stain; 0 for none; half of the views are restained.
        seed: Of views and stains.
    """

    num_views: int
    shard_size: int
    has_patches: bool
    stain_jitter: float
    seed: int

    def __post_init__(self) -> None:
        if self.num_views < 1 or self.shard_size < 1:
            raise ValueError(
                f"num_views is {self.num_views} and shard_size {self.shard_size}, expected >= 1"
            )

    def shard_rows(self, num_tiles: int) -> list[int]:
        """Return the number of views of each shard."""
        size = min(self.shard_size, self.num_views, num_tiles)
        full, rest = divmod(self.num_views, size)
        return [size] * full + ([rest] if rest else [])


def network_digests(space: LatentSpace) -> dict[str, str]:
    """Return digests of what latents and features depend on: half of the autoencoder, the encoder.

    The decoder may be trained on without making latents stale.
    """
    vae = space.vae
    halves = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})
    return {"vae": _digest(halves), "encoder": _digest(space.encoder)}


def write_views(
    space: LatentSpace, tiles: TilesOfSplit, recipe: LatentsRecipe, folder: Path, data: str
) -> int:
    """Encode this process's share of the shards; the one that finds all done describes them.

    Args:
        space: The final autoencoder and the encoder.
        tiles: What the views are of.
        recipe: What is encoded.
        folder: Receives the shards, or holds some of the same set.
        data: Identity of the data set.

    Returns:
        Shards that are not there yet, because other processes are still at work.

    Raises:
        ValueError: The folder holds another set.
        OSError: The disk is full and the like; what is written is kept.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "recipe": asdict(recipe),
        "data": data,
        **network_digests(space),
    }
    identity = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DESCRIPTION_NAME).exists():
        _refuse_other(folder, _read_description(folder), description)
    rows = recipe.shard_rows(len(tiles))
    place = world()
    for number in range(place.rank, len(rows), place.size):
        file = _shard(folder, number)
        if file.exists():
            _refuse_other_shard(file, identity)
            continue
        views = _encode_shard(space, tiles, recipe, number, rows)
        write_atomically(file, save(views, metadata={"identity": identity}))
        if number % 20 == 0:
            print(f"latents: shard {number + 1} of {len(rows)}", file=sys.stderr)
    missing = sum(not _shard(folder, k).exists() for k in range(len(rows)))
    if not missing:
        content = description | {"identity": identity, "shard_rows": rows}
        content |= _statistics(folder, len(rows), recipe.num_views)
        write_atomically(folder / DESCRIPTION_NAME, json.dumps(content, indent=1).encode())
    return missing


def _encode_shard(
    space: LatentSpace, tiles: TilesOfSplit, recipe: LatentsRecipe, number: int, rows: list[int]
) -> Views:
    """Return a shard: a function of tiles, networks, recipe and number alone."""
    index = Batches(len(tiles), rows[0], recipe.seed).index(number)[: rows[number]]
    draw = step_generator(recipe.seed, number, stream=2)
    side = tiles.side_px
    images = crop_and_turn(tiles.take(index), draw_views(len(index), side, side, draw), side)
    maps = stain_maps(len(index), draw, share=_STAINED_SHARE, jitter=recipe.stain_jitter)
    views = space.encode(change_stain(images, maps), recipe.has_patches)
    names = json.dumps([tiles.name(row) for row in index.tolist()]).encode()
    sums = {"latent_sums": channel_sums(views)}
    if recipe.has_patches:
        sums["patch_sum"] = token_sum(views["patches"])
    return views | sums | {"tiles": torch.frombuffer(bytearray(names), dtype=torch.uint8)}


def _statistics(folder: Path, num_shards: int, num_views: int) -> dict[str, list[float]]:
    """Return mean and variance of latents by channel, and the mean patch token, of all views."""
    totals: dict[str, Tensor] = {}
    for number in range(num_shards):
        with safe_open(_shard(folder, number), "pt") as shard:
            for name in set(_SUMS) & set(shard.keys()):
                totals[name] = totals.get(name, torch.zeros(())) + shard.get_tensor(name)
            pixels = shard.get_slice("mean").get_shape()[2:]
            tokens = shard.get_slice("patches").get_shape()[1] if "patch_sum" in totals else 1
    count = num_views * pixels[0] * pixels[1]
    mean, square = totals["latent_sums"] / count
    statistics = {
        "latent_mean": mean.tolist(),
        "latent_variance": (square - mean.square()).tolist(),
    }
    if "patch_sum" in totals:
        statistics["mean_patch"] = (totals["patch_sum"] / (num_views * tokens)).tolist()
    return statistics


class StoredViews:
    """Views that the latents stage wrote, by index, from memory-mapped shards.

    Safe to use in forked processes that only read; not for several threads.

    Attributes:
        latent_mean: float64 [C], of latents drawn from the posteriors, over all views.
        latent_variance: float64 [C], within and between posteriors.
        mean_patch: float32 [D], mean of all patch tokens, or None without patches.

    Raises:
        ValueError: The stage has not finished, or a shard is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = _read_description(folder)
        rows = torch.tensor(self.description["shard_rows"])
        self._ends = rows.cumsum(0)
        self.latent_mean = torch.tensor(self.description["latent_mean"], dtype=torch.float64)
        self.latent_variance = torch.tensor(
            self.description["latent_variance"], dtype=torch.float64
        )
        patch = self.description.get("mean_patch")
        self.mean_patch = None if patch is None else torch.tensor(patch)
        self._shards: OrderedDict[int, Any] = OrderedDict()  # Any: safetensors has no types
        lacking = [k for k in range(len(rows)) if not _shard(folder, k).exists()]
        if lacking:
            raise ValueError(
                f"{_shard(folder, lacking[0])} and {len(lacking) - 1} more shards are missing; "
                "run the latents stage again, it writes what is not there"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check(self, space: LatentSpace) -> None:
        """Refuse a set that other networks made.

        Raises:
            ValueError: Names the network and both digests.
        """
        for name, digest in network_digests(space).items():
            if self.description[name] != digest:
                raise ValueError(
                    f"{self.folder} is stale: its {name} has digest {self.description[name]}, "
                    f"the one given {digest}; run the latents stage again into another --out, or "
                    f"pass the {name} that made it"
                )

    def take(self, index: Tensor, with_patches: bool = True) -> Views:
        """Return views by index [n], as `training.stages.latent_space.LatentSpace.encode` does."""
        names = ("mean", "std", "cls") + (("patches",) if with_patches else ())
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        for place in index.tolist():
            shard, row = self._locate(place)
            handle = self._open(shard)
            for name in names:
                columns[name].append(handle.get_slice(name)[row])
        return {name: torch.stack(parts) for name, parts in columns.items()}

    def name(self, index: int) -> str:
        """Return the tile that a view is of, for messages; sets of before do not say."""
        shard, row = self._locate(index)
        handle = self._open(shard)
        if "tiles" in handle.keys():  # noqa: SIM118, no mapping
            return str(json.loads(bytes(handle.get_tensor("tiles").numpy()))[row])
        return f"data set {self.description['data']}, view {row} of {_shard(self.folder, shard)}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Return shard and row of a view."""
        shard = int(torch.searchsorted(self._ends, index, right=True))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _open(self, number: int) -> Any:
        handle = self._shards.pop(number, None)
        if handle is None:
            file = _shard(self.folder, number)
            try:
                handle = safe_open(file, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is damaged ({error}); delete it and run the latents stage again"
                ) from error
            if len(self._shards) >= _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards[number] = handle
        return handle


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _digest(network: nn.Module) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        whole.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION_NAME
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {DESCRIPTION_NAME}; the latents stage did not finish, rerun it"
        )
    description = cast("dict[str, Any]", json.loads(file.read_text()))
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {description.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}; run the latents stage again into another --out"
        )
    return description


def _refuse_other(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    changed = {k: (was.get(k), v) for k, v in now.items() if was.get(k) != v}
    if changed:
        raise ValueError(
            f"{folder} holds other latents (was, now): {changed}; choose another --out"
        )


def _refuse_other_shard(file: Path, identity: str) -> None:
    try:
        with safe_open(file, "pt") as shard:
            was = (shard.metadata() or {}).get("identity")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and run again") from error
    if was != identity:
        raise ValueError(
            f"{file} is of another set ({was}, expected {identity}): its networks, tiles or recipe "
            "were others; choose another --out"
        )
