"""Claims of the cache: nothing wrong is ever read, whoever writes, dies or damages files."""

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, Dataset

from cytosyn_aug.cache import index, maintenance, records
from cytosyn_aug.cache.spec import CACHE_NAME, SHARD_FOLDER, CacheSpec, Field
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.config import TileSpec

SPEC = CacheSpec(
    tile=TileSpec(size_px=16),
    fields=(Field("latents", (2, 3), "float16"), Field("flag", (), "uint8")),
    model_digest="0123456789abcdef",
    num_variants=3,
)
FORK = multiprocessing.get_context("fork")


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def values(numbers):
    """Return the fields that belong to record `number`, different for each."""
    numbers = torch.tensor(list(numbers))
    latents = numbers[:, None, None] + torch.arange(6).view(2, 3) / 8
    return {"latents": latents, "flag": (numbers % 7).to(torch.uint8)}


def put(cache, numbers, variant=0):
    cache.put([key(n) for n in numbers], values(numbers), [variant] * len(numbers))


def fill(folder, numbers, shard_size=1000):
    with LatentCache.open(folder, SPEC) as cache:
        for start in range(0, len(numbers), shard_size):
            put(cache, numbers[start : start + shard_size])
            cache.flush()
    return LatentCache.open(folder)


def check(cache, numbers, variant=0):
    """Assert that what is found is right; return which are found."""
    found = cache.get([key(n) for n in numbers], [variant] * len(numbers))
    expected = values(numbers)
    mask = found.is_found
    assert torch.equal(found.fields["latents"][mask], expected["latents"].half()[mask])
    assert torch.equal(found.fields["flag"][mask], expected["flag"][mask])
    assert not found.fields["latents"][~mask].any()
    return mask.tolist()


def shards(folder):
    return sorted((folder / SHARD_FOLDER).glob("[!.]*"))


# Reading and writing


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), min_size=1, max_size=8),
        max_size=6,
    ),
    limit=st.sampled_from([1, 200, 1 << 20]),
    is_compacted=st.booleans(),
)
def test_what_was_put_is_got_and_nothing_else(tmp_path_factory, batches, limit, is_compacted):
    folder = tmp_path_factory.mktemp("cache")
    stored = set()
    with LatentCache.open(folder, SPEC, max_pending_bytes=limit) as cache:
        for batch in batches:
            numbers, variants = zip(*batch, strict=True)
            content = values(100 * v + n for n, v in batch)
            cache.put([key(n) for n in numbers], content, variants)
            stored |= set(batch)
    if is_compacted:
        cache.compact(max_shard_bytes=500)
    wanted = [(n, v) for n in range(22) for v in range(3)]
    for handle in (cache, LatentCache.open(folder)):
        found = handle.get([key(n) for n, _ in wanted], [v for _, v in wanted])
        assert found.is_found.tolist() == [w in stored for w in wanted]
        expected = values(100 * v + n for n, v in wanted)["latents"].half()
        assert torch.equal(found.fields["latents"][found.is_found], expected[found.is_found])


def test_records_are_found_before_they_are_flushed(tmp_path):
    cache = LatentCache.open(tmp_path, SPEC)
    put(cache, [1])
    assert check(cache, [1, 2]) == [True, False]
    assert not shards(tmp_path)


def test_other_handles_see_new_records_after_refresh(tmp_path):
    reader = LatentCache.open(tmp_path, SPEC)
    fill(tmp_path, [1])
    assert check(reader, [1]) == [False]
    reader.refresh()
    assert check(reader, [1]) == [True]


def test_any_reader_of_safetensors_reads_the_shards(tmp_path):
    fill(tmp_path, range(5))
    tensors = load_file(shards(tmp_path)[0])
    assert {k: v.shape for k, v in tensors.items()} == {
        "words": (5,),
        "checksums": (5,),
        "variants": (5,),
        "keys": (5, 32),
        "latents": (5, 2, 3),
        "flag": (5,),
    }
    assert {k.tobytes().hex() for k in tensors["keys"]} == {key(n) for n in range(5)}


