"""One folder, one run: claims, receipts, refusals."""

import pyarrow.parquet as pq
import pytest

from cytosyn_aug.run_folder import RUN_NAME, Unit, open_run

UNITS = [Unit(0, 0, 2, "aa"), Unit(1, 2, 4, "bb")]


def row(unit, status="edited"):
    return {"source": f"{unit}.png", "status": status, "unit": unit}


def run(folder, identity=None, **settings):
    settings = {"overwrite": False} | settings
    return open_run(folder, identity or {"seed": 0}, {}, **settings)


def test_a_unit_is_held_by_one_process_at_a_time(tmp_path):
    with run(tmp_path / "out") as first, run(tmp_path / "out") as second:
        first.prepare()
        with first.claim(UNITS[0]) as has:
            assert has
            with second.claim(UNITS[0]) as has_too:
                assert not has_too
            with second.claim(UNITS[1]) as has_other:
                assert has_other
            first.write_receipt(UNITS[0], [row(0)])
        with second.claim(UNITS[0]) as has_late:
            assert not has_late  # it is done
        assert second.to_do(UNITS) == [UNITS[1]]


def test_whoever_ends_last_writes_the_manifest(tmp_path):
    with run(tmp_path / "out") as first, run(tmp_path / "out") as second:
        first.prepare()
        first.write_receipt(UNITS[0], [row(0)])
        assert not first.finish(UNITS)  # the second is at work
        second.write_receipt(UNITS[1], [row(1)])
        assert second.finish(UNITS)
    table = pq.read_table(tmp_path / "out" / "manifest.parquet")
    assert table["source"].to_pylist() == ["0.png", "1.png"]
    with run(tmp_path / "out") as again:
        assert again.to_do(UNITS) == []
        assert again.to_do([UNITS[0]._replace(digest="cc")]) != []
        assert again.finish(UNITS)


def test_failed_units_are_tried_again_by_the_next_run(tmp_path):
    with run(tmp_path / "out") as first:
        first.prepare()
        first.write_receipt(UNITS[0], [row(0, "failed")])
        first.write_receipt(UNITS[1], [row(1)])
        assert first.finish(UNITS)
    with run(tmp_path / "out") as second:
        assert second.to_do(UNITS) == [UNITS[0]]
        second.prepare()
        with second.claim(UNITS[0]) as has:
            assert has
            second.write_receipt(UNITS[0], [row(0)])
        assert second.finish(UNITS)
    table = pq.read_table(tmp_path / "out" / "manifest.parquet")
    assert table["status"].to_pylist() == ["edited", "edited"]


def test_another_run_a_damaged_one_and_a_file_are_refused(tmp_path):
    out = tmp_path / "out"
    with run(out, {"recipe": {"seed": 0, "gone": 1}, "same": 2}):
        pass
    difference = r"recipe\.gone: 1 -> absent\n  recipe\.seed: 0 -> 3"
    other = {"recipe": {"seed": 3}, "same": 2}
    with pytest.raises(ValueError, match=difference), run(out, other):
        pass
    (out / RUN_NAME).write_text("{")
    with pytest.raises(ValueError, match="damaged or of another version"), run(out):
        pass
    with run(out, overwrite=True):
        pass
    with pytest.raises(ValueError, match="is a file"), run(out / RUN_NAME):
        pass


def test_a_run_at_work_is_not_overwritten(tmp_path):
    out, reason = tmp_path / "out", "being written by another process"
    with run(out), pytest.raises(BlockingIOError, match=reason), run(out, overwrite=True):
        pass
