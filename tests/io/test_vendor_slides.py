"""Slides as Aperio, Hamamatsu and 3DHISTECH write them, and generic ones, through everything."""

import re
import shutil

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cytosyn_aug import MacenkoReference, offline
from cytosyn_aug.cli.main import main
from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.io.tile_source import read_tiles
from cytosyn_aug.io.tissue import TissueConfig, tissue_pixels
from cytosyn_aug.runs.recipes import Work
from cytosyn_aug.slides import normalize as whole_slides
from cytosyn_aug.slides.normalize import SlideRecipe, normalize_slide
from cytosyn_aug.stain.colour_table import ColourTable
from tests.support.synthetic import SIZE, synthetic_tiles
from tests.support.vendor_slides import PHOTO_STEP, write_mrxs, write_ndpi, write_svs, write_tif

MPP = 0.25
EXTENT = 2 * SIZE  # of the model's tiles, in level-0 pixels
WIDTH, HEIGHT = 1152, 928  # five tiles and a bit by four, and as many photos that overlap
WRITERS = {
    "aperio.svs": (write_svs, "properties", 2),
    "generic.tif": (write_tif, "tiff", 2),
    "hamamatsu.ndpi": (write_ndpi, "properties", 6),  # of two JPEGs, halved by their decoder too
    "mirax.mrxs": (write_mrxs, "properties", 3),
}
MISSING = {(2, 1), *((0, row) for row in range(4))}  # photos: one amid tissue, and a column
GAP = 2 * PHOTO_STEP + 32, PHOTO_STEP + 32  # where 160 px squared lack, at least
RIM = PHOTO_STEP - 12  # what lacks on the left; photos are up to 12 px off their grid
LOSSLESS = SlideRecipe(compression="deflate")


