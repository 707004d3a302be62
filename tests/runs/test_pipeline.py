"""The pipeline: bounded, in order, and ended by what ends it."""

import statistics
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.runs import pipeline
from cytosyn_aug.runs.edits import EditedBatch
from cytosyn_aug.runs.execute import cut_units
from cytosyn_aug.runs.folder import open_run
from cytosyn_aug.runs.listing import Item, make_listing
from cytosyn_aug.runs.outputs import Destination
from cytosyn_aug.runs.pipeline import TileWork
from cytosyn_aug.runs.reading import LoadedTile


@dataclass
class Recorder:
    """Counts tiles on their way, and stands for model and output."""

    side: int = 8
    read: list = field(default_factory=list)
    edited: list = field(default_factory=list)
    written: list = field(default_factory=list)
    committed: list = field(default_factory=list)
    most_waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self, item):
        if "bad" in item.name:
            raise ItemError("is bad")
        with self.lock:
            self.read.append(item.name)
            self.most_waiting = max(self.most_waiting, len(self.read) - len(self.edited))
        return LoadedTile(item, np.zeros((self.side, self.side, 3), np.uint8), item.name)

    def edit(self, batch):
        time.sleep(0.002)
        with self.lock:
            self.edited += [tile.item.name for tile in batch]
        images = torch.zeros(len(batch), 3, self.side, self.side, dtype=torch.uint8)
        is_kept = torch.ones(len(batch), dtype=torch.bool)
        yield EditedBatch(images=images, is_tissue=is_kept, is_finite=is_kept)

    def write(self, key, result):
        with self.lock:
            self.written.append(result.source.item.name)
        return {"output": result.source.item.name, "mask": ""}

    def discard(self, key, item):
        pass

    def commit(self, unit):
        self.committed.append(unit)


def work_of(recorder, names):
    generator = SimpleNamespace(batch_size=4, batches=SimpleNamespace(fixed=nullcontext))
    return TileWork(
        generator=generator,
        listing=make_listing("table", None, [Item(name) for name in names]),
        read=recorder.load,
        edit=recorder.edit,
        destination=Destination(open=lambda folder: recorder, bytes_per_pixel=1),
    )


def run(work, folder, unit_tiles=10, **threads):
    units = cut_units(work.listing, unit_tiles)
    with open_run(folder, {}, {}, overwrite=False) as run_folder:
        run_folder.prepare()
        counts = list(work.execute(units, run_folder, **threads))
        tables = list(run_folder.rows(units))
    return counts, [row for table in tables for row in table.to_pylist()]


def test_every_tile_comes_once_and_in_order(tmp_path):
    names = [f"{k:03d}{'bad' if k % 7 == 3 else ''}.png" for k in range(45)]
    recorder = Recorder()
    counts, rows = run(work_of(recorder, names), tmp_path / "out")
    assert sum(count for _, count in counts) == 45
    assert [row["source"] for row in rows] == names
    failed = [row["source"] for row in rows if row["status"] == "failed"]
    assert failed == [name for name in names if "bad" in name]
    assert sorted(recorder.written) == sorted(set(names) - set(failed))
    assert recorder.committed == [0, 1, 2, 3, 4]


def test_tiles_that_wait_are_bounded_in_number_and_in_bytes(tmp_path, monkeypatch):
    names = [f"{k:03d}.png" for k in range(200)]
    recorder = Recorder()
    monkeypatch.setattr(pipeline, "_BATCHES_AHEAD", 3)
    run(work_of(recorder, names), tmp_path / "a", readers=2)
    assert recorder.most_waiting <= 12 + 4 + 2  # and a batch, and what is in readers' hands
    monkeypatch.setattr(pipeline, "_BATCHES_AHEAD", 16)
    monkeypatch.setattr(pipeline, "_MAX_WAITING_BYTES", 5 * 64 * 64 * 3)
    recorder = Recorder(side=64)
    run(work_of(recorder, names), tmp_path / "b", readers=2)
    assert recorder.most_waiting <= 5 + 4 + 2


@dataclass
class Slow(Recorder):
    """Reads, edits and writes in 10, 40 and 10 ms, and notes when the device was at work."""

    spans: list = field(default_factory=list)

    def load(self, item):
        time.sleep(0.01)
        return super().load(item)

    def edit(self, batch):
        began = time.perf_counter()
        time.sleep(0.04)
        self.spans.append((began, time.perf_counter()))
        yield from super().edit(batch)

    def write(self, key, result):
        time.sleep(0.01)
        return super().write(key, result)


def test_the_device_does_not_wait_for_reading_and_writing(tmp_path, monkeypatch):
    """Also not between units: a batch of four takes 40 ms to read, or to write, by one thread."""
    names = [f"{k:03d}.png" for k in range(64)]
    monkeypatch.setattr(pipeline, "_BATCHES_AHEAD", 16)  # of four tiles: 64, as with batches of 16
    recorder = Slow()
    run(work_of(recorder, names), tmp_path / "out", unit_tiles=8)
    pauses = [later[0] - earlier[1] for earlier, later in pairwise(recorder.spans)]
    assert len(pauses) == 15
    # Waiting for four tiles to be read or written would take as long as the device does.
    assert statistics.median(pauses) < 0.01
    assert statistics.median(pauses[1::2]) < 0.01  # between units, of two batches each


@pytest.mark.parametrize("where", ["edit", "write", "commit"])
def test_any_other_error_ends_the_run_and_lets_go_of_units(tmp_path, where):
    class Broken(Recorder):
        pass

    def fail(*_):
        raise OSError("broken")

    names = [f"{k:03d}.png" for k in range(40)]
    broken = Broken()
    setattr(broken, where, fail)
    with pytest.raises(OSError, match="broken"):
        run(work_of(broken, names), tmp_path / "out")
    recorder = Recorder()
    _, rows = run(work_of(recorder, names), tmp_path / "out")
    assert [row["source"] for row in rows] == names
