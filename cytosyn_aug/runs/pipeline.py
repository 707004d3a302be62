"""Work on tiles: units through reader threads, the device, and writer threads, all busy at once.

Reader threads decode ahead; this thread only gives work to the device; writer threads wait for the
device, encode and write; one more thread finishes units. Every queue is bounded: in memory are at
most four batches of decoded tiles (or 256 MB of them), eight batches of results and the rows of two
unfinished units.

A tile that cannot be used costs itself and is named. An error of anything else ends the run: what
is finished stays, and the next run goes on from there.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.edits import BatchEdit, EditedBatch
from cytosyn_aug.runs.folder import RunFolder, Unit
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.outputs import Destination, Output, Result, ResultKey
from cytosyn_aug.runs.reading import LoadedTile

# Larger tiles go through in smaller batches, so that memory stays the same.
_MAX_BATCH_PIXELS = 16 * 1024 * 1024
_MAX_WAITING_BYTES = 256 * 1024 * 1024
_BATCHES_AHEAD = 4  # of decoded tiles
_PENDING_WRITES = 8  # batches
Row = dict[str, Any]  # one of `cytosyn_aug.runs.receipts.ROW_SCHEMA`; Any: cells


@dataclass(frozen=True, kw_only=True)
class TileWork:
    """What is done to every tile of a listing.

    Attributes:
        generator: The model.
        listing: The tiles.
        read: From an item to a tile, in any thread; raises `ItemError`.
        edit: From tiles of one size to their variants, in the caller's thread.
        destination: Where results go.
        num_variants: Results per tile.
        done: Status of a tile that went well.
        constants: Cells that are the same in every row of the manifest.
    """

    generator: TileGenerator
    listing: Listing
    read: Callable[[Item], LoadedTile]
    edit: BatchEdit
    destination: Destination
    num_variants: int = 1
    done: str = "edited"
    constants: Row = field(default_factory=dict)

    noun: ClassVar[Literal["tile"]] = "tile"

    def execute(
        self, units: Iterable[Unit], folder: RunFolder, *, readers: int = 4, writers: int = 4
    ) -> Generator[tuple[Unit, int], None, None]:
        """Do units, skipping those that other processes hold; yield after each batch.

        Args:
            units: Which, in this order.
            folder: Where receipts go.
            readers: Threads that decode.
            writers: Threads that encode and write.

        Yields:
            The unit at hand, and how many more of its tiles were given to the device, or failed.

        Raises:
            OSError: The output cannot be written.
            ValueError: A name leads out of the output.
        """
        output = self.destination.open(folder)
        with (
            self.generator.batches.fixed(),
            closing(_run_units(self, output, units, folder, readers, writers)) as counts,
        ):
            yield from counts

    def give_up(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """Name all tiles of a unit as failed, unless another process holds it or has done it.

        For units that no process survived; the next run tries them again.

        Raises:
            OSError: The output cannot be written.
        """
        output = self.destination.open(folder)
        with folder.claim(unit) as is_mine:
            if not is_mine:
                return
            rows: list[Row] = []
            for row, item in enumerate(self.listing.items(unit.start, unit.stop), unit.start):
                key = ResultKey(unit.number, row, -1)
                rows += [cells for _, cells in _leave(self, output, key, item, "failed", reason)]
            output.commit(unit.number)
            folder.write_receipt(unit, rows)

    def needed_bytes(self, units: Sequence[Unit]) -> int:
        """Return about how many bytes results take; all tiles are taken to be like the first."""
        first = next(self.readable(units), None)
        if first is None:
            return 0
        # Where tiles are drawn from nothing, none is read.
        num_pixels = math.prod(first.pixels.shape[:2]) or self.generator.tile.size_px**2
        num_results = num_tiles(units) * self.num_variants
        return round(num_results * num_pixels * self.destination.bytes_per_pixel)

    def readable(self, units: Sequence[Unit]) -> Iterator[LoadedTile]:
        """Yield tiles of the first four units, as far as they can be read."""
        for unit in units[:4]:
            for item in self.listing.items(unit.start, unit.stop):
                try:
                    yield self.read(item)
                except ItemError:
                    continue

    def shared(self) -> TileWork:
        """Return the same work for several threads of one process.

        One batch has the device at a time, and all results go to one opened destination.
        """
        destination = replace(self.destination, open=_opened_once(self.destination.open))
        return replace(self, edit=_in_turns(self.edit), destination=destination)


class _Reading(NamedTuple):
    """A tile being read: its unit, the hold on that, its row in the listing, and itself."""

    unit: Unit
    claim: ExitStack
    row: int
    item: Item
    tile: Future[LoadedTile]


_Batch = list[tuple[int, LoadedTile]]  # tiles of one size, with their rows in the listing
_Rows = list[tuple[ResultKey, Row]]  # of the manifest


def num_tiles(units: Sequence[Unit]) -> int:
    """Return how many tiles units have."""
    return sum(unit.stop - unit.start for unit in units)


def _run_units(
    work: TileWork,
    output: Output,
    units: Iterable[Unit],
    folder: RunFolder,
    num_readers: int,
    num_writers: int,
) -> Generator[tuple[Unit, int], None, None]:
    claims: set[ExitStack] = set()
    with ExitStack() as stack:
        stack.callback(_release, claims)
        finisher = _pool(stack, 1)
        writers = _pool(stack, num_writers)
        readers = _pool(stack, num_readers)
        readings = _read_ahead(work, _claimed(work, units, folder, claims), readers, num_readers)
        stack.callback(readings.close)
        writing: deque[Future[_Rows]] = deque()
        finishing: deque[Future[None]] = deque()
        for (unit, claim), own in groupby(readings, lambda reading: (reading.unit, reading.claim)):
            futures: list[Future[_Rows]] = []
            for begun, count in _run_unit(work, output, unit, own, writers):
                futures += begun
                writing.extend(begun)
                while writing and (len(writing) > _PENDING_WRITES or writing[0].done()):
                    writing.popleft().result()
                yield unit, count
            finishing.append(finisher.submit(_finish, output, unit, futures, folder, claim))
            while len(finishing) > 1:
                finishing.popleft().result()
        for future in finishing:
            future.result()


def _pool(stack: ExitStack, num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _release(claims: set[ExitStack]) -> None:
    for claim in list(claims):
        claim.close()


def _claimed(
    work: TileWork, units: Iterable[Unit], folder: RunFolder, claims: set[ExitStack]
) -> Iterator[tuple[Unit, ExitStack, int, Item]]:
    """Yield the items of one unit after the other, of those that nobody else holds."""
    for unit in units:
        claim = ExitStack()
        if not claim.enter_context(folder.claim(unit)):
            claim.close()
            continue
        claims.add(claim)
        claim.callback(claims.discard, claim)
        for row, item in enumerate(work.listing.items(unit.start, unit.stop), unit.start):
            yield unit, claim, row, item


def _read_ahead(
    work: TileWork,
    items: Iterator[tuple[Unit, ExitStack, int, Item]],
    readers: ThreadPoolExecutor,
    num_readers: int,
) -> Generator[_Reading, None, None]:
    waiting: deque[_Reading] = deque()
    most = _BATCHES_AHEAD * work.generator.batch_size
    limit, largest = 2 * num_readers, 1  # few, until their size is known
    for item in items:
        waiting.append(_Reading(*item, readers.submit(work.read, item[3])))
        while len(waiting) > limit:
            reading = waiting.popleft()
            yield reading
            if reading.tile.exception() is None:
                largest = max(largest, reading.tile.result().pixels.nbytes)
                limit = max(1, min(most, _MAX_WAITING_BYTES // largest))
    while waiting:
        yield waiting.popleft()


def _run_unit(
    work: TileWork,
    output: Output,
    unit: Unit,
    readings: Iterable[_Reading],
    writers: ThreadPoolExecutor,
) -> Iterator[tuple[list[Future[_Rows]], int]]:
    """Give a unit's tiles to the device, batches of one size each; yield what is being written."""
    waiting: dict[tuple[int, ...], _Batch] = {}
    for reading in readings:
        try:
            tile = reading.tile.result()
            reason = ("rejected", tile.rejected)
        except ItemError as error:
            reason = ("failed", str(error))
        if reason[1]:
            key = ResultKey(unit.number, reading.row, -1)
            yield [writers.submit(_leave, work, output, key, reading.item, *reason)], 1
            continue
        shape = tile.pixels.shape
        batch = waiting.setdefault(shape, [])
        batch.append((reading.row, tile))
        most = max(1, _MAX_BATCH_PIXELS // max(1, math.prod(shape[:2])))
        if len(batch) >= min(work.generator.batch_size, most):
            yield _edit(work, output, unit, waiting.pop(shape), writers), len(batch)
    for batch in waiting.values():
        yield _edit(work, output, unit, batch, writers), len(batch)


def _edit(
    work: TileWork, output: Output, unit: Unit, batch: _Batch, writers: ThreadPoolExecutor
) -> list[Future[_Rows]]:
    variants = enumerate(work.edit([tile for _, tile in batch]))
    return [writers.submit(_write, work, output, unit, batch, *variant) for variant in variants]


def _write(
    work: TileWork, output: Output, unit: Unit, batch: _Batch, variant: int, edited: EditedBatch
) -> _Rows:
    """Fetch results from the device, write them, and return their rows of the manifest."""
    pixels = edited.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    fields = {name: value.cpu() for name, value in edited.fields.items()}
    is_tissue, is_finite = edited.is_tissue.tolist(), edited.is_finite.tolist()
    columns: dict[str, Sequence[object]] = {
        "seed": edited.seeds or [0] * len(batch),
        "reference": edited.references or [""] * len(batch),
        "strength": edited.strengths or [None] * len(batch),
        "similarity": _numbers(edited.similarity, len(batch)),
        "colour_distance": _numbers(edited.distance, len(batch)),
    }
    rows = []
    for k, (row, tile) in enumerate(batch):
        key = ResultKey(unit.number, row, variant)
        cells = _cells(work, key, tile.item) | {"variant": variant}
        own = {"key": tile.key} | {name: column[k] for name, column in columns.items()}
        refusal = edited.refusals[k] if edited.refusals else ""
        if not is_finite[k]:
            reason = "the networks gave values that are not finite; use float32 or bfloat16"
            cells |= {"status": "failed", "reason": reason}
            output.discard(key, tile.item)
        elif refusal:
            cells |= own | {"status": "rejected", "reason": refusal}
            output.discard(key, tile.item)
        else:
            status = work.done if is_tissue[k] else "blank"
            cells |= own | {"status": status, "reason": "; ".join(tile.notes)}
            record = {name: value[k] for name, value in fields.items()}
            cells |= output.write(key, Result(pixels[k], tile, record))
        rows.append((key, cells))
    return rows


def _numbers(values: Tensor | None, length: int) -> Sequence[float | None]:
    """Return the cells of a column: None where a number is not known."""
    if values is None:
        return [None] * length
    return [None if math.isnan(value) else value for value in values.tolist()]


def _leave(
    work: TileWork, output: Output, key: ResultKey, item: Item, status: str, reason: str
) -> _Rows:
    """Name a tile without results, and remove those of an earlier attempt."""
    for variant in range(work.num_variants if item.stem else 0):
        output.discard(key._replace(variant=variant), item)
    return [(key, _cells(work, key, item) | {"status": status, "reason": reason})]


def _cells(work: TileWork, key: ResultKey, item: Item) -> Row:
    return work.constants | {
        "source": item.name,
        "label": item.label,
        "slide": item.slide,
        "x": item.x,
        "y": item.y,
        "mpp": item.mpp,
        "unit": key.unit,
    }


def _finish(
    output: Output,
    unit: Unit,
    futures: Sequence[Future[_Rows]],
    folder: RunFolder,
    claim: ExitStack,
) -> None:
    """Complete a unit once all of it is written, and let go of it."""
    rows = [row for future in futures for row in future.result()]
    output.commit(unit.number)
    folder.write_receipt(unit, [cells for _, cells in sorted(rows, key=lambda row: row[0])])
    claim.close()


def _in_turns(edit: BatchEdit) -> BatchEdit:
    """Return an edit that several threads may call: one batch has the device at a time."""
    turn = threading.Lock()

    def edit_in_turn(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        with turn:
            yield from edit(batch)

    return edit_in_turn


def _opened_once(open: Callable[[RunFolder], Output]) -> Callable[[RunFolder], Output]:
    """Return a function that several threads may call, and that opens the first time only."""
    turn = threading.Lock()
    opened: list[Output] = []

    def open_once(folder: RunFolder) -> Output:
        with turn:
            if not opened:
                opened.append(open(folder))
            return opened[0]

    return open_once