def test_a_record_takes_the_bytes_that_the_docstring_plans_with(tmp_path):
    cytosyn = CacheSpec(
        tile=TileSpec(),
        fields=(
            Field("moments", (2, 4, 28, 28), "float16"),
            Field("cls", (768,), "float32"),
            Field("thumbnail", (3, 4, 4), "uint8"),
        ),
        model_digest="",
    )
    assert cytosyn.record_bytes == 15_710
    fill(tmp_path, range(50))
    file = shards(tmp_path)[0]
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + 50 * SPEC.record_bytes
    assert index.ENTRY_BYTES * 40_000_000 == 640_000_000


@given(st.binary(min_size=32, max_size=32), st.integers(0, 65535), st.integers(0, 65535))
def test_variants_of_a_tile_have_different_words(content, one, other):
    keys = np.frombuffer(content * 2, np.uint8).reshape(2, 32)
    words = records.record_words(keys, np.array([one, other], "<u2"))
    assert (words[0] == words[1]) == (one == other)
    assert words.tolist() == [records.record_word((content, v)) for v in (one, other)]
    assert records.record_words(keys[:1], np.zeros(1, "<u2"))[0] == int.from_bytes(content[:8])


def test_two_keys_of_one_word_are_told_apart(tmp_path):
    twins = ["ab" * 8 + "00" * 24, "ab" * 8 + "11" * 24, "ab" * 8 + "22" * 24]
    with LatentCache.open(tmp_path, SPEC) as cache:
        cache.put(twins[:2], values([1, 2]))
    for _ in range(2):
        reader = LatentCache.open(tmp_path)
        found = reader.get(twins)
        assert found.is_found.tolist() == [True, True, False]
        assert found.fields["flag"].tolist() == [1, 2, 0]
        assert reader.faults == []
        assert cache.compact().num_duplicates == 0


def test_no_keys_give_no_records(tmp_path):
    found = LatentCache.open(tmp_path, SPEC).get([])
    assert found.is_found.shape == (0,)
    assert found.fields["latents"].shape == (0, 2, 3)


def test_what_waits_in_memory_is_bounded(tmp_path):
    cache = LatentCache.open(tmp_path, SPEC, max_pending_bytes=10 * SPEC.record_bytes)
    put(cache, range(25))
    assert len(cache) == 20
    assert len(shards(tmp_path)) == 2


def test_of_two_writers_the_first_wins_before_and_after_compaction(tmp_path):
    for number in (1, 2):
        with LatentCache.open(tmp_path, SPEC) as cache:
            cache.put([key(0)], values([number]))
    assert len(shards(tmp_path)) == 2
    for _ in range(2):
        found = LatentCache.open(tmp_path).get([key(0)])
        assert found.fields["latents"][0, 0, 0] == 1
        cache.compact()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["ab"], {}), "not all of 32 bytes"),
        ((["xy" * 32], {}), "no SHA-256"),
        (([key(0)], {"latents": torch.zeros(1, 2, 3)}), r"expected \['flag', 'latents'\]"),
        (([key(0)], values([1, 2])), r"latents is \[2, 2, 3\], expected \[1, 2, 3\]"),
        (([key(0)], values([1]), [3]), "expected 0 to 2"),
        (([key(0)], values([1]), [0, 1]), "2 variants for 1 keys"),
        (([key(0)], values([1]) | {"flag": torch.zeros(1)}), "flag is torch.float32"),
        (([key(0)], values([70000])), "not finite in torch.float16"),
    ],
)
def test_bad_records_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentCache.open(tmp_path, SPEC).put(*arguments)


# Stale caches


def test_the_digest_changes_with_every_setting():
    others = {
        "tile": TileSpec(size_px=24),
        "fields": SPEC.fields[:1],
        "model_digest": "another",
        "recipe": '{"seed": 1}',
        "num_variants": 4,
        "keeps_structure": True,
    }
    assert set(others) == {f.name for f in fields(SPEC)}
    digests = {replace(SPEC, **{k: v}).digest for k, v in others.items()}
    assert len(digests | {SPEC.digest}) == len(others) + 1


def test_a_cache_of_another_model_is_refused_naming_both_sides(tmp_path):
    fill(tmp_path, [1])
    other = replace(SPEC, model_digest="fedcba9876543210", recipe='{"seed": 1}')
    with pytest.raises(ValueError, match=r"model 0123456789abcdef.*model fedcba9876543210") as info:
        LatentCache.open(tmp_path, other)
    assert SPEC.digest in str(info.value)
    assert other.digest in str(info.value)
    assert "recipe.seed None for 1" in str(info.value)


