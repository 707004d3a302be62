import io
import os
import pickle
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import decode_tile, encode_tile
from cytosyn_aug.io.tar_files import ShardWriter
from training.data.batches import StoredTiles, TileSet, open_split, spread_evenly
from training.data.cutting import TileRecipe
from training.data.shards import TileStore, verify_tiles
from training.data.tile_folders import list_tiles
from training.data.tiles import make_tiles

RECIPE = TileRecipe(tile=TileSpec(size_px=64))


def random_image(seed, side=64):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def stage(tmp_path):
    """Six tiles of three slides, two splits: folder of the stage and the pictures by name."""
    pictures = {}
    for k, name in enumerate(["train/b/0_0", "train/b/0_64", "train/a/0_0", "val/c/0_0"]):
        pictures[name] = random_image(k)
        file = tmp_path / "tiles" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures[name].save(file)
    make_tiles(list_tiles(tmp_path / "tiles"), RECIPE, tmp_path / "out", num_workers=0)
    return tmp_path / "out", pictures


def read_in_process(store):
    return store.read(1).tobytes()


def test_a_tile_comes_back_as_it_was():
    image = random_image(0)
    assert decode_tile(encode_tile(image)).tobytes() == image.tobytes()


def test_a_shard_is_a_plain_tar_with_records_where_they_are_said_to_be():
    stream = io.BytesIO()
    shard = ShardWriter(stream)
    contents = {"a/1_2.webp": b"x" * 700, "a/" + "y" * 90 + ".webp": b"", "b.webp": b"z" * 512}
    records = {name: shard.add(name, content) for name, content in contents.items()}
    shard.finish()
    whole = stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == contents
    for name, (offset, size, _) in records.items():
        assert whole[offset : offset + size] == contents[name]


def test_a_store_reads_a_split_by_index(stage):
    folder, pictures = stage
    store = TileStore(folder, "train")
    assert store.slides == ("a", "b")
    assert store.slide_index.tolist() == [0, 1, 1]
    names = ["train/a/0_0", "train/b/0_0", "train/b/0_64"]
    assert [store.read(k).tobytes() for k in range(3)] == [pictures[n].tobytes() for n in names]
    assert len(TileStore(folder)) == 4
    with pytest.raises(ValueError, match="no tiles of split test, expected train, val"):
        TileStore(folder, "test")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_can_be_used_in_other_processes(stage, method):
    store = TileStore(stage[0], "train")
    expected = read_in_process(store)
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        assert pool.submit(read_in_process, store).result() == expected
    assert read_in_process(pickle.loads(pickle.dumps(store))) == expected


def test_a_thread_reads_on_when_another_drops_its_shard(stage, monkeypatch):
    store = TileStore(stage[0], "train")
    read = os.pread

    def read_late(*args):
        store._handles.clear()  # as a second thread does that opened the same shard, or the 129th
        return read(*args)

    monkeypatch.setattr(os, "pread", read_late)
    want = StoredTiles(TileStore(stage[0], "train")).take(torch.tensor([0, 1, 2]))
    assert torch.equal(StoredTiles(store).take(torch.tensor([0, 1, 2])), want)


def test_any_flipped_bit_is_an_error_that_names_shard_and_tile(stage):
    folder, _ = stage
    store = TileStore(folder, "val")
    shard = folder / "val" / "c.tar"
    content = bytearray(shard.read_bytes())
    rng = np.random.default_rng(0)
    size = len(store.read_bytes(0))
    for position in rng.integers(0, size, 20):
        damaged = bytearray(content)
        damaged[512 + position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"val/c\.tar tile 0_0 differs .* wrong CRC-32"):
            TileStore(folder, "val").read(0)
    assert [fault.split(" differs")[0] for fault in verify_tiles(folder)] == [f"{shard} tile 0_0"]
    shard.write_bytes(content)
    assert not list(verify_tiles(folder))


def test_a_shard_cut_short_or_gone_is_named(stage):
    folder, _ = stage
    shard = folder / "val" / "c.tar"
    with shard.open("r+b") as stream:
        stream.truncate(600)
    assert "(88 of " in next(verify_tiles(folder))
    shard.unlink()
    assert re.search(
        r"val/c\.tar tile 0_0 cannot be read: .*No such file", next(verify_tiles(folder))
    )


def test_a_changed_table_is_refused(stage):
    folder, _ = stage
    table = folder / "tiles.parquet"
    table.write_bytes(table.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"tiles\.parquet is not the one .* describes"):
        TileStore(folder)


def test_an_unfinished_or_newer_stage_is_refused(stage):
    folder, _ = stage
    file = folder / "dataset.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version 2, this release reads 1"):
        TileStore(folder)
    file.unlink()
    with pytest.raises(ValueError, match="the tile stage did not finish"):
        TileStore(folder)


def test_a_split_too_large_for_memory_is_read_from_its_shards(stage):
    folder, _ = stage
    held, stored = (open_split(folder / "train", 64, max_bytes=n) for n in (10**9, 1))
    assert isinstance(held, TileSet)
    assert isinstance(stored, StoredTiles)
    assert (len(stored), stored.side_px) == (len(held), held.side_px) == (3, 64)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(stored.take(index), held.take(index))
    for tiles in (held, stored):
        assert [tiles.name(k) for k in (0, 2)] == ["train/a.tar tile 0_0", "train/b.tar tile 0_64"]
    assert torch.equal(spread_evenly(stored, 2), held.images[[0, 2]])
