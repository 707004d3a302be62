import errno
import os

import pytest

from cytosyn_aug.io.files import atomic_file, remove_leftovers, write_atomically


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")
    with pytest.raises(TypeError), atomic_file(file) as stream:
        stream.write(b"new" + None)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device after 3 bytes.*a\.tar"):
        write_atomically(tmp_path / "a.tar", b"abc")
    assert not os.listdir(tmp_path)


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    for name in (".a.tar.77.tmp", "b.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.tmp"]


def test_what_a_living_process_writes_stays(tmp_path):
    with atomic_file(tmp_path / "a.tif") as stream:
        stream.write(b"half")
        assert [f.name for f in remove_leftovers(tmp_path)] == [f".a.tif.{os.getpid()}.tmp"]
        stream.write(b" and half")
    assert (tmp_path / "a.tif").read_bytes() == b"half and half"
    assert remove_leftovers(tmp_path) == []
