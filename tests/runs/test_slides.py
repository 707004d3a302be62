"""Slides to slides as a run: what comes out, and how it resumes, is shared and is reported."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from cytosyn_aug import DensityReference, StainReference, normalize_slide, offline
from cytosyn_aug.cli.main import main
from cytosyn_aug.runs import listing
from cytosyn_aug.runs import slides as slide_runs
from cytosyn_aug.runs.execute import cut_units
from cytosyn_aug.runs.folder import RunFolder, open_run
from cytosyn_aug.runs.plan import plan_slides
from cytosyn_aug.runs.unit_work import software
from cytosyn_aug.slides.blocks import BlockMaker
from cytosyn_aug.slides.recipe import SlideRecipe
from tests.report.test_rendering import check_page
from tests.support.offline_runs import QUIET, digest, rows
from tests.support.synthetic import damage_tile, synthetic_tiles, write_slide

pytestmark = pytest.mark.usefixtures("remembered_tables")
SIDE = 112


def picture(seed):
    """Return 6 x 6 tiles of tissue in a frame of glass."""
    whole = synthetic_tiles(1, seed=seed, size=8 * SIDE)[0].permute(1, 2, 0).numpy().copy()
    for edge in (whole[:SIDE], whole[-SIDE:], whole[:, :SIDE], whole[:, -SIDE:]):
        edge[:] = 243
    return whole


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A folder of three slides of two classes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("slides")
    for k, name in enumerate(["tumour/a.svs", "tumour/b.svs", "normal/c.svs"]):
        (folder / name).parent.mkdir(exist_ok=True)
        write_slide(folder / name, picture(k), mpp="0.5", power="20")
    (folder / "normal" / "broken.svs").write_text("no slide")
    return folder


@pytest.fixture(scope="module")
def reference():
    return DensityReference.fit(255 - synthetic_tiles(6, seed=7) // 2)


@pytest.fixture(scope="module")
def normalised(slides, reference, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("normalised") / "out"
    normalize(slides, out, reference)
    return out


def normalize(slides, out, reference, **changes):
    settings = {"reference": reference, "method": "transport", "work": QUIET}
    return offline.normalize_slides(slides, out, **settings | changes)


@pytest.mark.slow
def test_every_slide_is_what_normalize_slide_makes_and_has_a_row(
    slides, reference, normalised, tmp_path
):
    found = {row["source"]: row for row in rows(normalised)}
    assert list(found) == ["normal/broken.svs", "normal/c.svs", "tumour/a.svs", "tumour/b.svs"]
    broken = found.pop("normal/broken.svs")
    assert (broken["status"], broken["output"]) == ("failed", None)
    assert (broken["variant"], broken["reference"], broken["strength"]) == (-1, None, None)
    assert broken["reason"].startswith("(8 bytes) is of a format OpenSlide does not read")
    for source, row in found.items():
        assert row["output"] == source.replace(".svs", ".ome.tif")
        assert (row["status"], row["label"]) == ("edited", source.partition("/")[0])
        alone = normalize_slide(slides / source, tmp_path / f"{row['unit']}.tif", reference)
        assert (normalised / row["output"]).read_bytes() == alone.out.read_bytes()
        assert row["key"] == alone.source_digest
    files = set(digest(normalised)) - {"run.json", "manifest.parquet"}
    assert files == {row["output"] for row in found.values()}


def test_a_rerun_does_nothing_and_another_recipe_is_refused(
    slides, reference, normalised, monkeypatch
):
    before = digest(normalised)
    monkeypatch.setattr(BlockMaker, "make", None)
    summary = normalize(slides, normalised, reference)  # tries what failed
    assert summary.counts == {"edited": 3, "failed": 1}
    assert [name for name, _ in summary.failed] == ["normal/broken.svs"]
    with pytest.raises(ValueError, match=r"holds another run.*\n  recipe.strength: 1.0 -> 0.5"):
        normalize(slides, normalised, reference, recipe=SlideRecipe(strength=0.5))
    with pytest.raises(ValueError, match=r"holds another run.*\n  references: "):
        normalize(slides, normalised, DensityReference.fit(synthetic_tiles(2)))
    assert digest(normalised) == before


def test_a_slide_without_a_name_of_its_own_leaves_the_other_s_result(slides, reference, tmp_path):
    for name in ("a.svs", "a.tif"):
        shutil.copy(slides / "tumour" / "a.svs", tmp_path / name)
    table, out = tmp_path / "slides.csv", tmp_path / "out"
    table.write_text("path\na.svs\na.tif\na.svs\n")
    for _ in range(2):  # the second time to try again what failed
        summary = normalize(table, out, reference)
        assert summary.counts == {"edited": 1, "failed": 2}
        assert [reason for _, reason in summary.failed] == [
            "would be written under the same name as a.svs; rename one",
            "is listed twice",
        ]
        assert (out / "a.ome.tif").is_file()


def test_the_longest_name_leaves_room_for_that_of_an_unfinished_file(
    slides, reference, tmp_path, monkeypatch
):
    slide = tmp_path / f"{listing._MAX_NAME_BYTES * 'n'}.svs"
    slide.symlink_to(slides / "tumour" / "a.svs")
    monkeypatch.setattr("os.getpid", lambda: 4_194_303)  # the largest of Linux
    assert normalize(slide, tmp_path / "out", reference).counts == {"edited": 1}


def test_shards_together_are_the_whole(slides, reference, normalised, tmp_path):
    out = tmp_path / "out"
    first = normalize(slides, out, reference, work=replace(QUIET, shard=(0, 2)))
    assert not first.is_complete
    assert normalize(slides, out, reference, work=replace(QUIET, shard=(1, 2))).is_complete
    assert digest(out) == digest(normalised)


def test_stopped_in_a_slide_it_goes_on_from_there(
    slides, reference, normalised, tmp_path, monkeypatch
):
    out, made = tmp_path / "out", []

    def stop(maker, position, make=BlockMaker.make):
        made.append(position)
        if len(made) == 6:  # of 4 blocks a slide
            raise KeyboardInterrupt
        return make(maker, position)

    with monkeypatch.context() as patch:
        patch.setattr(BlockMaker, "make", stop)
        with pytest.raises(KeyboardInterrupt):
            normalize(slides, out, reference, work=replace(QUIET, readers=1))
    assert [f.name for f in out.rglob("*.ome.tif")] == ["c.ome.tif"]
    finished = (out / "normal" / "c.ome.tif").stat().st_mtime_ns
    normalize(slides, out, reference)
    assert digest(out) == digest(normalised)
    assert (out / "normal" / "c.ome.tif").stat().st_mtime_ns == finished


def test_killed_between_a_slide_and_its_receipt_it_goes_on(
    slides, reference, normalised, tmp_path, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    out, shard = tmp_path / "out", replace(QUIET, shard=(1, 4))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_receipt", die)
        with pytest.raises(KeyboardInterrupt):
            normalize(slides, out, reference, work=shard)
    assert (out / "normal" / "c.ome.tif").is_file()
    normalize(slides, out, reference, work=shard)
    same = normalised / "normal" / "c.ome.tif"
    assert (out / "normal" / "c.ome.tif").read_bytes() == same.read_bytes()


@pytest.mark.slow
def test_what_is_found_on_a_slide_is_in_its_row(reference, tmp_path):
    """Damage, glass, and a slide that was fine before and cannot be read now."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("damaged", "fine"):
        write_slide(folder / f"{name}.svs", picture(0), mpp="0.5", power="20")
    damage_tile(folder / "damaged.svs", 0)
    write_slide(folder / "glass.svs", np.full_like(picture(0), 243), mpp="0.5", power="20")
    recipe = SlideRecipe(allows_damage=True)
    normalize(folder, out, reference, recipe=recipe)
    found = {row["slide"]: (row["status"], row["reason"]) for row in rows(out)}
    assert found["damaged"] == ("edited", "damaged at x=0 y=0, left black")
    assert found["fine"] == ("edited", "")
    assert found["glass"][0] == "blank"
    assert "no tissue was found" in found["glass"][1]
    (folder / "fine.svs").write_text("no slide any more")
    assert normalize(folder, out, reference, recipe=recipe).counts["failed"] == 1
    assert {f.name for f in out.glob("*.tif")} == {"damaged.ome.tif", "glass.ome.tif"}


