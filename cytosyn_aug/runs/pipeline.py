"""Units of tiles through reader threads, the device, and writer threads, all busy at once.

Reader threads decode ahead; this thread only gives work to the device; writer threads wait for the
device, encode and write; one more thread finishes units. Every queue is bounded: in memory are at
most `read_ahead` decoded tiles (or 256 MB of them), `pending_writes` batches of results and the
rows of two unfinished units.

A tile that cannot be used costs itself and is named. An error of anything else ends the run: what
is finished stays, and the next run goes on from there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.runs.edits import Edit, EditedBatch
from cytosyn_aug.runs.folder import RunFolder, Unit
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.outputs import Output, Place, Result
from cytosyn_aug.runs.reading import Loaded

# Larger tiles go through in smaller batches, so that memory stays the same.
_MAX_BATCH_PIXELS = 16 * 1024 * 1024
_MAX_WAITING_BYTES = 256 * 1024 * 1024
Row = dict[str, Any]  # one of `cytosyn_aug.runs.folder.ROW_SCHEMA`; Any: cells


class Entry(NamedTuple):
    """A tile on its way: its unit, the hold on that, its row in the listing, and itself."""

    unit: Unit
    claim: ExitStack
    row: int
    item: Item
    loaded: Future[Loaded]


# A row of the manifest with its place in it: row of the listing, variant.
Placed = tuple[int, int, Row]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done to every tile.

    Attributes:
        listing: The tiles.
        read: From an item to a tile, in any thread; raises `ItemError`.
        edit: From tiles of one size to their variants, in the caller's thread.
        output: Where results go.
        num_variants: Results of a tile.
        batch_size: Most tiles at a time.
        done: Status of a tile that went well.
        constants: Cells that are the same in every row of the manifest.
    """

    listing: Listing
    read: Callable[[Item], Loaded]
    edit: Edit
    output: Output
    num_variants: int
    batch_size: int
    done: str = "edited"
    constants: Row = field(default_factory=dict)


class Threads(NamedTuple):
    """How many threads read and write, and how far they may be ahead or behind.

    Attributes:
        readers: Threads that decode.
        writers: Threads that encode.
        read_ahead: Decoded tiles that may wait.
        pending_writes: Batches that may wait to be written.
    """

    readers: int = 4
    writers: int = 4
    read_ahead: int = 64
    pending_writes: int = 8


def run_job(
    job: Job, units: Iterable[Unit], folder: RunFolder, threads: Threads
) -> Generator[tuple[Unit, int], None, None]:
    """Do units, skipping those that other processes hold; yield after each batch.

    Args:
        job: What to do.
        units: Which, in this order.
        folder: Where receipts go.
        threads: How wide.

    Yields:
        The unit at hand, and how many more of its tiles were given to the device, or failed.

    Raises:
        OSError: The output cannot be written.
        ValueError: A name leads out of the output.
    """
    claims: set[ExitStack] = set()
    with ExitStack() as stack:
        stack.callback(_release, claims)
        finisher = _pool(stack, 1)
        writers = _pool(stack, threads.writers)
        readers = _pool(stack, threads.readers)
        entries = _read_ahead(job, _claimed(job, units, folder, claims), readers, threads)
        stack.callback(entries.close)
        writing: deque[Future[list[Placed]]] = deque()
        finishing: deque[Future[None]] = deque()
        for (unit, claim), own in groupby(entries, lambda entry: (entry.unit, entry.claim)):
            futures: list[Future[list[Placed]]] = []
            for done, count in _run_unit(job, unit, own, writers):
                futures += done
                writing.extend(done)
                while writing and (len(writing) > threads.pending_writes or writing[0].done()):
                    writing.popleft().result()
                yield unit, count
            finishing.append(finisher.submit(_finish, job, unit, futures, folder, claim))
            while len(finishing) > 1:
                finishing.popleft().result()
        for future in finishing:
            future.result()


def give_up(job: Job, unit: Unit, folder: RunFolder, reason: str) -> None:
    """Name all tiles of a unit as failed, unless another process holds it or has done it.

    For units that no process survived; the next run tries them again.

    Raises:
        OSError: The output cannot be written.
    """
    with folder.claim(unit) as is_mine:
        if not is_mine:
            return
        rows: list[Row] = []
        for row, item in enumerate(job.listing.items(unit.start, unit.stop), unit.start):
            rows += [cells for _, _, cells in _leave(job, unit, row, item, "failed", reason)]
        job.output.commit(unit.number)
        folder.write_receipt(unit, rows)


