"""A run, and what one process does of it: its units, on its own copy of the model.

The process of a command does them one after the other; a worker elsewhere is sent the run as a
pickle, in which the model is a handle (`cytosyn_aug.model.loading`), and loads the weights itself.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import torch

from cytosyn_aug.io.image_files import check_strictness
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.folder import RUN_NAME, Unit, open_run
from cytosyn_aug.runs.listing import Listing
from cytosyn_aug.runs.pipeline import TileWork
from cytosyn_aug.runs.slides import SlideWork


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command does, before anything is written.

    Attributes:
        folder: Where receipts and the manifest go: OUT.
        identity: What makes it this run, as JSON holds it: recipe, input, model.
        context: What a report needs, recorded but not compared, such as where the input lies.
        work: What is done to the items of a listing: to tiles, or to whole slides.
    """

    folder: Path
    identity: Mapping[str, Any]
    context: Mapping[str, Any]
    work: TileWork | SlideWork

    @property
    def listing(self) -> Listing:
        """The items."""
        return self.work.listing

    @property
    def generator(self) -> TileGenerator | None:
        """The model; None if none is needed."""
        return self.work.generator

    @property
    def unit_items(self) -> int:
        """Items per unit."""
        return int(self.identity["unit_tiles"])


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
        self._readers, self._writers = readers, writers
        self._work = run.work.shared()

    def do(self, unit: Unit) -> None:
        """Do a unit, unless another process holds it or has done it."""
        run = self._run
        # Held while there is a unit only: an actor that waits must not keep others from finishing.
        with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
            steps = self._work.execute([unit], folder, readers=self._readers, writers=self._writers)
            for _ in steps:
                pass

    def _check_seen(self) -> None:
        """Refuse to begin a run of its own, or to call every tile missing."""
        for file in (self._run.folder / RUN_NAME, self._run.listing.root):
            if not file.exists():
                raise FileNotFoundError(
                    f"{socket.gethostname()} does not see {file}; IN and OUT must be on file "
                    "systems that all machines share, given by absolute paths"
                )


def software() -> dict[str, str]:
    """Return the versions that decide pixels and bytes."""
    versions = {"torch": torch, "pillow": PIL, "numpy": np, "pyarrow": pa}
    return {name: str(module.__version__) for name, module in versions.items()}
