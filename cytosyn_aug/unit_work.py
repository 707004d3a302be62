"""What one process does of a run: its units, on its own copy of the model.

The process of a command does them one after the other; a worker elsewhere is sent the run as a
pickle, in which the model is a handle (`cytosyn_aug.origin`), and loads the weights itself.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL
import pyarrow as pa
import torch

from cytosyn_aug.batch_edits import Edit, Edited
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.image_files import check_strictness
from cytosyn_aug.listing import Item, Listing
from cytosyn_aug.outputs import Output
from cytosyn_aug.pipeline import Job, Row, Threads, run_job
from cytosyn_aug.reading import Loaded
from cytosyn_aug.run_folder import RUN_NAME, RunFolder, Unit, open_run


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command does, before anything is written.

    Attributes:
        folder: Where receipts and the manifest go: OUT.
        identity: What makes it this run, as JSON holds it.
        context: What a report needs, recorded but not compared; see `cytosyn_aug.run_folder`.
        generator: The model.
        listing: The tiles.
        unit_tiles: Tiles of a work unit.
        read: See `cytosyn_aug.pipeline.Job`.
        edit: See `Job`.
        make_output: Returns where results go, making what must exist.
        num_variants: Results of a tile.
        constants: See `Job`.
        done: See `Job`.
        result_bytes: Of one result, about.
    """

    folder: Path
    identity: Mapping[str, Any]
    context: Mapping[str, Any]
    generator: TileGenerator
    listing: Listing
    unit_tiles: int
    read: Callable[[Item], Loaded]
    edit: Edit
    make_output: Callable[[RunFolder], Output]
    num_variants: int
    constants: Row
    done: str
    result_bytes: float


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
        run.generator.load_on(device)
        run.generator.batches.is_static = True
        self._threads = job_threads(run, readers, writers)
        self._job: Job | None = None
        self._lock = threading.Lock()

    def do(self, unit: Unit) -> None:
        """Do a unit, unless another process holds it or has done it."""
        run = self._run
        # Held while there is a unit only: an actor that waits must not keep others from finishing.
        with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
            for _ in run_job(self._job_for(folder), [unit], folder, self._threads):
                pass

    def _job_for(self, folder: RunFolder) -> Job:
        with self._lock:
            if self._job is None:
                self._job = make_job(self._run, folder, in_turns(self._run.edit))
            return self._job

    def _check_seen(self) -> None:
        """Refuse to begin a run of its own, or to call every tile missing."""
        for file in (self._run.folder / RUN_NAME, self._run.listing.root):
            if not file.exists():
                raise FileNotFoundError(
                    f"{socket.gethostname()} does not see {file}; IN and OUT must be on file "
                    "systems that all machines share, given by absolute paths"
                )


def make_job(run: Run, folder: RunFolder, edit: Edit | None = None) -> Job:
    """Return what is done to every tile.

    Args:
        run: Of a command.
        folder: Its folder.
        edit: In place of the run's own.
    """
    return Job(
        listing=run.listing,
        read=run.read,
        edit=edit or run.edit,
        output=run.make_output(folder),
        num_variants=run.num_variants,
        batch_size=run.generator.batch_size,
        done=run.done,
        constants=run.constants,
    )


def job_threads(run: Run, readers: int, writers: int) -> Threads:
    """Return the threads of a process, which may read four batches ahead."""
    return Threads(readers, writers, read_ahead=4 * run.generator.batch_size)


def in_turns(edit: Edit) -> Edit:
    """Return an edit that several threads may call: one batch has the device at a time."""
    turn = threading.Lock()

    def edit_in_turn(batch: Sequence[Loaded]) -> Iterator[Edited]:
        with turn:
            yield from edit(batch)

    return edit_in_turn


def software() -> dict[str, str]:
    """Return the versions that decide pixels and bytes."""
    versions = {"torch": torch, "pillow": PIL, "numpy": numpy, "pyarrow": pa}
    return {name: str(module.__version__) for name, module in versions.items()}


@contextmanager
def fixed_shapes(generator: TileGenerator) -> Iterator[None]:
    """Pad every batch to one size, so that a tile's bytes do not depend on how many are left."""
    before = generator.batches.is_static
    generator.batches.is_static = True
    try:
        yield
    finally:
        generator.batches.is_static = before
