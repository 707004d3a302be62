"""Slides that cannot be had: each is named, costs itself only, and is taken once it is mended."""

import csv

import pytest
from PIL import Image

from tests.support.synthetic import damage_tile, slide_picture
from tests.training.data.test_tiles import cut, rows, slide_rows, tree
from training.command_line import main

GRID = "####\n####\n####\n####"
DAMAGED = "is of a format OpenSlide does not read, truncated or damaged"
SCALE = "expected 0.05 to 10 microns/pixel; give the right one yourself"


def fill_with_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def replace_by_png(file):
    Image.fromarray(slide_picture(GRID, 128)).save(file, "PNG")


def replace_by_text(file):
    file.write_text("hello")


def cut_in_the_middle(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_the_last_bytes(file):
    file.write_bytes(file.read_bytes()[:-100])


def remove_the_target(file):
    file.unlink()
    file.symlink_to(file.parent / "nowhere.svs")


def damage_the_coarse_level(file):
    damage_tile(file, 0, level_page=2)  # all of it: the mask is found there


BAD_FILES = [
    (fill_with_zeros, DAMAGED),
    (replace_by_png, DAMAGED),
    (replace_by_text, DAMAGED),
    (cut_in_the_middle, DAMAGED),
    (lose_the_last_bytes, DAMAGED),
    (remove_the_target, "is not at"),
    (damage_the_coarse_level, "opens, but no part of it can be decoded"),
]
BAD_SCALES = [
    ({"mpp": None, "power": None}, "states neither microns/pixel nor an objective power"),
    ({"mpp": "0"}, f"has openslide.mpp-x = 0, {SCALE}"),
    ({"mpp": "nan"}, f"has aperio.MPP = nan, {SCALE}"),
    ({"mpp": "1000"}, f"has openslide.mpp-x = 1000, {SCALE}"),
    ({"mpp": "2"}, "has 2 microns/pixel, coarser than the target 0.5"),
]


@pytest.fixture
def folder(synthetic_slide):
    """Two good slides and one that is to become bad; their folder."""
    for k, name in enumerate(("a", "bad", "c")):
        file = synthetic_slide(f"{name}.svs", GRID, seed=k)
    return file.parent


def check_one_is_bad(summary, out, message):
    ((name, reason),) = summary.failures
    assert name == "bad"
    assert message in reason
    assert (summary.num_slides, summary.num_tiles) == (2, 32)
    row = slide_rows(out)["bad"]
    assert (row["status"], row["num_tiles"]) == ("failed", "0")
    assert message in row["notes"]
    with (out / "failures.csv").open(newline="") as stream:
        assert [row["slide"] for row in csv.DictReader(stream)] == ["bad"]
    assert {row["slide"] for row in rows(out)} == {"a", "c"}
    assert not [name for name in tree(out) if "bad" in name]


def check_it_is_as_never_bad(folder, out):
    cut(folder, out.parent / "undisturbed")
    assert tree(out) == tree(out.parent / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "message"), BAD_FILES)
def test_a_bad_file_is_named_costs_itself_and_is_taken_once_replaced(
    folder, tmp_path, spoil, message
):
    good = (folder / "bad.svs").read_bytes()
    spoil(folder / "bad.svs")
    check_one_is_bad(cut(folder, tmp_path / "out"), tmp_path / "out", message)
    (folder / "bad.svs").unlink()
    (folder / "bad.svs").write_bytes(good)
    assert not cut(folder, tmp_path / "out").failures
    check_it_is_as_never_bad(folder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("facts", "message"), BAD_SCALES)
def test_a_bad_scale_is_named_costs_its_slide_and_is_mended_in_a_table(
    folder, synthetic_slide, tmp_path, facts, message
):
    synthetic_slide("bad.svs", GRID, seed=1, **facts)
    check_one_is_bad(cut(folder, tmp_path / "out"), tmp_path / "out", message)
    table = tmp_path / "slides.csv"
    table.write_text("slide,mpp\nbad,0.25\n")
    summary = cut(folder, tmp_path / "out", table=table)
    assert (summary.num_tiles, summary.failures) == (48, ())


