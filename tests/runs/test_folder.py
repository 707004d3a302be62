"""One folder, one run: claims, receipts, refusals."""

import pyarrow.parquet as pq
import pytest

from cytosyn_aug.runs.folder import RUN_NAME, Unit, open_run

UNITS = [Unit(0, 0, 2, "aa"), Unit(1, 2, 4, "bb")]


def row(unit, status="edited", **cells):
    return {"source": f"{unit}.png", "status": status, "unit": unit} | cells


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


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("gone", ["a/0.png", "a/0_mask.png", "shard-000001.tar", "a"])
def test_a_unit_whose_results_are_gone_is_done_again(tmp_path, gone, is_finished):
    out = tmp_path / "out"
    with run(out) as first:
        first.prepare()
        (out / "a").mkdir()
        for name in ("a/0.png", "a/0_mask.png", "shard-000001.tar"):
            (out / name).touch()
        first.write_receipt(UNITS[0], [row(0, output="a/0.png", mask="a/0_mask.png")])
        first.write_receipt(UNITS[1], [row(1, output="shard-000001.tar/b/1.png"), row(1)])
        assert first.to_do(UNITS) == []
        assert not is_finished or first.finish(UNITS)
    (out / gone).rename(tmp_path / "elsewhere")
    unit = UNITS[gone.endswith("tar")]
    with run(out) as second:
        with pytest.warns(
            UserWarning, match=f"1 finished unit is done again, because {gone}.* is gone"
        ):
            assert second.to_do(UNITS) == [unit]
        second.prepare()
        with second.claim(unit) as has:
            assert has


def test_a_damaged_receipt_is_one_that_is_not_there(tmp_path):
    out = tmp_path / "out"
    with run(out) as first:
        first.prepare()
        for unit in UNITS:
            first.write_receipt(unit, [row(unit.number)])
        receipt = out / ".work" / "receipts" / "0000001.parquet"
        content = receipt.read_bytes()
    bit = content.index(b"1.png")  # in a page; the footer is at the end
    flipped = content[:bit] + b"0.png" + content[bit + 5 :]
    zeros = content[:8] + bytes(400) + content[408:]
    for damaged in (b"", content[:100], content[:-1], zeros, flipped):
        receipt.write_bytes(damaged)
        with run(out) as second:
            with pytest.warns(
                UserWarning, match="1 finished unit .*, because 0000001.parquet is damaged"
            ):
                assert second.to_do(UNITS) == [UNITS[1]]
            assert not second.finish(UNITS)
    with run(out) as third:
        third.write_receipt(UNITS[1], [row(1)])
        assert third.finish(UNITS)


def test_a_damaged_manifest_says_what_to_do_and_is_not_written_over(tmp_path):
    out = tmp_path / "out"
    with run(out) as first:
        first.prepare()
        for unit in UNITS:
            first.write_receipt(unit, [row(unit.number)])
        assert first.finish(UNITS)
    manifest = out / "manifest.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    said = r"manifest.parquet is damaged; restore it from a copy; or remove it, and .* all units"
    with run(out) as second, pytest.raises(ValueError, match=said):
        second.to_do(UNITS)
    manifest.unlink()
    with run(out) as third:
        assert third.to_do(UNITS) == UNITS


def test_a_receipt_of_other_files_hides_what_was_before(tmp_path):
    out = tmp_path / "out"
    with run(out) as first:
        first.prepare()
        for unit in UNITS:
            first.write_receipt(unit, [row(unit.number)])
        assert first.finish(UNITS)
    with run(out) as second:  # of changed files, and killed; its results are those of now
        second.prepare()
        second.write_receipt(UNITS[0]._replace(digest="cc"), [row(0)])
    with run(out) as third:
        assert third.to_do(UNITS) == [UNITS[0]]
