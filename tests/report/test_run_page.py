"""Reports: what they say of runs and slides is true, whatever state and form those are in."""

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cytosyn_aug import offline
from cytosyn_aug.cli.main import main
from cytosyn_aug.report import run_data
from cytosyn_aug.report.pictures import RunPictures
from cytosyn_aug.report.run_data import gather
from cytosyn_aug.runs.manifest import open_manifest
from cytosyn_aug.runs.receipts import ROW_SCHEMA
from tests.report.test_rendering import check_page
from tests.support.offline_runs import QUIET, augment, digest, read
from tests.support.synthetic import SIZE, synthetic_tiles
from tests.support.synthetic import save_tile as save

SECTIONS = [
    "Before and after",
    "Content by reference",
    "Colour",
    "Structure",
    "Similarity and change of colour",
    "Worst cases",
    "Blank, rejected and failed",
    "References and slides",
    "Throughput",
    "Settings",
]


def page_of(made, **settings):
    """Write a report and return its text and the page, checked."""
    text = offline.report(made, **settings).read_text()
    return text, check_page(text)


def headings(found):
    titles = [attributes["href"][1:] for tag, attributes in found.elements if tag == "a"]
    return [title.replace("-", " ") for title in titles]


def num_pictures(found):
    return sum(tag == "img" for tag, _ in found.elements)


def all_rows(out):
    return pq.read_table(out / "manifest.parquet").to_pylist()


