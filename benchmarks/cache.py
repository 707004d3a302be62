"""Measure the cache beside LMDB, in turns in the same run; prints Markdown.

    pip install lmdb
    python -m benchmarks.cache [--records 20000] [--entries 1000000] [--repeats 5]

1. Writes and reads of records as of CytoSyn (moments in float16, features in float32: 15.7 kB), by
   one writer and by two readers in processes of their own, in random order. Both libraries make
   every batch durable (fsync), check a CRC-32 of every record and give tensors; LMDB is measured
   without checksum too.
2. Opening a cache of many small records, before and after compaction.
3. Tiles per second that `CachedVariants` turns over from pixels, in this process, and in a worker
   of a DataLoader with its collation.

Wall time on a busy machine says little; seconds of processor time are printed beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from cytosyn_aug import CachedVariants, CacheSpec, Field, LatentCache, TileSpec, tile_key

try:
    import lmdb
except ImportError as error:
    raise SystemExit("this benchmark compares with LMDB: pip install lmdb") from error

FIELDS = (
    Field("moments", (2, 4, 28, 28), "float16"),
    Field("cls", (768,), "float32"),
    Field("thumbnail", (3, 4, 4), "uint8"),
)
SPEC = CacheSpec(tile=TileSpec(), fields=FIELDS, model_digest="benchmark")
FLUSH_BYTES = 1 << 26  # what both keep in memory before they write
BATCH = 64
NUM_READERS = 2


class Rate(NamedTuple):
    """Records per second of wall time, and of processor time of one process."""

    wall: float
    processor: float


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description="Measure the cache beside LMDB.")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--entries", type=int, default=1_000_000, help="records of the second part")
    parser.add_argument("--tiles", type=int, default=500, help="tiles of the third part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="disk to measure; default: temporary files'")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, LMDB {'.'.join(map(str, lmdb.version()))}")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        compare_with_lmdb(Path(temporary), args.records, args.repeats)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        measure_opening(Path(temporary), args.entries)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        measure_variants(Path(temporary), args.tiles, args.repeats)


def compare_with_lmdb(folder: Path, num_records: int, repeats: int) -> None:
    """Print rates of writing and reading, medians over the repeats."""
    num_records -= num_records % (BATCH * NUM_READERS)
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(num_records)]
    writers: dict[str, Callable[[Path, list[str]], None]] = {
        "cytosyn_aug": write_ours,
        "LMDB": lambda place, keys: write_lmdb(place, keys, True),
        "LMDB, no checksum": lambda place, keys: write_lmdb(place, keys, False),
    }
    readers: dict[str, Callable[[Path, list[list[str]]], None]] = {
        "cytosyn_aug": read_ours,
        "LMDB": lambda place, batches: read_lmdb(place, batches, True),
        "LMDB, no checksum": lambda place, batches: read_lmdb(place, batches, False),
    }
    rates: dict[tuple[str, str], list[Rate]] = {}
    for repeat in range(repeats):
        names = list(writers)[repeat % 3 :] + list(writers)[: repeat % 3]  # in turns
        places = {name: folder / f"{repeat} {name}" for name in names}
        for name in names:
            rates.setdefault(("writes", name), []).append(timed(writers[name], places[name], keys))
        for size in (1, BATCH):
            for name in names:
                rate = timed_readers(readers[name], places[name], keys, size, repeat)
                rates.setdefault((f"reads by {size}", name), []).append(rate)
    print(f"\n{num_records:,} records of {SPEC.record_bytes:,} bytes, {repeats} repeats, medians\n")
    print("| records/s of wall time (of a process's own time) | " + " | ".join(writers) + " |")
    print("|---" * (len(writers) + 1) + "|")
    for what in ("writes", "reads by 1", f"reads by {BATCH}"):
        cells = []
        for name in writers:
            wall = statistics.median(r.wall for r in rates[what, name])
            processor = statistics.median(r.processor for r in rates[what, name])
            cells.append(f"{wall:,.0f} ({processor:,.0f})")
        count = 1 if what == "writes" else NUM_READERS
        print(f"| {what}, {count} process{'es' * (count > 1)} | " + " | ".join(cells) + " |")


def batch_fields() -> dict[str, torch.Tensor]:
    """Return a batch of random records."""
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.randn(BATCH, 2, 4, 28, 28, generator=generator).half(),
        "cls": torch.randn(BATCH, 768, generator=generator),
        "thumbnail": torch.zeros(BATCH, 3, 4, 4, dtype=torch.uint8),
    }


def write_ours(place: Path, keys: list[str]) -> None:
    """Write all records."""
    fields = batch_fields()
    with LatentCache.open(place, SPEC, max_pending_bytes=FLUSH_BYTES) as cache:
        for start in range(0, len(keys), BATCH):
            cache.put(keys[start : start + BATCH], fields)


def write_lmdb(place: Path, keys: list[str], is_checked: bool) -> None:
    """Write all records, in transactions as large as our shards."""
    fields = {k: v.numpy() for k, v in batch_fields().items()}
    per_commit = FLUSH_BYTES // SPEC.record_bytes
    with lmdb.open(str(place), map_size=1 << 36) as env:
        for first in range(0, len(keys), per_commit):
            with env.begin(write=True) as transaction:
                for n, key in enumerate(keys[first : first + per_commit], first):
                    value = b"".join(array[n % BATCH].tobytes() for array in fields.values())
                    if is_checked:
                        value += zlib.crc32(value).to_bytes(4, "little")
                    transaction.put(bytes.fromhex(key), value)


def read_ours(place: Path, batches: list[list[str]]) -> None:
    """Read all batches."""
    cache = LatentCache.open(place)
    for keys in batches:
        assert cache.get(keys).is_found.all()


def read_lmdb(place: Path, batches: list[list[str]], is_checked: bool) -> None:
    """Read all batches into tensors."""
    sizes = [f.num_bytes for f in FIELDS]
    ends = np.cumsum(sizes).tolist()
    # As fast as LMDB goes: no lock file, no read-ahead, no copies but into the batch.
    with lmdb.open(str(place), readonly=True, lock=False, readahead=False) as env:
        for keys in batches:
            out = [np.empty((len(keys), size), np.uint8) for size in sizes]
            with env.begin(buffers=True) as transaction:
                for n, key in enumerate(keys):
                    value = transaction.get(bytes.fromhex(key))
                    if is_checked:
                        crc = zlib.crc32(value[: ends[-1]])
                        assert crc == int.from_bytes(value[ends[-1] :], "little")
                    for array, size, end in zip(out, sizes, ends, strict=True):
                        array[n] = np.frombuffer(value, np.uint8, size, end - size)
            for field, array in zip(FIELDS, out, strict=True):
                torch.from_numpy(array.view(field.dtype).reshape(len(keys), *field.shape))


def timed(write: Callable[..., None], place: Path, keys: list[str]) -> Rate:
    """Return the rate of a writer."""
    began, began_processor = time.perf_counter(), time.process_time()
    write(place, keys)
    seconds = time.perf_counter() - began, time.process_time() - began_processor
    return Rate(len(keys) / seconds[0], len(keys) / seconds[1])


def timed_readers(
    read: Callable[..., None], place: Path, keys: list[str], size: int, seed: int
) -> Rate:
    """Return the rate of several readers that start together and share the keys."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    barrier = context.Barrier(NUM_READERS)
    order = np.random.default_rng(seed).permutation(len(keys)).reshape(NUM_READERS, -1, size)

    def run(mine: np.ndarray) -> None:
        batches = [[keys[n] for n in row] for row in mine]
        barrier.wait()
        began, began_processor = time.monotonic(), time.process_time()
        read(place, batches)
        answers.put((began, time.monotonic(), time.process_time() - began_processor))

    jobs = [context.Process(target=run, args=(mine,)) for mine in order]
    for job in jobs:
        job.start()
    done = [answers.get() for _ in jobs]
    for job in jobs:
        job.join()
    wall = max(end for _, end, _ in done) - min(began for began, _, _ in done)
    processor = statistics.mean(seconds for *_, seconds in done)
    return Rate(len(keys) / wall, len(keys) / NUM_READERS / processor)