def _pool(stack: ExitStack, num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _release(claims: set[ExitStack]) -> None:
    for claim in list(claims):
        claim.close()


def _claimed(
    job: Job, units: Iterable[Unit], folder: RunFolder, claims: set[ExitStack]
) -> Iterator[tuple[Unit, ExitStack, int, Item]]:
    """Yield the items of one unit after the other, of those that nobody else holds."""
    for unit in units:
        claim = ExitStack()
        if not claim.enter_context(folder.claim(unit)):
            claim.close()
            continue
        claims.add(claim)
        claim.callback(claims.discard, claim)
        for row, item in enumerate(job.listing.items(unit.start, unit.stop), unit.start):
            yield unit, claim, row, item


def _read_ahead(
    job: Job,
    items: Iterator[tuple[Unit, ExitStack, int, Item]],
    readers: ThreadPoolExecutor,
    threads: Threads,
) -> Generator[Entry, None, None]:
    waiting: deque[Entry] = deque()
    limit, largest = 2 * threads.readers, 1  # few, until their size is known
    for item in items:
        waiting.append(Entry(*item, readers.submit(job.read, item[3])))
        while len(waiting) > limit:
            entry = waiting.popleft()
            yield entry
            if entry.loaded.exception() is None:
                largest = max(largest, entry.loaded.result().pixels.nbytes)
                limit = max(1, min(threads.read_ahead, _MAX_WAITING_BYTES // largest))
    while waiting:
        yield waiting.popleft()


def _run_unit(
    job: Job, unit: Unit, entries: Iterable[Entry], writers: ThreadPoolExecutor
) -> Iterator[tuple[list[Future[list[Placed]]], int]]:
    """Give a unit's tiles to the device, batches of one size each; yield what is being written."""
    waiting: dict[tuple[int, ...], list[tuple[int, Loaded]]] = {}
    for entry in entries:
        try:
            tile = entry.loaded.result()
        except ItemError as error:
            why = ("failed", str(error))
            yield [writers.submit(_leave, job, unit, entry.row, entry.item, *why)], 1
            continue
        if tile.rejected:
            why = ("rejected", tile.rejected)
            yield [writers.submit(_leave, job, unit, entry.row, entry.item, *why)], 1
            continue
        shape = tile.pixels.shape
        batch = waiting.setdefault(shape, [])
        batch.append((entry.row, tile))
        most = max(1, _MAX_BATCH_PIXELS // max(1, math.prod(shape[:2])))
        if len(batch) >= min(job.batch_size, most):
            yield _edit(job, unit, waiting.pop(shape), writers), len(batch)
    for batch in waiting.values():
        yield _edit(job, unit, batch, writers), len(batch)


def _edit(
    job: Job, unit: Unit, batch: list[tuple[int, Loaded]], writers: ThreadPoolExecutor
) -> list[Future[list[Placed]]]:
    variants = enumerate(job.edit([tile for _, tile in batch]))
    return [writers.submit(_write, job, unit, batch, k, edited) for k, edited in variants]


def _write(
    job: Job, unit: Unit, batch: list[tuple[int, Loaded]], variant: int, edited: EditedBatch
) -> list[Placed]:
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
        place = Place(unit.number, row, variant)
        if not is_finite[k]:
            job.output.discard(place, tile.item)
            reason = "the networks gave values that are not finite; use float32 or bfloat16"
            cells = {"variant": variant, "status": "failed", "reason": reason}
            rows.append((row, variant, _cells(job, unit, tile.item) | cells))
            continue
        cells = _cells(job, unit, tile.item) | {
            "variant": variant,
            "key": tile.key,
            **{name: column[k] for name, column in columns.items()},
        }
        refusal = edited.refusals[k] if edited.refusals else ""
        if refusal:
            job.output.discard(place, tile.item)
            rows.append((row, variant, cells | {"status": "rejected", "reason": refusal}))
            continue
        own = {name: value[k] for name, value in fields.items()}
        result = Result(pixels[k], tile.mask, tile.key, own, tile.json)
        written = job.output.write(place, tile.item, result)
        cells |= {
            "status": job.done if is_tissue[k] else "blank",
            "reason": "; ".join(tile.notes),
            "output": written.output,
            "mask": written.mask,
        }
        rows.append((row, variant, cells))
    return rows


def _numbers(values: Tensor | None, length: int) -> Sequence[float | None]:
    """Return the cells of a column: None where a number is not known."""
    if values is None:
        return [None] * length
    return [None if math.isnan(value) else value for value in values.tolist()]


def _leave(job: Job, unit: Unit, row: int, item: Item, status: str, reason: str) -> list[Placed]:
    """Name a tile without results, and remove those of an earlier attempt."""
    for variant in range(job.num_variants if item.stem else 0):
        job.output.discard(Place(unit.number, row, variant), item)
    cells = _cells(job, unit, item) | {"status": status, "reason": reason}
    return [(row, -1, cells)]


def _cells(job: Job, unit: Unit, item: Item) -> Row:
    return job.constants | {
        "source": item.name,
        "label": item.label,
        "slide": item.slide,
        "x": item.x,
        "y": item.y,
        "mpp": item.mpp,
        "unit": unit.number,
    }


def _finish(
    job: Job,
    unit: Unit,
    futures: Sequence[Future[list[Placed]]],
    folder: RunFolder,
    claim: ExitStack,
) -> None:
    """Complete a unit once all of it is written, and let go of it."""
    placed = [row for future in futures for row in future.result()]
    job.output.commit(unit.number)
    folder.write_receipt(unit, [cells for _, _, cells in sorted(placed, key=lambda p: p[:2])])
    claim.close()