def test_differences_of_recipes_are_named_by_their_innermost_place():
    recipes = ['{"edits": [{"strength": 1.0, "mpp": 0.5}]}', '{"edits": [{"strength": 0.5}]}']
    one, other = (replace(SPEC, recipe=recipe) for recipe in recipes)
    assert one.differences(other) == [
        "recipe.edits[0].strength 0.5 for 1.0",
        "recipe.edits[0].mpp None for 0.5",
    ]


def test_a_shard_of_another_cache_is_refused_and_named(tmp_path):
    fill(tmp_path / "mine", [1])
    with LatentCache.open(tmp_path / "other", replace(SPEC, recipe='"other"')) as other:
        put(other, [2])
    stray = shards(tmp_path / "other")[0]
    stray.rename(tmp_path / "mine" / SHARD_FOLDER / stray.name)
    with pytest.warns(UserWarning, match="is stale"):
        cache = LatentCache.open(tmp_path / "mine")
    assert check(cache, [1, 2]) == [True, False]
    assert [stray.name in fault for fault in cache.faults] == [True]
    assert [stray.name in fault for fault in cache.verify()] == [True]
    assert len(cache.compact().faults) == 1


def test_no_cache_and_a_damaged_description_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cache.json"):
        LatentCache.open(tmp_path)
    fill(tmp_path, [1])
    file = tmp_path / CACHE_NAME
    content = json.loads(file.read_text())
    for change in ({"format_version": 9}, {"digest": "0" * 16}, {"spec": {}}):
        file.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match="damaged or of another version"):
            LatentCache.open(tmp_path)


