"""What one process does of a run: its units, on its own copy of the model.

The process of a command does them one after the other; a worker elsewhere is sent the run as a
pickle, in which the model is a handle (`cytosyn_aug.model.loading`), and loads the weights itself.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL
import pyarrow as pa
import torch

from cytosyn_aug.io.image_files import ItemError, check_strictness
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.edits import Edit, EditedBatch
from cytosyn_aug.runs.folder import RUN_NAME, RunFolder, Unit, open_run
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.outputs import Output
from cytosyn_aug.runs.pipeline import Job, Row, Threads, give_up, run_job
from cytosyn_aug.runs.reading import Loaded


class UnitJob(Protocol):
    """What is done to the units of a run by one process, in an open folder."""

    def do(
        self, units: Sequence[Unit], folder: RunFolder
    ) -> Generator[tuple[Unit, float], None, None]:
        """Do units that no other process holds; yield the unit at hand and how much more of it."""

    def give_up(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """Name all of a unit as failed, unless another process holds it or has done it."""


class Task(Protocol):
    """What is to be done to the items of a run: to tiles, or to whole slides."""

    def job(self, folder: RunFolder, readers: int, writers: int, *, is_shared: bool) -> UnitJob:
        """Return what does units; if it is shared, several threads may ask it at a time."""

    def needed_bytes(self, units: Sequence[Unit]) -> int:
        """Return about how many bytes the results of units take."""

    def estimate(self, units: Sequence[Unit], readers: int) -> dict[str, Any]:  # Any: JSON
        """Return what units would be, from a trial of a few: results, bytes, rate and hours."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command does, before anything is written.

    Attributes:
        folder: Where receipts and the manifest go: OUT.
        identity: What makes it this run, as JSON holds it.
        context: What a report needs, recorded but not compared; see `cytosyn_aug.runs.folder`.
        listing: The items.
        unit_items: How many of them are a work unit.
        generator: The model; None if none is needed.
        task: What is done.
        noun: What an item is.
    """

    folder: Path
    identity: Mapping[str, Any]
    context: Mapping[str, Any]
    listing: Listing
    unit_items: int
    generator: TileGenerator | None
    task: Task
    noun: Literal["tile", "slide"] = "tile"


@dataclass(frozen=True, kw_only=True)
class TileTask:
    """A `Task` over tiles.

    Attributes:
        generator: The model.
        listing: See `cytosyn_aug.runs.pipeline.Job`, as for all down to `constants`.
        read: Reads a tile.
        edit: Makes variants of tiles.
        make_output: Returns where results go, making what must exist.
        num_variants: Results of a tile.
        done: Status of a tile that went well.
        constants: Cells that are the same in every row.
        bytes_per_pixel: Of results, about.
        encode: From uint8 [H, W, 3] to the bytes of a file; None if results are no images.
    """

    generator: TileGenerator
    listing: Listing
    read: Callable[[Item], Loaded]
    edit: Edit
    make_output: Callable[[RunFolder], Output]
    num_variants: int
    done: str
    constants: Row
    bytes_per_pixel: float
    encode: Callable[[np.ndarray], bytes] | None

    def job(self, folder: RunFolder, readers: int, writers: int, *, is_shared: bool) -> TileJob:
        """See `Task`."""
        job = Job(
            listing=self.listing,
            read=self.read,
            edit=in_turns(self.edit) if is_shared else self.edit,
            output=self.make_output(folder),
            num_variants=self.num_variants,
            batch_size=self.generator.batch_size,
            done=self.done,
            constants=self.constants,
        )
        return TileJob(self.generator, job, readers, writers)

    def needed_bytes(self, units: Sequence[Unit]) -> int:
        """See `Task`; tiles are as large as the first one that can be read."""
        first = next(self._readable(units), None)
        if first is None:
            return 0
        # Where tiles are drawn from nothing, none is read.
        num_pixels = math.prod(first.pixels.shape[:2]) or self.generator.tile.size_px**2
        return round(_num_tiles(units) * self.num_variants * num_pixels * self.bytes_per_pixel)

    def estimate(self, units: Sequence[Unit], readers: int) -> dict[str, Any]:  # Any: JSON
        """See `Task`; the trial is two batches, of the device only."""
        num_tiles = _num_tiles(units)
        rate, result_bytes = self._trial(units)
        return {
            "tiles_to_do": num_tiles,
            "results": num_tiles * self.num_variants,
            "output_bytes": round(num_tiles * self.num_variants * result_bytes),
            "tiles_per_s": None if rate is None else round(rate, 2),
            "hours": None if rate is None else round(num_tiles / rate / 3600, 3),
        }

    def _readable(self, units: Sequence[Unit]) -> Iterator[Loaded]:
        """Yield tiles of the first units, as far as they can be read."""
        for unit in units[:4]:
            for item in self.listing.items(unit.start, unit.stop):
                try:
                    yield self.read(item)
                except ItemError:
                    continue

    def _trial(self, units: Sequence[Unit]) -> tuple[float | None, float]:
        """Return tiles per second of the device, and bytes of a result."""
        batch: list[Loaded] = []
        for tile in self._readable(units):
            if not batch or tile.pixels.shape == batch[0].pixels.shape:
                batch.append(tile)
            if len(batch) == self.generator.batch_size:
                break
        if not batch:
            return None, 0.0
        with self.generator.batches.fixed():
            for _ in range(2):  # the first one warms up
                began = time.perf_counter()
                results = [edited.images.cpu() for edited in self.edit(batch)]
                seconds = time.perf_counter() - began
        pixels = results[-1].permute(0, 2, 3, 1).contiguous().numpy()
        if self.encode is None:
            result_bytes = self.bytes_per_pixel * math.prod(pixels.shape[1:3])
        else:
            result_bytes = float(np.mean([len(self.encode(image)) for image in pixels]))
        return self.generator.batch_size / seconds, result_bytes


class TileJob:
    """Tiles through readers, the model and writers; see `cytosyn_aug.runs.pipeline`.

    Args:
        generator: The model.
        job: What is done to a tile.
        readers: Threads that decode.
        writers: Threads that encode and write.
    """

    def __init__(self, generator: TileGenerator, job: Job, readers: int, writers: int) -> None:
        self._generator, self._job = generator, job
        self._threads = Threads(readers, writers, read_ahead=4 * generator.batch_size)

    def do(
        self, units: Sequence[Unit], folder: RunFolder
    ) -> Generator[tuple[Unit, float], None, None]:
        """See `UnitJob`; counts tiles that were given to the device, or failed."""
        with (
            self._generator.batches.fixed(),
            closing(run_job(self._job, units, folder, self._threads)) as counts,
        ):
            yield from counts

    def give_up(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """See `UnitJob`."""
        give_up(self._job, unit, folder, reason)


class UnitWorker:
    """Does units of a run in a process of its own, up to two at a time.

    Two units share the device in turns of a batch, so that it goes on while one of them is finished
    and the other begun.

    Args:
        run: What to do; its generator is not loaded yet.
        readers: Threads that decode, for each of the two.
        writers: Threads that encode and write, for each of the two.
        device: Where to load the model.
        num_threads: Threads of torch; None for its own choice.

    Raises:
        FileNotFoundError: This machine does not see OUT or IN.
        ValueError, OSError: The model cannot be loaded here.
    """

    def __init__(
        self, run: Run, readers: int, writers: int, device: str, num_threads: int | None
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        check_strictness()
        self._run = run
        self._check_seen()
        if run.generator is not None:
            run.generator.load_on(device)
            run.generator.batches.is_static = True
        self._threads = readers, writers
        self._job: UnitJob | None = None
        self._lock = threading.Lock()

    def do(self, unit: Unit) -> None:
        """Do a unit, unless another process holds it or has done it."""
        run = self._run
        # Held while there is a unit only: an actor that waits must not keep others from finishing.
        with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
            for _ in self._job_for(folder).do([unit], folder):
                pass

    def _job_for(self, folder: RunFolder) -> UnitJob:
        with self._lock:
            if self._job is None:
                self._job = self._run.task.job(folder, *self._threads, is_shared=True)
            return self._job

    def _check_seen(self) -> None:
        """Refuse to begin a run of its own, or to call every tile missing."""
        for file in (self._run.folder / RUN_NAME, self._run.listing.root):
            if not file.exists():
                raise FileNotFoundError(
                    f"{socket.gethostname()} does not see {file}; IN and OUT must be on file "
                    "systems that all machines share, given by absolute paths"
                )


def in_turns(edit: Edit) -> Edit:
    """Return an edit that several threads may call: one batch has the device at a time."""
    turn = threading.Lock()

    def edit_in_turn(batch: Sequence[Loaded]) -> Iterator[EditedBatch]:
        with turn:
            yield from edit(batch)

    return edit_in_turn


def software() -> dict[str, str]:
    """Return the versions that decide pixels and bytes."""
    versions = {"torch": torch, "pillow": PIL, "numpy": np, "pyarrow": pa}
    return {name: str(module.__version__) for name, module in versions.items()}


def _num_tiles(units: Sequence[Unit]) -> int:
    return sum(unit.stop - unit.start for unit in units)
