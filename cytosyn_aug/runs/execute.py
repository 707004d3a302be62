"""Execution of a run, here or by Ray, and its estimate.

Any number of processes, on any number of machines that share OUT, may do one run: each takes units
that nobody holds, of its own shard if it was given one, and whoever ends last writes the manifest.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from cytosyn_aug.autocast import isolated
from cytosyn_aug.io.image_files import check_strictness
from cytosyn_aug.runs.folder import RUN_NAME, RunFolder, Unit, check_free, open_run
from cytosyn_aug.runs.listing import Listing
from cytosyn_aug.runs.pipeline import TileWork
from cytosyn_aug.runs.ray_actors import RayCluster, on_actors
from cytosyn_aug.runs.recipes import Work
from cytosyn_aug.runs.trial import estimate_tiles
from cytosyn_aug.runs.unit_work import Run, UnitWorker, software

_MAX_NAMED = 100
# Progress of slides is fractional: one takes minutes.
_FRACTIONS = "{l_bar}{bar}| {n:.1f}/{total} slides [{elapsed}<{remaining}, {rate_fmt}]"
_BAR = {"tile": {}, "slide": {"bar_format": _FRACTIONS}}


class Summary(NamedTuple):
    """What became of a run, or of one shard of it.

    Attributes:
        out: Its folder.
        counts: Rows of the manifest by status, of this shard.
        failed: Name and reason of tiles that failed, the first hundred.
        is_complete: Whether the manifest is written.
        notes: What was left out of the input.
        estimate: Of a dry run, instead of all this: what it would do, as JSON.
    """

    out: Path
    counts: dict[str, int]
    failed: tuple[tuple[str, str], ...]
    is_complete: bool
    notes: tuple[str, ...] = ()
    estimate: dict[str, Any] | None = None  # Any: JSON


@isolated()
def do_run(run: Run, work: Work) -> Summary:
    """Do a run, or what is left of it, or only say what it would be.

    Raises:
        ValueError: OUT holds another run, or there is no room for this one.
        OSError: OUT cannot be written; what is finished stays, and the same call goes on.
    """
    check_strictness()
    units = cut_units(run.listing, run.unit_items, work.shard)
    if work.dry_run:
        return Summary(run.folder, {}, (), False, run.listing.notes, estimate(run, units, work))
    everything = units if work.shard[1] == 1 else cut_units(run.listing, run.unit_items)
    if not (run.folder / RUN_NAME).is_file():
        _check_room(run, units)  # so that a refusal leaves no folder of this run behind
    with open_run(
        run.folder, run.identity, software(), overwrite=work.overwrite, context=run.context
    ) as folder:
        to_do = folder.to_do(units)
        if to_do:
            _check_room(run, to_do)
            _do_units(run, work, folder, units, to_do)
        counts, failed = _summarise(folder, units)
        return Summary(run.folder, counts, failed, folder.finish(everything), run.listing.notes)


def cut_units(listing: Listing, unit_items: int, shard: tuple[int, int] = (0, 1)) -> list[Unit]:
    """Return the units of a shard: the same ones, whoever asks.

    Args:
        listing: The tiles.
        unit_items: Items of a unit.
        shard: Index and number of shards.
    """
    if unit_items < 1:
        raise ValueError(f"unit_tiles is {unit_items}, expected at least 1")
    units = []
    for number in range(shard[0], -(-len(listing) // unit_items), shard[1]):
        start, stop = number * unit_items, min((number + 1) * unit_items, len(listing))
        units.append(Unit(number, start, stop, listing.digest(start, stop)))
    return units


def estimate(run: Run, units: Sequence[Unit], work: Work) -> dict[str, Any]:
    """Return what a run would do: counts, bytes and time."""
    to_do = list(units)
    if not (run.folder / RUN_NAME).is_file():
        check_free(run.folder)
    elif not work.overwrite:
        with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
            to_do = folder.to_do(units)
    return {
        "input": run.identity["input"],
        "notes": run.listing.notes,
        "unusable": run.listing.num_errors(),
        "with_masks": run.listing.num_masks(),
        "units": len(units),
        "units_to_do": len(to_do),
        **_trial(run, to_do, work.readers),
        "free_bytes": _free_bytes(run.folder),
    }


def _trial(run: Run, units: Sequence[Unit], readers: int) -> dict[str, Any]:  # Any: JSON
    if isinstance(run.work, TileWork):
        return estimate_tiles(run.work, units)
    return run.work.estimate(units, readers)


def _do_units(
    run: Run, work: Work, folder: RunFolder, units: Sequence[Unit], to_do: Sequence[Unit]
) -> None:
    folder.prepare()
    total = sum(unit.stop - unit.start for unit in units)
    initial = total - sum(unit.stop - unit.start for unit in to_do)
    do = _here if work.ray is None else partial(_on_ray, work.ray)
    with (
        closing(do(run, work, folder, to_do)) as counts,
        tqdm(
            total=total,
            initial=initial,
            unit=run.work.noun,
            disable=not work.progress,
            **_BAR[run.work.noun],
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar,
    ):
        for count in counts:
            bar.update(count)


def _here(
    run: Run, work: Work, folder: RunFolder, to_do: Sequence[Unit]
) -> Generator[float, None, None]:
    """Do units in this process; yield how much more is given to the device, or failed."""
    steps = run.work.execute(to_do, folder, readers=work.readers, writers=work.writers)
    with closing(steps) as counts:
        for _, count in counts:
            yield count


def _on_ray(
    cluster: RayCluster, run: Run, work: Work, folder: RunFolder, to_do: Sequence[Unit]
) -> Generator[float, None, None]:
    """Do units in Ray actors; yield how much more is done, failed or given up."""
    own = torch.device("cpu") if run.generator is None else run.generator.device
    device = torch.device(cluster.device or own).type
    if cluster.cpus is None:
        cluster = replace(cluster, cpus=torch.get_num_threads() if device == "cpu" else 1)
    if cluster.gpus is None:
        cluster = replace(cluster, gpus=0 if device == "cpu" else 1)
    num_threads = cluster.cpus if device == "cpu" else None
    make = partial(UnitWorker, run, work.readers, work.writers, device, num_threads)
    answers = on_actors(make, to_do, cluster, shared_bytes=run.listing.table.nbytes)
    with closing(answers):
        for unit, death in answers:
            if death is not None:
                run.work.give_up(unit, folder, death.reason)
            yield unit.stop - unit.start


def _check_room(run: Run, units: Sequence[Unit]) -> None:
    needed, free = run.work.needed_bytes(units), _free_bytes(run.folder)
    if free < needed:
        raise ValueError(
            f"{run.folder} has {free:,} bytes free, the results take about {needed:,}; make room, "
            "or choose another folder or --format"
        )


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _summarise(
    folder: RunFolder, units: Sequence[Unit]
) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    counts: Counter[str] = Counter()
    failed: list[tuple[str, str]] = []
    for table in folder.rows(units):
        statuses = table["status"].to_pylist()
        counts.update(statuses)
        if "failed" in statuses and len(failed) < _MAX_NAMED:
            sources, reasons = table["source"].to_pylist(), table["reason"].to_pylist()
            rows = zip(statuses, sources, reasons, strict=True)
            failed += [(name, reason) for status, name, reason in rows if status == "failed"]
    return dict(sorted(counts.items())), tuple(failed[:_MAX_NAMED])