def test_a_bar_tells_slides_and_what_is_left(slides, reference, tmp_path, capsys):
    normalize(slides / "tumour", tmp_path / "out", reference, work=replace(QUIET, progress=True))
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert re.search(r"100%.* 2.0/2 slides \[\d\d:\d\d<00:00, +[\d.]+(slide/s|s/slide)\]", last)


def test_progress_adds_up_to_slides(slides, reference, tmp_path):
    run = plan_slides(slides, tmp_path / "out", None, reference, "transport", SlideRecipe())
    units = cut_units(run.listing, 1)
    with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
        folder.prepare()
        parts = list(run.work.execute(units, folder, readers=1))
    done = [sum(part for unit, part in parts if unit == each) for each in units]
    assert done == pytest.approx([1, 1, 1, 1])
    assert len(parts) > 3 * 4  # after each block


def test_a_slide_that_another_process_holds_is_left_to_it(
    slides, reference, normalised, tmp_path, monkeypatch
):
    run = plan_slides(slides, tmp_path / "out", None, reference, "transport", SlideRecipe())
    units = cut_units(run.listing, 1)
    with open_run(run.folder, run.identity, software(), overwrite=False) as folder:
        folder.prepare()
        with folder.claim(units[2]):
            summary = normalize(slides, run.folder, reference)
    assert not summary.is_complete
    assert not (run.folder / "tumour" / "a.ome.tif").exists()
    assert normalize(slides, run.folder, reference).is_complete
    assert set(digest(run.folder)) == set(digest(normalised))


