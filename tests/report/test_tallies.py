"""What rows add up to: the same however they are stored, in bounded memory."""

import hashlib
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytosyn_aug.report.tallies import MAX_NAMED, SAMPLE_ROWS, Histogram, tally_rows
from cytosyn_aug.runs.folder import RUN_NAME
from cytosyn_aug.runs.manifest import open_manifest
from cytosyn_aug.runs.receipts import ROW_SCHEMA

UNIT = 100


def make_row(number, **cells):
    """Return a row of a manifest; each twentieth failed, each tenth was blank."""
    status = "failed" if number % 20 == 0 else "blank" if number % 10 == 0 else "edited"
    is_failed = status == "failed"
    row = dict.fromkeys(ROW_SCHEMA.names) | {
        "source": f"{number}.png",
        "variant": None if is_failed else 0,
        "status": status,
        "reason": "is damaged" if is_failed else "",
        "slide": f"slide{number % 3}",
        "key": None if is_failed else hashlib.sha256(str(number).encode()).hexdigest(),
        "reference": None if is_failed else "ab"[number % 2],
        "similarity": None if is_failed else number / 4000,
        "colour_distance": None if is_failed else float(number % 40),
        "output": None if is_failed else f"{number}.png",
        "unit": number // UNIT,
        "recipe": "r",
    }
    return row | cells


def write_run(folder, rows, num_tiles=None, receipts=()):
    """Write a run's folder: these rows in the manifest, and those units as receipts."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "command": "augment",
        "recipe": {"mode": "stain", "preserve": "color"},
        "input": {"kind": "tree", "num_tiles": num_tiles or len(rows), "mpp": None},
        "unit_tiles": UNIT,
    }
    run = {"kind": "cytosyn_aug run", "format_version": 1, "identity": identity}
    (folder / RUN_NAME).write_text(json.dumps(run))
    kept = [row for row in rows if row["unit"] not in receipts]
    if kept:
        pq.write_table(pa.Table.from_pylist(kept, ROW_SCHEMA), folder / "manifest.parquet")
    if receipts:
        (folder / ".work" / "receipts").mkdir(parents=True)
    for unit in receipts:
        own = [row for row in rows if row["unit"] == unit]
        file = folder / ".work" / "receipts" / f"{unit:07d}.parquet"
        pq.write_table(pa.Table.from_pylist(own, ROW_SCHEMA), file)
    return folder


ROWS = [make_row(number) for number in range(4000)]


def test_rows_of_earlier_versions_count_although_they_lack_a_column(tmp_path):
    run = write_run(tmp_path / "run", ROWS[:200], receipts=[1])
    for file in run.rglob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["mpp"]), file)
    assert tally_rows(open_manifest(run)).num_done == 180
    assert [row["mpp"] for t in open_manifest(run).parts(["mpp"]) for row in t.to_pylist()] == (
        [None] * 200
    )


def test_counts_and_groups_are_those_of_the_rows(tmp_path):
    tally = tally_rows(open_manifest(write_run(tmp_path / "run", ROWS)))
    assert dict(tally.statuses) == {"edited": 3600, "blank": 200, "failed": 200}
    assert tally.num_done == 3600
    assert tally.reasons["failed", "is damaged"] == 200
    assert len(tally.named["failed"]) == MAX_NAMED
    assert list(tally.named["failed"])[:2] == ["0.png", "20.png"]
    assert tally.named["failed"]["0.png"] == "is damaged"
    placed = [make_row(0, x=1, y=2), make_row(20, source="s_3_4.png", x=3, y=4)]
    names = tally_rows(open_manifest(write_run(tmp_path / "placed", placed))).named["failed"]
    assert list(names) == ["0.png at 1, 2", "s_3_4.png"]
    edited = [row for row in ROWS if row["status"] == "edited"]
    of_b = [row for row in edited if row["reference"] == "b"]
    assert tally.references["b"].num_results == len(of_b)
    expected = np.mean([row["colour_distance"] for row in of_b])
    assert tally.references["b"].mean_distance == pytest.approx(expected)
    assert tally.similarity.total == len(edited)
    assert tally.similarity.quantile(0.5) == pytest.approx(0.5, abs=0.01)
    assert [row["source"] for row in tally.least_similar[:2]] == ["1.png", "2.png"]
    assert {row["colour_distance"] for row in tally.most_changed} == {39.0}


def test_a_tile_is_named_once_and_also_if_only_a_later_variant_was_rejected(tmp_path):
    cells = [("a.png", 0, "edited"), ("a.png", 1, "rejected"), ("a.png", 2, "rejected")]
    cells += [("b.png", 0, "rejected"), ("b.png", 1, "rejected")]
    rows = [
        make_row(1, source=source, variant=variant, status=status, reason=f"reason {variant}")
        for source, variant, status in cells
    ]
    tally = tally_rows(open_manifest(write_run(tmp_path / "run", rows)))
    assert tally.statuses["rejected"] == 4
    assert tally.named["rejected"] == {"a.png": "reason 1", "b.png": "reason 0"}


def test_finished_or_not_the_rows_are_the_same(tmp_path):
    whole = tally_rows(open_manifest(write_run(tmp_path / "whole", ROWS)))
    for number, receipts in enumerate([(0, 7, 39), tuple(range(40))]):
        folder = write_run(tmp_path / str(number), ROWS, receipts=receipts)
        manifest = open_manifest(folder)
        assert not manifest.is_finished
        found = tally_rows(manifest)
        assert found.statuses == whole.statuses
        assert found.sample == whole.sample
        assert (found.similarity.counts == whole.similarity.counts).all()


def test_a_receipt_stands_for_what_the_manifest_said_of_its_unit(tmp_path):
    folder = write_run(tmp_path / "run", ROWS, receipts=(3,))
    stale = [*ROWS[:300], *(row | {"status": "failed"} for row in ROWS[300:400])]
    pq.write_table(pa.Table.from_pylist(stale, ROW_SCHEMA), folder / "manifest.parquet")
    tally = tally_rows(open_manifest(folder))
    assert tally.num_rows == 400
    assert tally.statuses["failed"] == 20


def test_the_sample_does_not_depend_on_order_and_is_fair(tmp_path):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    one, other = (
        tally_rows(open_manifest(write_run(tmp_path / name, rows))).sample
        for name, rows in (("a", ROWS), ("b", shuffled))
    )
    assert one == other
    assert len(one) == SAMPLE_ROWS
    numbers = [int(row["source"].removesuffix(".png")) for row in one]
    # The mean of 1,024 of 0..3999 drawn evenly is 2,000 +- 36; four deviations.
    assert abs(np.mean(numbers) - 2000) < 144


def test_histograms_put_values_on_bin_edges_to_the_right_and_keep_outliers():
    histogram = Histogram(0.0, 1.0, 10)
    histogram.add(np.array([0.7, -5.0, 5.0, 1.0], np.float32))
    assert histogram.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 2]
    assert Histogram(0.0, 1.0, 10).quantile(0.5) is None
    histogram = Histogram(0.0, 1.0, 100)
    histogram.add(np.linspace(0.0, 0.999, 1000))
    assert histogram.quantile(0.25) == pytest.approx(0.25, abs=0.01)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json, expected the OUT"):
        open_manifest(tmp_path)
    (tmp_path / RUN_NAME).write_text("{")
    with pytest.raises(ValueError, match="damaged or of another version"):
        open_manifest(tmp_path)