def smooth_picture():
    """H&E at twice its size, which JPEG keeps to within a few grey levels: uint8 [H, W, 3]."""
    tiles = synthetic_tiles(30).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(tiles[k : k + 6]), 1) for k in range(0, 30, 6)]
    small = np.concatenate(rows)[: HEIGHT // 2, : WIDTH // 2]
    return np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


PICTURE = smooth_picture()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One slide of each vendor, and the companion folder that one of them has."""
    folder = tmp_path_factory.mktemp("slides")
    for name, (write, *_) in WRITERS.items():
        write(folder / name, PICTURE, MPP)
    return folder


@pytest.fixture(scope="module")
def gappy(tmp_path_factory):
    return write_mrxs(tmp_path_factory.mktemp("gappy") / "a.mrxs", PICTURE, MPP, MISSING)


@pytest.fixture(scope="module")
def no_change():
    """The table of every change at strength 0; to make it takes longer than all the rest."""
    return ColourTable(None)


def whole(file):
    with openslide.OpenSlide(file) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def assert_alike(found, expected, most=12):
    """Compare pictures that JPEG, of quality 95 or 90, has been at."""
    difference = np.abs(np.asarray(found).astype(int) - expected)
    assert difference.mean() < 1.5
    assert difference.max() <= most


@pytest.mark.parametrize("name", WRITERS)
def test_a_slide_of_each_vendor_is_read_as_it_was_written(folder, name):
    _, source, num_levels = WRITERS[name]
    with Slide(folder / name) as slide:
        assert (slide.scale.source, slide.scale.notes) == (source, ())
        assert slide.scale.mpp == pytest.approx(MPP)
        assert (slide.width_level0, slide.height_level0) == (WIDTH, HEIGHT)
        assert slide.downsamples[-1] >= 4
        assert len(slide.downsamples) == num_levels
        assert slide.identity
        for tile in (TileSpec(size_px=EXTENT, mpp=MPP), TileSpec(size_px=SIZE)):
            reading = slide.plan(tile)
            assert reading.extent_level0 == EXTENT
            for x, y in ((0, 0), (448, 224), (900, 700), (WIDTH - EXTENT, HEIGHT - EXTENT)):
                written = Image.fromarray(PICTURE[y : y + EXTENT, x : x + EXTENT])
                expected = written.resize((tile.size_px,) * 2, Image.Resampling.LANCZOS)
                assert_alike(slide.read_tile(x, y, reading), np.asarray(expected))


@pytest.mark.slow
def test_a_folder_of_all_vendors_becomes_tiles(folder, small, laboratories, tmp_path):
    work = Work(progress=False)
    reference = MacenkoReference.fit(synthetic_tiles(3, seed=7))
    runs = [
        offline.augment(folder, tmp_path / "a", small, references=laboratories, work=work),
        offline.normalize(
            folder, tmp_path / "n", small, reference=reference, method="macenko", work=work
        ),
    ]
    corners = {(x, y) for x in range(0, 5 * EXTENT, EXTENT) for y in range(0, 4 * EXTENT, EXTENT)}
    for out, run in zip(("a", "n"), runs, strict=True):
        assert run.counts == {"edited": 4 * len(corners)}
        assert not run.failed
        rows = pq.read_table(tmp_path / out / "manifest.parquet").to_pylist()
        for name in WRITERS:
            found = {(r["x"], r["y"]): r["output"] for r in rows if r["source"] == name}
            assert set(found) == corners
            assert {r["slide"] for r in rows if r["source"] == name} == {name.partition(".")[0]}
            assert all((tmp_path / out / file).is_file() for file in found.values())


@pytest.mark.slow
def test_whole_slides_of_all_vendors_keep_their_pixels_at_strength_0(
    folder, no_change, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(whole_slides, "ColourTable", lambda _: no_change)
    reference = tmp_path / "lab.json"
    MacenkoReference.fit(synthetic_tiles(3, seed=7)).save(reference)
    words = [str(folder), str(tmp_path / "out"), "--reference", str(reference), "--quiet"]
    words += ["--method", "macenko", "--strength", "0"]
    assert main(["normalize-slide", *words]) == 0, capsys.readouterr().err
    for name in WRITERS:
        out = tmp_path / "out" / f"{name.partition('.')[0]}.ome.tif"
        assert_alike(whole(out), PICTURE, most=25)  # colour has half its resolution there
        with Slide(out) as made:
            assert made.scale.mpp == pytest.approx(MPP)
            assert (made.width_level0, made.height_level0) == (WIDTH, HEIGHT)


def test_what_a_mirax_slide_lacks_is_white_and_no_tissue(gappy):
    with openslide.OpenSlide(gappy) as opened:
        assert opened.properties["openslide.bounds-x"] == str(RIM)
        assert not np.asarray(opened.read_region(GAP, 0, (180, 180))).any()  # black, transparent
    with Slide(gappy) as slide:
        assert slide.width_level0 == WIDTH  # positions are those of all of it
        for mpp in (MPP, 2 * MPP, 4 * MPP):
            side = round(160 * MPP / mpp)
            lacking = np.asarray(slide.read_tile(*GAP, slide.plan(TileSpec(size_px=side, mpp=mpp))))
            assert (lacking == 255).all()
        assert (np.asarray(slide.read_region(0, 0, 0, (RIM, HEIGHT))) == 255).all()
        assert_alike(slide.read_region(PHOTO_STEP, 0, 0, (400, 200)), PICTURE[:200, 224:624])
        is_tissue = tissue_pixels(slide.thumbnail(4.0).image, TissueConfig(smooth_px=3))
    x, y = (n // 16 for n in GAP)
    assert not is_tissue[y + 1 : y + 10, x + 1 : x + 10].any()
    assert not is_tissue[:, :13].any()
    assert is_tissue[:, 15:].mean() > 0.8


def test_tiles_of_a_mirax_slide_lie_where_its_tissue_is(gappy, small, tmp_path):
    reference = MacenkoReference.fit(read_tiles(gappy, small.tile))
    work = Work(progress=False)
    folder, out = gappy.parent, tmp_path / "out"
    run = offline.normalize(folder, out, small, reference=reference, method="macenko", work=work)
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    made = {(r["x"], r["y"]) for r in rows if r["status"] == "edited"}
    of_all = {(x * EXTENT, y * EXTENT) for x in range(5) for y in range(4)}
    assert made == {(x, y) for x, y in of_all if x > 0} - {(2 * EXTENT, EXTENT)}
    assert not run.failed


def test_a_whole_mirax_slide_has_white_where_nothing_was_scanned(
    gappy, no_change, tmp_path, monkeypatch
):
    monkeypatch.setattr(whole_slides, "ColourTable", lambda _: no_change)
    reference = MacenkoReference.fit(read_tiles(gappy, TileSpec()))
    report = normalize_slide(gappy, tmp_path / "a.tif", reference, recipe=LOSSLESS)
    made = whole(report.out)
    assert made.shape == PICTURE.shape
    assert (made[:, :RIM] == 255).all()
    x, y = GAP
    assert (made[y : y + 160, x : x + 160] == 255).all()
    with Slide(gappy) as slide:
        assert np.array_equal(made, slide.read_region(0, 0, 0, (WIDTH, HEIGHT)))


def test_a_mirax_slide_without_its_folder_is_named_with_what_lacks(
    folder, small, laboratories, tmp_path
):
    copies = tmp_path / "in"
    copies.mkdir()
    shutil.copy(folder / "aperio.svs", copies)
    shutil.copy(folder / "mirax.mrxs", copies)
    said = r"the folder mirax with Slidedat\.ini is not beside it, .* copy both"
    with pytest.raises(SlideError, match=said):
        Slide(copies / "mirax.mrxs")
    out, work = tmp_path / "out", Work(progress=False)
    run = offline.augment(copies, out, small, references=laboratories, work=work)
    ((name, reason),) = run.failed
    assert name == "mirax.mrxs"
    assert re.search(said, reason)
    assert run.counts == {"edited": 20, "failed": 1}
    (copies / "mirax").mkdir()  # there, but the copy of its files was broken off
    for file in ("Slidedat.ini", "Index.dat"):
        shutil.copy(folder / "mirax" / file, copies / "mirax")
    with pytest.raises(SlideError, match=r"Data0000\.dat.*No such file"):
        Slide(copies / "mirax.mrxs")