# Damage


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    fill(folder, range(6)).compact()
    return folder, {f: f.read_bytes() for f in (*shards(folder), folder / index.INDEX_NAME)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_anywhere_gives_a_wrong_record(healthy, data):
    folder, contents = healthy
    file = data.draw(st.sampled_from(sorted(contents)))
    content = contents[file]
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = LatentCache.open(folder)
            found = check(cache, range(6))
        faults = list(cache.verify())
    finally:
        file.write_bytes(content)
    # What is lost is also named; padding and unused text may change without harm.
    assert all(found) or faults


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_truncated_file_loses_records_and_kills_nobody(healthy, data):
    folder, contents = healthy
    file = data.draw(st.sampled_from(sorted(contents)))
    length = data.draw(st.integers(0, len(contents[file]) - 1))
    file.write_bytes(contents[file][:length])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = LatentCache.open(folder)
            is_shard = file.parent.name == SHARD_FOLDER
            assert check(cache, range(6)) == [not is_shard] * 6
        assert any(file.name in fault for fault in cache.verify())
    finally:
        file.write_bytes(contents[file])


def damage(file, name):
    """Flip a bit of the named tensor's first record."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    at = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore:.*differs from what was written")
def test_a_damaged_record_is_missing_named_counted_and_made_anew(tmp_path):
    fill(tmp_path, range(5))
    damage(shards(tmp_path)[0], "latents")
    cache = LatentCache.open(tmp_path)
    with pytest.warns(UserWarning, match="differs from what was written"):
        found = check(cache, range(5))
    assert sum(found) == 4
    lost = found.index(False)
    assert cache.num_damaged == 1
    assert key(lost)[:16] in cache.faults[0]
    assert [key(lost)[:16] in fault for fault in cache.verify()] == [True]
    put(cache, [lost])
    cache.flush()
    assert all(check(LatentCache.open(tmp_path), range(5)))
    done = cache.compact()
    assert (done.num_records, done.num_damaged, done.num_duplicates) == (5, 1, 0)
    assert list(cache.verify()) == []
    assert all(check(LatentCache.open(tmp_path), range(5)))


def test_records_of_a_lost_shard_are_missing_and_made_anew(tmp_path, monkeypatch):
    cache = fill(tmp_path, range(20), shard_size=10)
    cache.compact(max_shard_bytes=12 * SPEC.record_bytes)
    lost = shards(tmp_path)[0]
    lost.unlink()
    found = check(cache, range(20))
    assert sum(found) == 10
    assert [lost.name in fault for fault in cache.verify()] == [True]
    put(cache, [n for n in range(20) if not found[n]])
    cache.flush()
    monkeypatch.setattr(cache, "refresh", None)  # the loss is known: no need to look again
    assert all(check(cache, range(20)))


# Compaction


def test_compaction_keeps_every_record_once_in_few_files(tmp_path):
    cache = fill(tmp_path, [*range(40), *range(30)], shard_size=7)
    done = cache.compact(max_shard_bytes=20 * SPEC.record_bytes)
    assert (done.num_records, done.num_duplicates, done.num_shards_before) == (40, 30, 10)
    assert done.num_shards == len(shards(tmp_path)) == 2
    for handle in (cache, LatentCache.open(tmp_path)):
        assert len(handle) == 40
        assert all(check(handle, range(40)))
    assert cache.compact(max_shard_bytes=20 * SPEC.record_bytes).num_shards_before == 2
    assert list(cache.verify()) == []


def test_opening_a_compacted_cache_reads_no_shard(tmp_path, monkeypatch):
    fill(tmp_path, range(10), shard_size=3).compact()
    monkeypatch.setattr(index, "Shard", None)
    assert len(LatentCache.open(tmp_path)) == 10


@pytest.mark.parametrize("keeps_old", [False, True])
def test_a_reader_goes_on_while_another_process_compacts(tmp_path, keeps_old):
    reader = fill(tmp_path, range(40), shard_size=4)
    assert all(check(reader, range(10)))  # some shards are mapped, others not
    LatentCache.open(tmp_path).compact(keeps_old=keeps_old)
    assert all(check(reader, range(40)))
    old = list((tmp_path / SHARD_FOLDER).glob(".retired-*"))
    assert len(old) == (10 if keeps_old else 0)
    reader.compact()
    assert not list((tmp_path / SHARD_FOLDER).glob(".retired-*"))


@pytest.mark.parametrize("step", ["_copy", "_write_index", "_retire"])
def test_a_compaction_that_dies_loses_nothing(tmp_path, monkeypatch, step):
    cache = fill(tmp_path, range(12), shard_size=4)
    real = getattr(maintenance, step)

    def die_after(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, step, die_after)
        with pytest.raises(KeyboardInterrupt):
            cache.compact()
    assert all(check(cache, range(12)))
    assert all(check(LatentCache.open(tmp_path), range(12)))
    assert cache.compact().num_records == 12
    assert len(LatentCache.open(tmp_path)) == 12


def test_two_compactions_do_not_run_at_once(tmp_path, monkeypatch):
    cache = fill(tmp_path, range(12), shard_size=4)

    def compact_too(*_arguments):
        raise_if_locked()

    def raise_if_locked():
        with pytest.raises(BlockingIOError, match="is being compacted since"):
            LatentCache.open(tmp_path).compact()

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "_retire", compact_too)
        cache.compact()
    assert cache.compact().num_records == 12
    lock = tmp_path / maintenance.LOCK_NAME
    lock.touch()
    raise_if_locked()
    os.utime(lock, (time.time() - 7200,) * 2)  # that of a process that was killed
    assert cache.compact().num_records == 12
    assert not lock.exists()


@pytest.mark.parametrize("has_old_lock", [False, True])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_compacting_what_cannot_be_written_is_one_clear_error(
    tmp_path, monkeypatch, number, has_old_lock
):
    cache = fill(tmp_path, range(3))
    if has_old_lock:
        (tmp_path / maintenance.LOCK_NAME).touch()
        os.utime(tmp_path / maintenance.LOCK_NAME, (0, 0))

    def refused(self, *_arguments, **_options):
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patch:
        for name in ("open", "touch", "unlink"):  # root, whom tests run as, may write anything
            patch.setattr(Path, name, refused)
        with pytest.raises(OSError, match=f"{os.strerror(number)}: nothing can be compacted here;"):
            cache.compact()
    assert all(check(cache, range(3)))


def test_compaction_removes_what_killed_writers_left_but_not_what_is_being_written(tmp_path):
    cache = fill(tmp_path, [1])
    old, new = (tmp_path / SHARD_FOLDER / f".{name}.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert [old.name in fault for fault in cache.verify()] == [True]
    cache.compact()
    assert not old.exists()
    assert new.exists()


# Processes


def test_a_killed_writer_leaves_whole_records_and_another_goes_on(tmp_path):
    code = (
        "import sys\n"
        "from tests.cache.test_store import *\n"
        "from pathlib import Path\n"
        "cache = LatentCache.open(Path(sys.argv[1]), SPEC, max_pending_bytes=400)\n"
        "for n in range(10 ** 6):\n"
        "    put(cache, [n])\n"
        "    print(n, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        while int(writer.stdout.readline()) < 40:
            pass
        writer.send_signal(signal.SIGKILL)
    cache = LatentCache.open(tmp_path)
    assert list(cache.verify()) == []
    found = check(cache, range(40))
    assert sum(found) >= 30  # all but what waited
    put(cache, [n for n in range(40) if not found[n]])
    assert all(check(cache, range(40)))


def write_some(folder, numbers):
    with LatentCache.open(folder, SPEC, max_pending_bytes=400) as cache:
        for n in numbers:
            put(cache, [n])


def read_until_all_are_there(folder, count, answers):
    cache = LatentCache.open(folder, SPEC)
    deadline = time.monotonic() + 30
    while not all(check(cache, range(count))) and time.monotonic() < deadline:
        cache.refresh()
    answers.put(sum(check(cache, range(count))))


def test_writers_readers_and_compaction_share_a_folder(tmp_path):
    answers = FORK.Queue()
    jobs = [
        FORK.Process(target=write_some, args=(tmp_path, range(150))),
        FORK.Process(target=write_some, args=(tmp_path, range(100, 250))),
        *(
            FORK.Process(target=read_until_all_are_there, args=(tmp_path, 250, answers))
            for _ in range(2)
        ),
    ]
    for job in jobs:
        job.start()
    cache = LatentCache.open(tmp_path, SPEC)
    while any(job.is_alive() for job in jobs[:2]):
        cache.compact(max_shard_bytes=1000)
    assert [answers.get(timeout=40) for _ in range(2)] == [250, 250]
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    done = cache.compact()
    assert done.num_records == len(LatentCache.open(tmp_path)) == 250
    assert list(cache.verify()) == []


def create(folder, recipe, answers):
    try:
        LatentCache.open(folder, replace(SPEC, recipe=recipe))
        answers.put("created")
    except ValueError:
        answers.put("refused")


def test_of_processes_that_create_different_caches_one_wins(tmp_path):
    answers = FORK.Queue()
    jobs = [FORK.Process(target=create, args=(tmp_path, f'"{n}"', answers)) for n in range(6)]
    for job in jobs:
        job.start()
    assert sorted(answers.get(timeout=30) for _ in jobs) == ["created"] + ["refused"] * 5
    for job in jobs:
        job.join()
    assert not list(tmp_path.glob(".*"))


def test_a_pickled_handle_reads_and_leaves_waiting_records_behind(tmp_path):
    cache = fill(tmp_path, [1])
    put(cache, [2])
    copy = pickle.loads(pickle.dumps(cache))
    assert check(copy, [1, 2]) == [True, False]
    with copy:
        pass
    assert len(shards(tmp_path)) == 1


def test_a_handle_means_one_folder_wherever_a_process_goes(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with LatentCache.open("cache", SPEC) as cache:
        put(cache, [1])
    packed = pickle.dumps(cache)
    monkeypatch.chdir(tmp_path / "there")
    put(cache, [2])
    cache.flush()
    assert check(pickle.loads(packed), [1, 2]) == [True, True]
    assert not list(Path.cwd().iterdir())


def test_unpickling_makes_no_cache_and_takes_no_other(tmp_path):
    folder = tmp_path / "cache"
    packed = pickle.dumps(fill(folder, [1]))
    folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"is not here.*was pickled.*same path"):
        pickle.loads(packed)
    assert not folder.exists()
    LatentCache.open(folder, replace(SPEC, recipe='{"seed": 1}'))
    with pytest.raises(ValueError, match=r"recipe\.seed 1 for None"):
        pickle.loads(packed)


def test_a_forked_handle_does_not_write_its_parents_records(tmp_path):
    cache = LatentCache.open(tmp_path, SPEC)
    put(cache, [1])

    def child():
        put(cache, [2])
        cache.flush()

    job = FORK.Process(target=child)
    job.start()
    job.join()
    assert check(LatentCache.open(tmp_path), [1, 2]) == [False, True]
    cache.flush()
    assert check(LatentCache.open(tmp_path), [1, 2]) == [True, True]


def test_a_handle_that_ends_writes_what_it_holds(tmp_path):
    cache = LatentCache.open(tmp_path, SPEC)
    put(cache, [1])
    del cache
    gc.collect()
    assert check(LatentCache.open(tmp_path), [1]) == [True]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_script_that_ends_writes_what_it_holds(tmp_path, ending):
    with LatentCache.open(tmp_path, SPEC):
        pass
    code = (
        "import sys, torch\n"
        "from cytosyn_aug.cache.store import LatentCache\n"
        "cache = LatentCache.open(sys.argv[1])\n"
        "fields = {'latents': torch.ones(1, 2, 3), 'flag': torch.ones(1, dtype=torch.uint8)}\n"
        "cache.put(['ab' * 32], fields)\n" + ending
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    assert LatentCache.open(tmp_path).get(["ab" * 32]).is_found.all()


class Puts(Dataset):
    """Puts a record an item, through a handle of the main process."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return 8

    def __getitem__(self, index):
        put(self.cache, [index])
        return index


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_write_what_they_hold(tmp_path, method):
    cache = LatentCache.open(tmp_path, SPEC)
    list(DataLoader(Puts(cache), num_workers=2, multiprocessing_context=method))
    cache.refresh()
    assert check(cache, range(9)) == [True] * 8 + [False]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_killed_worker_loses_only_what_it_held(tmp_path):
    class Dies(Puts):
        def __getitem__(self, index):
            super().__getitem__(index)
            if index == 5:
                self.cache.flush()
                put(self.cache, [100])
                os.kill(os.getpid(), signal.SIGKILL)
            return index

    cache = fill(tmp_path, [200])
    with pytest.raises(RuntimeError, match=r"worker .*(killed|exited unexpectedly)"):
        list(DataLoader(Dies(cache), num_workers=2))
    cache.refresh()
    assert check(cache, [200, 1, 3, 5, 100]) == [True, True, True, True, False]
    assert list(cache.verify()) == []


def test_records_do_not_wait_for_long(tmp_path, monkeypatch):
    # Workers that persist are ended by a signal, so what they hold must not get old.
    cache = LatentCache.open(tmp_path, SPEC)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    put(cache, [1])
    now[0] += 30
    put(cache, [2])
    assert not shards(tmp_path)
    now[0] += 31
    check(cache, [1])
    assert check(LatentCache.open(tmp_path), [1, 2]) == [True, True]
    put(cache, [3])
    check(cache, [3])
    assert len(shards(tmp_path)) == 1


# Disks


def refuse(number):
    def write(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    return write


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path, monkeypatch):
    cache = fill(tmp_path, range(3))
    put(cache, [7, 8])
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_tensors", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left.*2 records were not cached"):
            cache.flush()
    assert check(cache, [0, 7, 8]) == [True] * 3
    cache.flush()
    assert check(LatentCache.open(tmp_path), [0, 7, 8]) == [True] * 3


