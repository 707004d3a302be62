"""The evaluate stage: make tiles from held-out and from training tiles, and let networks judge.

Without extractors it writes the numbers of the model card; with them also distances between
distributions, memorisation and the gap between slides, as JSON, Markdown and plots. Everything
that can be wrong about weights, codecs and folders is found before the first tile is made. Made
tiles and features are kept in OUT/kept, so that an evaluation that was stopped, or is asked for
another extractor, goes on from them. They are of one model, its settings and tiles, not of one
release: after an update, remove that folder to start afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cytosyn_aug.model.generator import DEFAULT_STEPS, Sampler, TileGenerator
from cytosyn_aug.model.sampler import time_grid
from training.data.batches import TileSet, evenly_spaced, load_tiles
from training.engine.contact_sheets import write_sheet
from training.evaluation.card_numbers import Sample, card_numbers, check_tiles
from training.evaluation.codecs import check_codecs, count_codecs, recompress
from training.evaluation.extractors import load_extractor
from training.evaluation.report import write_report
from training.evaluation.result_store import ResultStore, images_digest
from training.evaluation.scores import EvaluationSets, Judgement, MadeTiles, judge

TILES_PER_FILE = 256  # of kept tiles
NUM_SAMPLES_SHOWN = 36
NUM_NEAREST_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Configuration of an evaluation.

    Attributes:
        extractors: Names or NAME=SOURCE, see `training.evaluation.extractors`; none for the model
        card alone.
        num_tiles: At most so many tiles of held-out slides, and as many of training slides; None
            for all held-out tiles.
        num_training_tiles: At most so many further training tiles, in which copies are sought.
        unseen: Folder `<slide>/<tile>` of tiles of training slides that the model has never
            seen, such as DATA/unseen of a tile recipe with an `unseen_share`; None takes a share of
            the training tiles, which the report then says it has seen.
        sampler: Sampler of the generated tiles.
        steps: Its velocity evaluations; None for the sampler's usual number.
        guidance_scale: Classifier-free guidance; 1 for none.
        codec: What generated tiles are passed through before an extractor sees them:
            `memory`, `webp:QUALITY` or `jpeg:QUALITY`.
        mixed_codecs: Why lossy and lossless tiles may be compared, if they are.
        seed: Seed of the sampler and of all subsets.
    """

    extractors: tuple[str, ...] = ()
    num_tiles: int | None = None
    num_training_tiles: int = 10_000
    unseen: Path | None = None
    sampler: Sampler = "ab2"
    steps: int | None = None
    guidance_scale: float = 1.0
    codec: str = "memory"
    mixed_codecs: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tiles", "num_training_tiles"):
            number = getattr(self, name)
            if number is not None and number < 8:
                raise ValueError(f"{name} is {number}, expected at least 8")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        if self.sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler is {self.sampler!r}, expected {sorted(DEFAULT_STEPS)}")
        names = [spec.partition("=")[0] for spec in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(f"extractors are {names}, expected each name once")
        # Fails on a codec that is not one.
        recompress(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), self.codec)

    @property
    def num_forwards(self) -> int:
        """Velocity evaluations of a tile."""
        return self.steps if self.steps is not None else DEFAULT_STEPS[self.sampler]


def evaluate(
    generator: TileGenerator, data: Path, out: Path, config: Evaluation
) -> dict[str, object]:
    """Evaluate a model and write `numbers.json`, `samples.png` and, with extractors, a report.

    Args:
        generator: The model.
        data: Folder with `val/<slide>/<tile>`; with extractors also `train/`.
        out: Folder for the results, created if missing.
        config: What to do.

    Returns:
        The content of `numbers.json`: `digest`, the numbers of the model card and, with
        extractors, `tiles` (their sets) and `judgements`.

    Raises:
        ValueError: Tiles, codecs or weights that do not fit.
    """
    codecs = _codecs(data, config) if config.extractors else {}
    kept = ResultStore(out / "kept")
    load = partial(load_extractor, own=generator.encoder, device=generator.device, kept=kept)
    extractors = [load(spec) for spec in config.extractors]
    held_out = load_tiles(data / "val", generator.tile.size_px, config.num_tiles)
    check_tiles(held_out)
    size_px, number = generator.tile.size_px, len(held_out)
    training = _training_tiles(data, size_px, number, config) if extractors else None
    out.mkdir(parents=True, exist_ok=True)
    sample = partial(
        generator.sample,
        steps=config.steps,
        sampler=config.sampler,
        guidance_scale=config.guidance_scale,
    )
    times = time_grid(config.sampler, config.num_forwards)
    make = partial(generate_tiles, generator, sample=sample, times=times, kept=kept)
    made = make(held_out, seed=config.seed)
    numbers: dict[str, object] = {"digest": generator.digest}
    numbers |= card_numbers(
        generator, held_out, made.round_trips, made.generated, sample, load("alexnet")
    )
    chosen = evenly_spaced(number, NUM_SAMPLES_SHOWN)
    write_sheet(out / "samples.png", made.generated[chosen], columns=6)
    judgements: list[Judgement] = []
    if training is not None:
        real, bank = training
        made_of_training = make(real, seed=config.seed + number)
        sets = EvaluationSets(
            held_out=_through_codec(made, config.codec),
            training_slides=_through_codec(made_of_training, config.codec),
            bank=bank,
        )
        for extractor in extractors:
            judgements.append(judge(extractor, sets, seed=config.seed))
            _write_nearest(out / f"nearest_{extractor.name}.png", sets, judgements[-1])
        numbers["tiles"] = describe_sets(sets, codecs, config)
    return write_report(out, numbers, _plain(config), judgements)