@pytest.mark.parametrize("mpp", ["0", "nan", "1000", "much"])
def test_a_bad_scale_in_a_table_is_named_and_can_be_corrected(folder, tmp_path, mpp):
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,mpp\nbad,{mpp}\n")
    for _ in range(2):
        summary = cut(folder, tmp_path / "out", table=table)
        check_one_is_bad(summary, tmp_path / "out", "microns/pixel")
    table.write_text("slide,mpp\nbad,0.25\n")
    assert not cut(folder, tmp_path / "out", table=table).failures


def test_a_slide_that_is_downloaded_later_is_taken_and_moves_no_other(folder, tmp_path):
    lines = ["id\tfilename\tmd5\tsize"]
    lines += [f"id\t{f.name}\tx\t{f.stat().st_size}" for f in sorted(folder.glob("*.svs"))]
    (tmp_path / "manifest.txt").write_text("\n".join(lines))
    (folder / "bad.svs").rename(tmp_path / "late.svs")
    out = tmp_path / "out"
    summary = cut(folder, out, manifest=tmp_path / "manifest.txt")
    check_one_is_bad(summary, out, "download it")
    splits = {name: row["split"] for name, row in slide_rows(out).items()}
    (tmp_path / "late.svs").rename(folder / "bad.svs")
    assert not cut(folder, out, manifest=tmp_path / "manifest.txt").failures
    assert {name: row["split"] for name, row in slide_rows(out).items()} == splits


def test_tiles_of_a_slide_that_has_gone_are_not_thrown_away(folder, tmp_path):
    cut(folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    remove_the_target(folder / "bad.svs")
    with pytest.raises(ValueError, match=r"slides\.bad\.fault: .* -> is not at"):
        cut(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_damaged_region_costs_its_tiles_and_names_them(folder, tmp_path):
    good = (folder / "bad.svs").read_bytes()
    damage_tile(folder / "bad.svs", 0)  # 256 px: four of our tiles
    summary = cut(folder, tmp_path / "out")
    assert summary.num_tiles == 44
    assert [name for name, _ in summary.failures] == [
        f"bad tile {x}_{y}" for x, y in ((0, 0), (0, 128), (128, 0), (128, 128))
    ]
    with (tmp_path / "out" / "failures.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4
    (folder / "bad.svs").write_bytes(good)
    assert not cut(folder, tmp_path / "out").failures
    check_it_is_as_never_bad(folder, tmp_path / "out")


def test_a_slide_whose_overview_is_damaged_is_named_cut_and_cut_again_once_mended(
    synthetic_slide, tmp_path
):
    """Where nothing can be seen every tile is tried: glass is rejected, none is missed."""
    glass, tissue = "." * 20, "." * 8 + "####" + "." * 8
    file = synthetic_slide("bad.svs", "\n".join([glass] * 4 + [tissue] * 4 + [glass] * 12))
    good, out = file.read_bytes(), tmp_path / "out"
    damage_tile(file, 0, level_page=2)  # a sixth of the coarse level
    for _ in range(2):
        summary = cut(file.parent, out)
        ((name, reason),) = summary.failures
        assert (name, summary.num_tiles) == ("bad", 16)
        assert "16.0% of its overview cannot be decoded" in reason
        row = slide_rows(out)["bad"]
        assert (row["status"], row["num_candidates"], row["num_blank"]) == ("taken", "80", "64")
        assert reason in row["notes"]
    file.write_bytes(good)
    assert not cut(file.parent, out).failures
    check_it_is_as_never_bad(file.parent, out)


def test_the_command_names_bad_slides_and_its_exit_code_changes(folder, tmp_path, capsys):
    arguments = ["tile", "--slides", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    good = (folder / "bad.svs").read_bytes()
    fill_with_zeros(folder / "bad.svs")
    assert main([*arguments, "--recipe", "smoke"]) == 1
    assert f"failed: bad: bad.svs ({len(good):,} bytes) {DAMAGED}" in capsys.readouterr().err
    assert main(["tile", "--out", str(tmp_path / "out"), "--verify"]) == 0
    (folder / "bad.svs").write_bytes(good)
    assert main([*arguments, "--recipe", "smoke"]) == 0


def test_a_dry_run_names_what_is_not_there(folder, tmp_path, capsys):
    remove_the_target(folder / "bad.svs")
    arguments = ["tile", "--slides", str(folder), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 1
    assert "bad is not at" in capsys.readouterr().out