def test_a_report_says_what_was_done(tree, tmp_path, small, laboratories):
    (tree / "stroma" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    text, found = page_of(out)
    assert headings(found) == [re.sub(r"\W", " ", name.lower()) for name in SECTIONS]
    said = found.whole_text
    assert "stroma/broken.png" in said
    assert "1 failed" in said
    assert "2 blank" in said
    for value in (small.digest, "recipe.variants", "names_sha256", "version of torch"):
        assert value in said
    for entry in open_manifest(out).identity["references"]:
        assert entry["sha256"] in said
    assert all_rows(out)[0]["recipe"] in said
    assert "results per second" in said
    assert text.count('class="pair"') > 9


def test_a_report_is_the_same_every_time_and_changes_nothing(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    before = digest(out)
    first = offline.report(out).read_bytes()
    assert offline.report(out).read_bytes() == first
    assert offline.report(out, out=tmp_path / "other.html").read_bytes() == first
    times = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    assert augment(tree, out, small, laboratories).is_complete  # goes on, and has nothing to do
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == times
    after = digest(out)
    assert after.pop("report.html")
    assert after == before


def test_names_with_odd_characters_are_text(tmp_path, small, laboratories):
    name = 'a/<img src=x onerror=alert(1)>&"\n\u202egpj;.png'
    tile = synthetic_tiles(1)[0]
    save(tmp_path / "in" / name, tile)
    save(tmp_path / "in" / "<script>alert(2)<" / "script>.png", synthetic_tiles(1, seed=1)[0])
    (tmp_path / "in" / "<b>broken.png").write_bytes(b"")
    out = tmp_path / "<i>out & more"
    augment(tmp_path / "in", out, small, laboratories)
    _, found = page_of(out)
    shown = [attributes.get("title", "") for _, attributes in found.elements]
    everything = found.whole_text + "".join(shown)
    assert r'a/<img src=x onerror=alert(1)>&"\n\u202egpj;.png' in everything
    assert "<b>broken.png" in everything
    assert "augment: <i>out & more" in everything


@pytest.mark.slow
@pytest.mark.parametrize("format", ["png", "webp", "tar", "images"])
def test_results_of_every_form_are_shown(tree, tmp_path, small, laboratories, format):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, format=format)
    pictures = RunPictures(open_manifest(out))
    plain = tmp_path / "plain"
    augment(tree, plain, small, laboratories)
    for row, same in zip(all_rows(out), all_rows(plain), strict=True):
        assert torch.equal(
            torch.from_numpy(pictures.after(row).pixels).permute(2, 0, 1),
            read(plain / same["output"]),
        )
        assert (pictures.before(row).pixels == np.asarray(Image.open(tree / row["source"]))).all()
    _, found = page_of(out)
    assert "missing" not in [attributes.get("class") for _, attributes in found.elements]


def test_latents_and_encodings_are_counted_and_not_drawn(tree, tmp_path, small, laboratories):
    out = tmp_path / "latents"
    augment(tree, out, small, laboratories, format="latents")
    _, found = page_of(out)
    assert "is in the cache as latents" in found.whole_text
    assert "Nothing stands out" in found.whole_text
    assert num_pictures(found) > 9  # the sources, and tiles of the references
    summary = offline.cache(tree, tmp_path / "cache", small, work=QUIET)
    _, found = page_of(summary.out)
    assert "10cached" in found.whole_text
    assert "is in the cache as encodings" in found.whole_text
    assert "Nothing stands out" in found.whole_text
    assert "drawn anew" not in found.whole_text
    assert "Results that do not say their slide: 1." in found.whole_text
    with pytest.raises(FileNotFoundError, match=r"such as .*runs"):
        offline.report(tmp_path / "cache")


def shard_of(tree, file):
    import tarfile

    with tarfile.open(file, "w") as tar:
        for tile in sorted(tree.rglob("*_?.png")):
            tar.add(tile, tile.relative_to(tree).as_posix())
    return file


def table_of(tree, file):
    names = [f.relative_to(file.parent).as_posix() for f in sorted(tree.rglob("*_?.png"))]
    pq.write_table(pa.table({"path": names}), file)
    return file


def test_a_tiff_in_a_table_is_found_again_as_slide_or_tile(
    tmp_path, small, laboratories, synthetic_slide
):
    synthetic_slide("slide.tif", grid="##\n##", side=256, mpp=None, power=None)
    save(tmp_path / "tile.tif", synthetic_tiles(1)[0])
    file = tmp_path / "places.csv"
    file.write_text("path,x,y,mpp\nslides/slide.tif,128,0,0.25\ntile.tif,128,0,\n")
    out = tmp_path / "out"
    augment(file, out, small, laboratories)
    pictures = RunPictures(open_manifest(out))
    assert {row["source"]: row["mpp"] for row in all_rows(out)} == {
        "slides/slide.tif": 0.25,
        "tile.tif": None,
    }
    assert {row["source"]: pictures.before(row).problem for row in all_rows(out)} == {
        "slides/slide.tif": "",
        "tile.tif": "",
    }


@pytest.mark.parametrize("kind", ["shards", "table", "slides"])
def test_sources_of_every_kind_are_found_again(
    tree, tmp_path, small, laboratories, synthetic_slide, kind
):
    if kind == "slides":
        source = synthetic_slide(grid="###\n###", side=256).parent
    elif kind == "shards":
        (tmp_path / "shards").mkdir()
        shard_of(tree, tmp_path / "shards" / "a.tar")
        source = tmp_path / "shards"
    else:
        source = table_of(tree, tmp_path / "tiles.parquet")
    out = tmp_path / "out"
    augment(source, out, small, laboratories, input=kind)
    pictures = RunPictures(open_manifest(out))
    done = [row for row in all_rows(out) if row["output"]]
    assert done
    for row in done:  # the key of the manifest is that of these pixels, or there are none
        assert pictures.before(row).problem == ""


def test_tiles_of_a_slide_are_told_apart(tmp_path, small, laboratories, synthetic_slide):
    source = synthetic_slide(grid="###\n###", side=256).parent
    out = tmp_path / "out"
    augment(source, out, small, laboratories)
    made = all_rows(out)
    named = {f"slide.svs at {row['x']}, {row['y']}" for row in made}
    assert len(named) > 2
    text = page_of(out)[0]
    assert named == set(re.findall(r"slide\.svs at \d+, \d+", text))
    matrix = gather(out, source=None, num_tiles=9).matrix
    assert len(matrix) == len(named)  # a row is a tile, with a cell a reference
    for cells in matrix:
        assert len(cells) == 2
        assert len({row["key"] for row in cells.values()}) == 1


def test_sources_that_moved_or_changed_are_not_shown_as_they_were(
    tree, tmp_path, small, laboratories
):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    moved = tmp_path / "moved"
    shutil.move(tree, moved)
    _, found = page_of(out)
    assert f"{tree} is not there; give --source" in found.whole_text
    whole = num_pictures(page_of(out, source=moved)[1])
    assert whole > num_pictures(found)
    changed = sorted(moved.rglob("slide*_0_0.png"))[0]
    save(changed, synthetic_tiles(1, seed=5)[0])
    _, found = page_of(out, source=moved)
    assert "has changed since" in found.whole_text
    assert num_pictures(found) < whole


def test_damaged_rows_are_left_out_of_a_run_at_work_and_named_of_a_finished_one(
    tree, tmp_path, small, laboratories
):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    receipts = sorted((out / ".work" / "receipts").iterdir())
    rows = pq.read_metadata(receipts[1]).num_rows
    receipts[0].write_bytes(receipts[0].read_bytes()[:-20])
    assert f"Not finished: {rows} rows so far" in page_of(out)[1].whole_text
    with pytest.warns(UserWarning, match="is done again, because .*parquet is damaged"):
        augment(tree, out, small, laboratories)
    manifest = out / "manifest.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"manifest\.parquet is damaged; restore it"):
        offline.report(out)


def test_an_unfinished_run_says_how_far_it_came(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    _, found = page_of(out)
    rows = sum(file.num_rows for file in map(pq.read_metadata, (out / ".work").rglob("*.parquet")))
    assert f"Not finished: {rows} rows so far, of 4 work units of 10 tiles" in found.whole_text
    augment(tree, out, small, laboratories)
    assert "Not finished" not in page_of(out)[1].whole_text


def test_a_run_that_ends_meanwhile_is_read_again(tree, tmp_path, small, laboratories, monkeypatch):
    out, opened = tmp_path / "out", []
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))

    def open_and_end(folder):
        manifest = open_manifest(folder)
        opened.append(manifest)
        if len(opened) == 1:
            augment(tree, out, small, laboratories)
        return manifest

    monkeypatch.setattr(run_data, "open_manifest", open_and_end)
    assert "Not finished" not in page_of(out)[1].whole_text
    assert [manifest.is_finished for manifest in opened] == [False, True]


