"""Reports on whole slides: what the file says of itself, and before beside after."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cytosyn_aug import DensityReference, offline
from cytosyn_aug.report.slide_data import gather_slide, source_of
from cytosyn_aug.report.tissue_colours import ColourDistribution
from cytosyn_aug.slides.normalize import normalize_slide
from cytosyn_aug.slides.recipe import SlideRecipe
from tests.report.test_rendering import check_page
from tests.support.synthetic import synthetic_tiles, write_slide

pytest.importorskip("tifffile", reason="reports on slides are not tested")

pytestmark = pytest.mark.usefixtures("remembered_tables")
LOSSLESS = SlideRecipe(compression="deflate")
SIDE = 224
# The target's laboratory stains weaker and redder.
TARGET = synthetic_tiles(6, seed=1, size=SIDE) / 255
TARGET = (TARGET ** torch.tensor([0.6, 0.7, 1.0])[:, None, None] * 255).to(torch.uint8)


def picture(seed=0, rows=6, columns=8):
    """Return tissue with glass around it, as a picture."""
    tiles = synthetic_tiles(rows * columns, seed=seed, size=SIDE).permute(0, 2, 3, 1).numpy()
    whole = np.full(((rows + 2) * SIDE, (columns + 2) * SIDE, 3), 243, np.uint8)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, columns)
        y, x = (row + 1) * SIDE, (column + 1) * SIDE
        whole[y : y + SIDE, x : x + SIDE] = tile
    return whole


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    file = tmp_path_factory.mktemp("slides") / "patient-7.svs"
    return write_slide(file, picture(), mpp="0.5", power="20")


@pytest.fixture(scope="module")
def made(slide, tmp_path_factory):
    """The slide normalised: the file and what `normalize_slide` said of it."""
    out = tmp_path_factory.mktemp("out") / "patient-7.ome.tif"
    reference = DensityReference.fit(TARGET)
    return out, normalize_slide(slide, out, reference, recipe=LOSSLESS)


@pytest.mark.slow
def test_the_file_says_its_seams_and_the_report_repeats_them(made, slide):
    out, said = made
    page = offline.report(out, source=slide)
    assert page == out.with_name("patient-7.ome.tif.report.html")
    found = check_page(page.read_text())
    text = found.whole_text
    assert said.seam_ratio is not None
    assert f"{said.seam_ratio_before:.2f}{said.seam_ratio:.2f}" in text
    assert f"{said.tissue:.0%}" in text
    for value in (said.change_digest, said.pixels_digest, said.source_digest, "transport"):
        assert value in text
    # Two overviews, nine pairs, and three pairs of the worst.
    assert sum(tag == "img" for tag, _ in found.elements) == 2 + 2 * 9 + 2 * 3
    assert "Nothing stands out" in text


def test_tiles_are_the_same_places_before_and_after(made, slide):
    data = gather_slide(made[0], slide, 20)
    assert len(data.structures) == 20
    assert min(data.structures) > 0.9
    assert all(tile.distance > 2 for tile in data.tiles)
    wanted = ColourDistribution()
    for tile in TARGET:
        wanted.add(tile.permute(1, 2, 0).numpy())
    for axis in ("H", "E"):
        assert data.after.mean()[axis] == pytest.approx(wanted.mean()[axis], abs=0.05)


@pytest.mark.slow
def test_a_region_is_compared_with_its_part_of_the_slide(slide, tmp_path):
    recipe = replace(LOSSLESS, region=(2 * SIDE + 32, SIDE + 48, 4 * SIDE, 4 * SIDE))
    reference = DensityReference.fit(TARGET)
    normalize_slide(slide, tmp_path / "part.tif", reference, recipe=recipe)
    data = gather_slide(tmp_path / "part.tif", slide, 12)
    assert min(data.structures) > 0.9  # two pixels apart it would be below 0.6
    before, after = data.overviews
    assert before.shape == after.shape
    assert np.corrcoef(before.mean(2).ravel(), after.mean(2).ravel())[0, 1] > 0.9


def test_a_coarse_result_has_the_scale_it_was_written_at(slide, tmp_path):
    out = tmp_path / "coarse.tif"
    reference = DensityReference.fit(TARGET)
    said = normalize_slide(slide, out, reference, recipe=replace(LOSSLESS, mpp=4.0))
    data = gather_slide(out, slide, 4)
    assert data.mpp == pytest.approx(said.mpp, rel=1e-6)
    assert data.size == (said.width_px, said.height_px)
    assert data.problem == ""


def test_another_slide_is_not_taken_for_the_source(made, tmp_path):
    other = write_slide(tmp_path / "patient-7.svs", picture(seed=4), mpp="0.5", power="20")
    found = check_page(offline.report(made[0], out=tmp_path / "a.html", source=other).read_text())
    assert "patient-7.svs is not the slide this was made from" in found.whole_text
    alone = check_page(offline.report(made[0], out=tmp_path / "b.html").read_text())
    assert "give --source" in alone.whole_text
    assert re.search(r"give --source\.", alone.whole_text)
    # What the file says of itself needs no source.
    assert made[1].pixels_digest in alone.whole_text


def test_a_folder_of_slides_is_one_report(made, slide, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("patient-7.ome.tif", "<b>.ome.tif"):
        (folder / name).write_bytes(made[0].read_bytes())
    (folder / "note.txt").write_text("no slide")
    page = offline.report(folder, source=slide.parent)
    assert page == folder / "report.html"
    found = check_page(page.read_text())
    assert "<b>.ome.tif: not compared" in found.whole_text
    assert found.whole_text.count(made[1].pixels_digest) == 2
    assert source_of(folder / "patient-7.ome.tif", slide.parent) == slide