def generate_tiles(
    generator: TileGenerator,
    real: TileSet,
    sample: partial[Tensor],
    times: Sequence[float],
    seed: int,
    kept: ResultStore,
) -> MadeTiles:
    """Return real tiles with their round trips and tiles sampled from their features.

    Args:
        generator: The model.
        real: Sources.
        sample: `generator.sample`, with its sampler chosen.
        times: Those the sampler goes through, which are part of what tiles are kept under.
        seed: Tile i is sampled with seed + i.
        kept: Where they are kept.
    """
    model = {"model": generator.digest, "dtype": str(generator.dtype)}
    generated, round_trips = [], []
    for start in range(0, len(real), TILES_PER_FILE):
        part = real.images[start : start + TILES_PER_FILE]
        made_from = model | {"images": images_digest(part), "batch_size": generator.batch_size}
        round_trips.append(kept.get("round_trips", made_from, partial(_reproduce, generator, part)))
        made_from |= sample.keywords | {"times": list(times), "seed": seed + start}
        again = partial(_regenerate, generator, part, sample, seed + start)
        generated.append(kept.get("generated", made_from, again))
    return MadeTiles(real, torch.cat(generated), torch.cat(round_trips))


def _reproduce(generator: TileGenerator, images: Tensor) -> Tensor:
    """Return the round trips of images through the autoencoder."""
    parts = images.split(generator.batch_size)
    latents = (generator.whiten(generator.encode(part).mean) for part in parts)
    return torch.cat([generator.decode(z).cpu() for z in latents])


def _regenerate(generator: TileGenerator, images: Tensor, sample: Sample, seed: int) -> Tensor:
    """Return a tile for each image, sampled from its features."""
    generated = []
    for start in range(0, len(images), generator.batch_size):
        cls = generator.features(images[start : start + generator.batch_size]).cls
        generated.append(sample(cls, seed=seed + start).cpu())
    return torch.cat(generated)


def describe_sets(
    sets: EvaluationSets, codecs: dict[str, dict[str, int]], config: Evaluation
) -> dict[str, object]:
    """Return what a reader must know of the tiles behind the numbers."""
    unseen = config.unseen is not None
    described: dict[str, object] = {
        "held_out": {"tiles": len(sets.held_out.real), "slides": _num_slides(sets.held_out)},
        "training_slides": {
            "tiles": len(sets.training_slides.real),
            "slides": _num_slides(sets.training_slides),
            "seen_in_training": not unseen,
        },
        "bank": {"tiles": len(sets.bank)},
        "codecs": {**codecs, "generated and round trips": config.codec},
    }
    if config.mixed_codecs:
        described["mixed_codecs"] = config.mixed_codecs
    return described


def _plain(config: Evaluation) -> dict[str, object]:
    return asdict(config) | {"unseen": config.unseen and str(config.unseen)}


def _codecs(data: Path, config: Evaluation) -> dict[str, dict[str, int]]:
    folders = {"held out": data / "val", "training": data / "train"}
    if config.unseen is not None:
        folders["unseen tiles of training slides"] = config.unseen
    codecs = {name: count_codecs(folder) for name, folder in folders.items()}
    real = [codec for counts in codecs.values() for codec in counts]
    check_codecs(dict.fromkeys(real), config.codec, config.mixed_codecs)
    return codecs


def _training_tiles(
    data: Path, size_px: int, number: int, config: Evaluation
) -> tuple[TileSet, Tensor]:
    """Return `number` tiles of training slides, and the training tiles to seek copies in.

    Raises:
        ValueError: Too few training tiles to take so many out of them.
    """
    if config.unseen is not None:
        real = load_tiles(config.unseen, size_px, number)
        return real, load_tiles(data / "train", size_px, config.num_training_tiles).images
    tiles = load_tiles(data / "train", size_px, config.num_training_tiles + number)
    if len(tiles) < 2 * number:
        raise ValueError(
            f"got {len(tiles)} training tiles for {number} held-out ones, expected twice as many; "
            f"pass --num {len(tiles) // 2} or fewer, or add training tiles"
        )
    taken = torch.zeros(len(tiles), dtype=torch.bool)
    taken[evenly_spaced(len(tiles), number)] = True
    real = TileSet(tiles.images[taken], tiles.slides, tiles.slide_index[taken])
    return real, tiles.images[~taken]


def _through_codec(made: MadeTiles, codec: str) -> MadeTiles:
    return MadeTiles(
        made.real, recompress(made.generated, codec), recompress(made.round_trips, codec)
    )


def _num_slides(made: MadeTiles) -> int:
    return len(made.real.slide_index.unique())


def _write_nearest(file: Path, sets: EvaluationSets, judgement: Judgement) -> None:
    """Show the generated tiles that come nearest to training tiles, over those tiles."""
    closest = judgement.distances["generated"].argsort()[:NUM_NEAREST_SHOWN]
    pairs: Tensor = torch.cat(
        [sets.held_out.generated[closest], sets.bank[judgement.nearest[closest]]]
    )
    write_sheet(file, pairs, columns=len(closest))