def with_gate(out, low, high):
    """Give a run bounds of similarity, and reject what lies outside."""
    file = out / "run.json"
    run = json.loads(file.read_text())
    run["identity"]["recipe"] |= {"min_similarity": low, "max_similarity": high}
    file.write_text(json.dumps(run))
    rows = all_rows(out)
    for row in rows:
        if not low <= row["similarity"] <= high:
            row["status"] = "rejected"
            row["reason"] = f"similarity {row['similarity']:.2f} is not in {low} to {high}"
    pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), out / "manifest.parquet")
    return sum(row["status"] == "rejected" for row in rows)


def test_the_gate_is_drawn_into_the_similarities(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    offline.augment(
        tree, out, small, mode="resample", steps=2, variants=3, work=QUIET,
        allow_geometry_change=True,
    )  # fmt: skip
    text, found = page_of(out)
    assert "No gate was set" in found.whole_text
    assert "Not scored" in found.whole_text
    assert "pixel by pixel: most of it is structure that was drawn anew" in found.whole_text
    assert "Delta E, of colour and of structure that was drawn anew: the largest" in (
        found.whole_text
    )
    values = sorted(row["similarity"] for row in all_rows(out) if row["status"] == "edited")
    low, high = (round(values[len(values) * k // 4], 2) for k in (1, 3))
    rejected = with_gate(out, low, high)
    assert rejected > 2
    text, found = page_of(out)
    assert f">min {low:g}<" in text
    assert f">max {high:g}<" in text
    assert f"the {rejected} results that it rejected" in found.whole_text
    assert f"{rejected} rejected" in found.whole_text
    assert "Each tile is named, once for all variants" in found.whole_text
    kept = sum(row["status"] == "edited" for row in all_rows(out))
    said = f"More was rejected than kept: {rejected} of {rejected + kept}."
    assert (said in found.whole_text) == (rejected > kept)


def test_structure_and_colour_are_measured_on_the_pictures(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    offline.normalize(tree, out, small, reference=laboratories[0], work=QUIET)
    run = gather(out, source=None, num_tiles=96)
    assert run.measures.num_read == 9
    assert run.measures.structure_quantile(0.0) > 0.9
    rolled = next(row for row in run.tally.sample if row["source"].startswith("tumour"))
    save(out / rolled["output"], read(out / rolled["output"]).roll(3, 2))
    _, found = page_of(out)
    assert "Structure is kept less well than usual" in found.whole_text
    worst = found.whole_text.split("Structure: the least kept")[1]
    assert worst.index(rolled["source"]) < worst.index("structure 0.")


def test_results_go_towards_the_reference_or_the_report_says_so(tmp_path, small):
    redder = (synthetic_tiles(4, seed=3) * torch.tensor([1.0, 0.8, 0.9])[:, None, None]).byte()
    for k, tile in enumerate(redder):
        save(tmp_path / "lab" / f"{k}.png", tile)
    for k, tile in enumerate(synthetic_tiles(4)):
        save(tmp_path / "in" / f"{k}.png", tile)
    out = tmp_path / "out"
    settings = {"reference": tmp_path / "lab", "method": "reinhard", "work": QUIET}
    offline.normalize(tmp_path / "in", out, small, **settings)
    _, found = page_of(out)
    closed = re.search(r"lab(\d+\.\d)(\d+\.\d)(\d+)%", found.whole_text)
    assert int(closed[3]) > 90
    assert "farther from reference" not in found.whole_text
    for file in out.glob("*.png"):  # the sources' colours, away from the reference's
        pale = 255 - (255 - read(tmp_path / "in" / file.name)) // 2
        save(file, pale)
    assert "Results are farther from reference lab" in page_of(out)[1].whole_text


def test_references_without_tiles_are_shown_by_their_mean(tree, tmp_path, small, laboratories):
    from cytosyn_aug import StainReference

    reference = StainReference.fit(small, laboratories[0])
    reference.save(tmp_path / "saved.json")
    out = tmp_path / "out"
    augment(
        tree, out, small, {"object": StainReference.fit(small, laboratories[1]),
                           "saved": tmp_path / "saved.json", "folder": laboratories[0]},
        strength=(0.5, 1.0),
    )  # fmt: skip
    run = gather(out, source=None, num_tiles=96)
    by_name = {found.name: found for found in run.references}
    assert by_name["object"].problem == by_name["saved"].problem == "was given without its tiles"
    assert by_name["folder"].distribution is not None
    # The mean density of the same tiles, against the mean colour of their pixels.
    for axis in ("H", "E"):
        mean, other = by_name["saved"].mean[axis], by_name["folder"].mean[axis]
        assert mean == pytest.approx(other, abs=0.08)
    page_of(out)


def test_throughput_is_that_of_the_files(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    os.utime(out / "run.json", (1000.0, 1000.0))
    edited = [row for row in all_rows(out) if row["status"] == "edited"]
    for number, row in enumerate(edited):
        time = 1000.0 + (number + 1) * 2.0
        os.utime(out / row["output"], (time, time))
    assert gather(out, source=None, num_tiles=4).throughput.results_per_s == pytest.approx(0.5)


def test_seams_are_measured_where_names_say_the_place(tmp_path, small, laboratories):
    """Tiles of one picture have no seams; made brighter one by one, they do."""
    picture = torch.nn.functional.interpolate(
        torch.rand(1, 3, 90, 90, generator=torch.Generator().manual_seed(0)), 5 * SIZE,
        mode="bicubic",
    )  # fmt: skip
    picture = (60 + 120 * picture.clamp(0, 1)).byte()[0]
    for row, column in np.ndindex(5, 5):
        tile = picture[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        save(tmp_path / "in" / "one" / f"{column * 448}_{row * 448}.png", tile)
    out = tmp_path / "out"
    settings = {"reference": laboratories[0], "method": "transport", "work": QUIET}
    offline.normalize(tmp_path / "in", out, small, **settings)
    for number, file in enumerate(sorted(out.rglob("*.png"))):
        source = tmp_path / "in" / file.relative_to(out)
        save(file, read(source) - 40 * (number % 2))
    (seams,) = gather(out, source=None, num_tiles=4).seams
    assert (seams.slide, seams.num_tiles) == ("one", 25)
    assert seams.before == pytest.approx(1.0, abs=0.3)
    assert seams.after > 2
    assert f"{seams.after:.2f}" in page_of(out)[1].whole_text


def test_generated_tiles_are_shown_without_sources(tmp_path, small):
    offline.sample(tmp_path / "out", small, n=5, steps=2, work=QUIET)
    _, found = page_of(tmp_path / "out")
    assert num_pictures(found) == 5
    assert "sources" not in found.whole_text
    assert "Generated tiles" in found.whole_text
    assert "Before and after" not in found.whole_text


def test_a_run_without_results_has_a_report(tmp_path, small, laboratories):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"")
    augment(tmp_path / "in", tmp_path / "out", small, laboratories)
    _, found = page_of(tmp_path / "out")
    assert "1 failed" in found.whole_text
    assert "No tile was changed" in found.whole_text


def test_a_run_of_glass_does_not_pass_for_one_where_nothing_stands_out(
    tmp_path, small, laboratories
):
    save(tmp_path / "in" / "glass.png", torch.full((3, 224, 224), 243, dtype=torch.uint8))
    augment(tmp_path / "in", tmp_path / "out", small, laboratories)
    _, found = page_of(tmp_path / "out")
    assert "No tile was changed" in found.whole_text
    assert "Nothing stands out" not in found.whole_text


def test_runs_of_earlier_versions_have_a_report(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    run = json.loads((out / "run.json").read_text())
    del run["context"]
    (out / "run.json").write_text(json.dumps(run))
    _, found = page_of(out)
    assert "the run does not say where its input lay; give --source" in found.whole_text
    assert num_pictures(page_of(out, source=tree)[1]) > num_pictures(found)


def test_the_command_writes_where_it_is_told_and_names_what_is_wrong(
    tree, tmp_path, small, laboratories, capsys
):
    out, file = tmp_path / "out", tmp_path / "page.html"
    augment(tree, out, small, laboratories)
    assert main(["report", str(out), "--out", str(file), "--num-tiles", "4"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert "Of 4 results drawn evenly" in check_page(file.read_text()).whole_text
    for words, message in (
        ([str(out), "--out", str(tmp_path / "a.pdf")], "ends in .html"),
        ([str(out), "--out", str(tmp_path / "no" / "a.html")], "does not exist; make it"),
        ([str(out), "--source", str(tmp_path / "no")], "give the IN"),
        ([str(out), "--num-tiles", "0"], "expected at least 1"),
        ([str(tmp_path / "no")], "does not exist; give the OUT"),
        ([str(tree)], r"holds no run.json"),
        ([str(tree / "stroma" / "blank.png")], "is not what normalize-slide wrote"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