def measure_opening(folder: Path, num_entries: int) -> None:
    """Print how long opening takes before and after compaction."""
    spec = CacheSpec(tile=TileSpec(), fields=(Field("x", (), "uint8"),), model_digest="benchmark")
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(num_entries)]
    fields = {"x": torch.zeros(4096, dtype=torch.uint8)}
    with LatentCache.open(folder, spec) as cache:
        for start in range(0, num_entries, 4096):  # as many shards as records of CytoSyn fill
            part = keys[start : start + 4096]
            cache.put(part, {"x": fields["x"][: len(part)]})
            cache.flush()
    print(f"\n| opening {num_entries:,} entries and one look-up | seconds |\n|---|---|")
    for state in ("245 shards, not compacted", "compacted"):
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            assert LatentCache.open(folder).get(keys[:1]).is_found.all()
            seconds.append(time.perf_counter() - began)
        state = state.replace("245", str(len(list((folder / "shards").iterdir()))))
        print(f"| {state} | {statistics.median(seconds):.4f} |")
        if state != "compacted":
            began = time.perf_counter()
            cache.compact()
            compacting = time.perf_counter() - began
    print(f"| (compacting) | {compacting:.1f} |")


def measure_variants(folder: Path, num_tiles: int, repeats: int) -> None:
    """Print tiles per second of `CachedVariants` in one process, every tile replaced."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (num_tiles, 3, 224, 224), dtype=torch.uint8, generator=generator)
    pictures = [PIL.Image.fromarray(t.permute(1, 2, 0).contiguous().numpy()) for t in tiles]
    keys = [tile_key(tile) for tile in tiles]
    flag = torch.ones(num_tiles, dtype=torch.uint8)
    latents = torch.randn(num_tiles, 4, 28, 28, generator=generator)
    payloads = {
        "images": (Field("images", (3, 224, 224), "uint8"), 255 - tiles),
        "latents": (Field("latents", (4, 28, 28), "float16"), latents),
    }
    print(
        "\n| CachedVariants, tiles/s of own time | PIL | uint8 tensor | the same in a worker |\n"
        "|---|---|---|---|"
    )
    for name, (field, payload) in payloads.items():
        fields = (field, Field("is_edited", (), "uint8"))
        spec = CacheSpec(tile=TileSpec(), fields=fields, model_digest="benchmark")
        with LatentCache.open(folder / name, spec) as cache:
            cache.put(keys, {name: payload, "is_edited": flag})
        transform = CachedVariants(cache, p=1.0)
        cells = []
        for images in (pictures, list(tiles)):
            rates = []
            for _ in range(repeats):
                began = time.process_time()
                for image in images:
                    transform(image)
                rates.append(num_tiles / (time.process_time() - began))
            cells.append(f"{statistics.median(rates):,.0f}")
        cells.append(f"{worker_rate(transform, tiles, repeats):,.0f}")
        print(f"| payload {name} | " + " | ".join(cells) + " |")


class LookedUp(Dataset[Any]):
    """Tiles as a worker gives them, and its processor time."""

    def __init__(self, transform: CachedVariants, tiles: torch.Tensor) -> None:
        self.transform, self.tiles = transform, tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.tiles[index]), time.process_time()


def worker_rate(transform: CachedVariants, tiles: torch.Tensor, repeats: int) -> float:
    """Return tiles per second of a worker's own time, collation and shared memory included."""
    loader = DataLoader(
        LookedUp(transform, tiles), batch_size=25, num_workers=1, persistent_workers=True
    )
    rates = []
    for _ in range(repeats + 1):  # the first opens the shards
        at = [times for _, times in loader]
        rates.append((len(tiles) - 25) / float(at[-1][0] - at[0][0]))
    return statistics.median(rates[1:])


if __name__ == "__main__":
    main()