def test_a_dry_run_tells_bytes_and_hours(slides, reference, normalised, tmp_path, monkeypatch):
    work = replace(QUIET, dry_run=True)
    told = normalize(slides, tmp_path / "out", reference, work=work).estimate
    assert not (tmp_path / "out").exists()
    assert (told["units"], told["slides_to_do"], told["unusable"]) == (4, 4, 1)
    assert told["problems"][0].startswith("normal/broken.svs (8 bytes) is of a format")
    written = sum(f.stat().st_size for f in normalised.rglob("*.ome.tif"))
    assert told["output_bytes"] == pytest.approx(written, rel=0.25)
    assert told["hours"] >= 0
    monkeypatch.setattr(slide_runs, "_TRIAL_SLIDES", 1)
    told = normalize(slides, tmp_path / "out", reference, work=work).estimate
    assert told["output_bytes"] == pytest.approx(written, rel=0.5)  # of three by one
    told = normalize(slides, normalised, reference, work=work).estimate
    assert (told["units_to_do"], told["unusable"], told["output_bytes"]) == (1, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("num_slides", [1, 5, 8])
def test_a_dry_run_tries_three_slides_however_many_there_are(
    reference, tmp_path, monkeypatch, num_slides
):
    (tmp_path / "slides").mkdir()
    for k in range(num_slides):
        write_slide(tmp_path / "slides" / f"{k}.svs", picture(0), mpp="0.5")
    tried = []

    def try_slide(file, *_, **__):
        tried.append(file.stem)
        return 1000, 3.6

    monkeypatch.setattr(slide_runs, "try_slide", try_slide)
    work = replace(QUIET, dry_run=True)
    told = normalize(tmp_path / "slides", tmp_path / "out", reference, work=work).estimate
    assert tried == {1: ["0"], 5: ["0", "1", "3"], 8: ["0", "2", "5"]}[num_slides]
    assert told["output_bytes"] == 1000 * num_slides  # all are of one size


def test_a_table_gives_each_slide_its_scale_and_label(reference, tmp_path):
    for name, mpp in (("bare.svs", None), ("wrong.svs", "0.25")):
        write_slide(tmp_path / name, picture(0), mpp=mpp, power=None)
    with (tmp_path / "slides.csv").open("w") as stream:
        table = csv.writer(stream)
        table.writerows([["path", "label", "mpp"], ["bare.svs", "x", 0.5], ["wrong.svs", "y", 0.5]])
    out = tmp_path / "out"
    assert normalize(tmp_path / "slides.csv", out, reference).counts == {"edited": 2}
    assert [row["label"] for row in rows(out)] == ["x", "y"]
    assert (out / "bare.ome.tif").read_bytes() != (out / "wrong.ome.tif").read_bytes()  # digests
    summary = normalize(tmp_path / "bare.svs", tmp_path / "one", reference)
    assert "states neither" in summary.failed[0][1]


@pytest.mark.parametrize("shard", [0, 2])  # a slide that fails, and one that does not
def test_links_that_lead_out_are_refused(slides, reference, tmp_path, shard):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    normalize(slides, out, reference, work=replace(QUIET, shard=(1, 4)))
    shutil.rmtree(out / "normal")
    for name in ("normal", "tumour"):
        (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        normalize(slides, out, reference, work=replace(QUIET, shard=(shard, 4)))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_the_model_is_part_of_the_run(slides, small, tmp_path):
    lab = StainReference.fit(small, 255 - synthetic_tiles(6, seed=7) // 2)
    out, same = tmp_path / "out", tmp_path / "same"
    tumour = slides / "tumour"
    summary = offline.normalize_slides(tumour, out, small, reference=lab, work=QUIET)
    assert summary.counts == {"edited": 2}
    assert {row["model"] for row in rows(out)} == {small.digest}
    alone = normalize_slide(tumour / "a.svs", tmp_path / "a.tif", lab, generator=small)
    assert (out / "a.ome.tif").read_bytes() == alone.out.read_bytes()
    work = replace(QUIET, readers=1)
    offline.normalize_slides(tumour, same, small, reference=lab, work=work)
    assert digest(same) == digest(out)
    with small.batches.fixed():  # as workers of another engine have it
        again = normalize_slide(tumour / "a.svs", tmp_path / "b.tif", lab, generator=small)
    assert again.change_digest == alone.change_digest


def test_a_model_that_is_not_needed_makes_no_other_run(slides, reference, normalised, small):
    settings = {"reference": reference, "method": "transport", "work": QUIET}
    summary = offline.normalize_slides(slides, normalised, small, **settings)
    assert summary.counts == {"edited": 3, "failed": 1}  # which the command, without one, has made


def test_the_command_does_the_run_of_the_function(slides, reference, normalised, tmp_path, capsys):
    reference.save(tmp_path / "lab.json")
    words = ["--reference", str(tmp_path / "lab.json"), "--method", "transport", "--quiet"]
    out = str(tmp_path / "out")
    command = ["normalize-slide", str(slides), out, *words]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == f"{out}: 3 edited, 1 failed\n"
    assert "failed: normal/broken.svs (8 bytes) is of a format" in said.err
    made = digest(tmp_path / "out")
    assert main([*command, "--dry-run"]) == 1
    assert json.loads(capsys.readouterr().out)["units_to_do"] == 1
    assert main([*command, "--threads", "1"]) == 1
    assert digest(tmp_path / "out") == made
    for name in set(made) - {"run.json", "manifest.parquet"}:
        assert (tmp_path / "out" / name).read_bytes() == (normalised / name).read_bytes()
    assert main([*command, "--overwrite", "--strength", "0.5"]) == 1
    assert {row["strength"] for row in rows(tmp_path / "out")} == {0.5, None}  # one failed


def test_one_slide_to_one_file_is_not_shared(slides, reference, tmp_path, capsys):
    reference.save(tmp_path / "lab.json")
    words = ["--reference", str(tmp_path / "lab.json"), "--method", "transport", "--quiet"]
    one = ["normalize-slide", str(slides / "tumour" / "a.svs"), str(tmp_path / "a.tif"), *words]
    assert main([*one, "--shard", "0/2"]) == 2
    assert "is one file, and one slide is not shared" in capsys.readouterr().err
    assert main([*one, "--actors", "2"]) == 2
    assert "can only be combined with --engine ray" in capsys.readouterr().err
    assert main(["normalize-slide", str(slides), str(tmp_path / "a.tif"), *words]) == 2
    assert "is a folder, and" in capsys.readouterr().err
    assert main([one[0], one[1], str(tmp_path / "a.svs"), *words]) == 2
    assert "would become a folder; for a single slide give a name" in capsys.readouterr().err
    assert not (tmp_path / "a.svs").exists()
    assert main([*one, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "a.tif").exists()
    assert main(one) == 0
    assert "a.tif: normalized, 896x896 px at 0.5 microns/pixel, " in capsys.readouterr().out
    written = (tmp_path / "a.tif").stat().st_size
    assert told["output_bytes"] == pytest.approx(written, rel=0.25)
    assert main(one) == 0
    assert "is up to date; use --overwrite" in capsys.readouterr().out


def test_the_report_of_a_run_shows_slides_and_names_what_failed(
    slides, reference, normalised, tmp_path, monkeypatch
):
    text = check_page(offline.report(normalised, out=tmp_path / "a.html").read_text()).whole_text
    assert "normal/broken.svs failed: (8 bytes) is of a format" in text
    assert "not compared" not in text  # where the slides lay is known
    monkeypatch.setattr("cytosyn_aug.report.slide_page._MAX_SHOWN", 2)
    found = check_page(offline.report(normalised, out=tmp_path / "b.html").read_text())
    assert "2 of 3 slides are shown" in found.whole_text
    assert found.whole_text.count("What the file says of itself") == 2
    normalize(slides, tmp_path / "out", reference, work=replace(QUIET, shard=(1, 4)))
    part = offline.report(tmp_path / "out", out=tmp_path / "c.html")
    text = check_page(part.read_text()).whole_text
    assert "Not finished: 1 of 4 slides are written so far." in text
    assert "normalize-slide: out" in text


def test_the_manifest_has_the_columns_of_all_others(normalised, tree, tmp_path, small):
    lab = StainReference.fit(small, synthetic_tiles(6, seed=7))
    offline.normalize(tree, tmp_path / "tiles", small, reference=lab, work=QUIET)
    of_slides, of_tiles = (
        pq.read_schema(out / "manifest.parquet") for out in (normalised, tmp_path / "tiles")
    )
    assert of_slides.equals(of_tiles)