@pytest.mark.filterwarnings("ignore:.*1 records were not cached")  # said when it is collected
def test_an_error_inside_the_block_is_not_hidden_by_the_disks(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "write_tensors", refuse(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), LatentCache.open(tmp_path, SPEC) as cache:  # noqa: PT012
        put(cache, [1])
        raise ZeroDivisionError


def test_a_read_only_cache_is_read_and_refuses_records_in_one_sentence(tmp_path, monkeypatch):
    fill(tmp_path, range(3))
    real = Path.open

    def read_only(self, mode="r", **options):
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)  # root, whom tests run as, may write anything
    cache = LatentCache.open(tmp_path)
    assert all(check(cache, range(3)))
    with pytest.raises(OSError, match=r"Read-only file system: nothing can be cached.*writes="):
        put(cache, [9])  # the first, not the one that fills the memory
    assert check(cache, [9]) == [False]
    with cache:
        pass
    with pytest.raises(OSError, match=r"Read-only.*no cache can be created here"):
        LatentCache.open(tmp_path / "new", SPEC)


def test_what_cannot_be_written_at_the_end_is_said(tmp_path, monkeypatch):
    cache = LatentCache.open(tmp_path, SPEC)
    put(cache, [1])
    monkeypatch.setattr(records, "write_tensors", refuse(errno.ENOSPC))
    with pytest.warns(UserWarning, match=r"No space left.*: 1 records were not cached"):
        del cache
