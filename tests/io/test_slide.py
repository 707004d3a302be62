import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io import slide as slides
from cytosyn_aug.io.slide import Slide, SlideError, grid_positions, plan_reading, slide_scale
from tests.support.synthetic import damage_tile, slide_picture, write_slide

TILE = TileSpec(size_px=64)
APERIO = {
    "openslide.vendor": "aperio",
    "openslide.mpp-x": "0.25",
    "openslide.mpp-y": "0.25",
    "aperio.MPP": "0.26",
    "openslide.objective-power": "40",
}
GENERIC = {
    "openslide.vendor": "generic-tiff",
    "openslide.mpp-x": "0.25",
    "openslide.mpp-y": "0.25",
    "tiff.ResolutionUnit": "centimeter",
    "tiff.XResolution": "40000",
    "tiff.YResolution": "40000",
}


def without(properties, *keys):
    return {k: v for k, v in properties.items() if k not in keys}


@pytest.mark.parametrize(
    ("properties", "given_mpp", "expected"),
    [
        (APERIO, 0.5, (0.5, "user")),
        (APERIO, None, (0.25, "properties")),
        (without(APERIO, "openslide.mpp-x", "openslide.mpp-y"), None, (0.26, "aperio")),
        (GENERIC, None, (0.25, "tiff")),
        ({"openslide.objective-power": "20"}, None, (0.5, "power")),
    ],
)
def test_the_first_source_of_a_scale_that_speaks_wins(properties, given_mpp, expected):
    assert slide_scale(properties, given_mpp)[:2] == expected


@pytest.mark.parametrize("value", ["0", "nan", "1000", "-1", "inf", "unknown"])
def test_a_nonsensical_scale_is_an_error_even_if_the_power_is_known(value):
    with pytest.raises(SlideError, match=r"mpp-x = .*expected 0\.05 to 10 microns/pixel; give"):
        slide_scale(APERIO | {"openslide.mpp-x": value})


@pytest.mark.parametrize("changed", [{"tiff.ResolutionUnit": "none"}, {"tiff.XResolution": "72"}])
def test_a_tiff_resolution_without_unit_or_as_software_writes_it_is_not_a_scale(changed):
    with pytest.raises(SlideError, match="states neither"):
        slide_scale(GENERIC | changed)


def test_contradictions_are_remarked_on():
    notes = slide_scale(APERIO | {"openslide.mpp-y": "0.4"}).notes
    assert [note.split(":")[0] for note in notes] == [
        "pixels are not square",
        "0.3162 microns/pixel contradicts objective power 40",
    ]
    assert "objective power 40" in slide_scale({"openslide.objective-power": "40"}).notes[0]


@pytest.mark.parametrize(
    ("mpp", "downsamples", "expected"),  # of level_px, level, extent_level0
    [
        (0.25, (1, 4, 16), (448, 0, 448)),
        (0.2528, (1, 2.0001, 4.0005), (443, 0, 443)),  # level 1 is coarser than 0.5
        (0.25, (1, 2.00014), (224, 1, 448)),  # 2.00014 counts as 2
        (0.125, (1, 2, 4.00012), (224, 2, 896)),
        (0.5, (1, 4), (224, 0, 224)),
        (0.5044, (1, 4), (222, 0, 222)),  # 1 % of enlargement
    ],
)
def test_tiles_are_read_from_the_coarsest_level_that_is_fine_enough(mpp, downsamples, expected):
    reading = plan_reading(mpp, downsamples, TileSpec())
    assert (reading.level_px, reading.level, reading.extent_level0) == expected
    assert reading.mpp == pytest.approx(0.5, rel=0.003)


def test_a_slide_coarser_than_the_target_is_refused():
    with pytest.raises(SlideError, match=r"1 microns/pixel, coarser than the target 0\.5"):
        plan_reading(1.0, (1,), TileSpec())


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(50, 700))
def test_the_grid_is_exact_without_gap_or_overlap(width, height, extent):
    positions = grid_positions(width, height, extent)
    assert len(positions) == (width // extent) * (height // extent)
    assert len({tuple(p) for p in positions.tolist()}) == len(positions)
    assert (positions % extent == 0).all()
    if len(positions):
        assert (positions.max(0) + extent <= (width, height)).all()


def test_a_tile_is_the_region_reduced_with_lanczos(synthetic_slide):
    file = synthetic_slide(grid="###\n###")
    picture = slide_picture("###\n###", 128)
    with Slide(file) as slide:
        reading = slide.plan(TILE)
        tile = slide.read_tile(128, 0, reading)
    region = Image.fromarray(picture[:128, 128:256])
    assert tile.tobytes() == region.resize((64, 64), Image.Resampling.LANCZOS).tobytes()


def test_the_deep_zoom_grid_gives_the_tiles_of_openslides_own_generator(synthetic_slide):
    file = synthetic_slide(grid="###\n###\n###", side=150, mpp="0.2527")
    zoom = DeepZoomGenerator(openslide.OpenSlide(file), tile_size=64, overlap=0)
    with Slide(file) as slide:
        reading = slide.plan(TILE, grid="deepzoom")
        assert reading.mpp == pytest.approx(0.5054)
        for column, row in ((0, 0), (2, 1)):
            ours = slide.read_tile(column * 128, row * 128, reading)
            theirs = zoom.get_tile(zoom.level_count - 2, (column, row))
            assert ours.tobytes() == theirs.tobytes()


def test_a_deep_zoom_grid_far_from_the_target_is_refused():
    with pytest.raises(SlideError, match=r"reaches 0\.6 microns/pixel on a deep-zoom grid"):
        plan_reading(0.3, (1, 4), TileSpec(), grid="deepzoom")


def test_outside_of_the_slide_is_background_not_black(synthetic_slide):
    with Slide(synthetic_slide()) as slide:
        tile = np.asarray(slide.read_tile(200, 200, slide.plan(TILE)))
    assert (tile[40:, 40:] == 255).all()


def test_a_damaged_tile_fails_by_name_and_its_neighbours_are_still_read(synthetic_slide):
    file = synthetic_slide(grid="####\n####\n####\n####")
    damage_tile(file, 0)
    with Slide(file) as slide:
        reading = slide.plan(TILE)
        for _ in range(2):
            with pytest.raises(SlideError, match=r"slide\.svs at x=0 y=0 level 0 cannot be decod"):
                slide.read_tile(0, 0, reading)
            assert np.asarray(slide.read_tile(256, 256, reading)).std() > 5


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_slide_is_refused_by_name_with_its_size(synthetic_slide, share):
    file = synthetic_slide()
    size = int(file.stat().st_size * share)
    with file.open("r+b") as stream:
        stream.truncate(size)
    with pytest.raises(SlideError, match=rf"slide\.svs \({size:,} bytes\).*truncated or damaged"):
        Slide(file)


def test_what_is_no_slide_is_refused(tmp_path):
    (tmp_path / "text.svs").write_text("hello")
    with pytest.raises(SlideError, match=r"text\.svs .*does not read"):
        Slide(tmp_path / "text.svs")
    with pytest.raises(SlideError, match=r"gone\.svs cannot be opened: No such file"):
        Slide(tmp_path / "gone.svs")


@pytest.mark.parametrize("mpp", ["0", "nan", "1000"])
def test_a_slide_with_a_nonsensical_scale_can_be_read_with_a_given_one(synthetic_slide, mpp):
    file = synthetic_slide(mpp=mpp)
    with pytest.raises(SlideError, match=r"slide\.svs has .*MPP|mpp-x"):
        Slide(file)
    with Slide(file, mpp=0.25) as slide:
        assert slide.scale == (0.25, "user", ())


@pytest.mark.parametrize(("given", "is_told"), [(0.5, False), (0.51, False), (0.25, True)])
def test_a_given_scale_that_contradicts_the_slide_is_remarked(synthetic_slide, given, is_told):
    file = synthetic_slide(mpp="0.5", power="20")
    with Slide(file, given) as slide:
        told = ("the given 0.25 microns/pixel is used; the slide states 0.5",)
        assert slide.scale.notes == (told if is_told else ())


def test_a_missing_scale_comes_from_the_power_or_is_refused(synthetic_slide, tmp_path):
    with Slide(synthetic_slide(mpp=None)) as slide:
        assert slide.scale[:2] == (0.25, "power")
    file = write_slide(tmp_path / "bare.tif", slide_picture("#", 256), mpp=None, power=None)
    with pytest.raises(SlideError, match=r"bare\.tif states neither"):
        Slide(file)


def test_a_generic_tiff_has_the_scale_of_its_resolution(tmp_path):
    picture = slide_picture("##\n##", 128)
    file = write_slide(tmp_path / "a.tif", picture, mpp=None, power=None, dpcm=40_000)
    with Slide(file) as slide:
        assert slide.scale[:2] == (0.25, "tiff")
        assert len(slide.downsamples) == 2


@pytest.mark.slow
def test_a_thumbnail_shows_the_slide_and_says_what_it_could_not_read(synthetic_slide):
    grid = "#...\n....\n...#\n...."
    file = synthetic_slide(grid=grid, side=512)
    with Slide(file) as slide:
        thumbnail = slide.thumbnail(2.0)  # blocks of 128 px are half of this slide
    assert thumbnail.image.shape == (256, 256, 3)
    assert thumbnail.pixel_level0 == 8
    assert np.abs(thumbnail.image[8:56, 8:56].mean((0, 1)) - (186, 112, 170)).max() < 3
    assert not thumbnail.is_unreadable.any()
    damage_tile(file, 0, level_page=2)  # the coarser level
    with Slide(file) as slide:
        is_unreadable = slide.thumbnail(2.0).is_unreadable
    assert is_unreadable[:128, :128].all()
    assert not is_unreadable[128:, 128:].any()


def test_a_region_too_large_for_memory_is_refused(synthetic_slide, monkeypatch):
    monkeypatch.setattr(slides, "MAX_REGION_PX", 100 * 100)
    with Slide(synthetic_slide()) as slide, pytest.raises(SlideError, match="128x128 px would be"):
        slide.read_tile(0, 0, slide.plan(TILE))


def test_an_old_openslide_is_refused(synthetic_slide, monkeypatch):
    monkeypatch.setattr(openslide, "__library_version__", "3.4.1")
    with pytest.raises(ImportError, match=r"OpenSlide is 3\.4\.1, expected 4\.0\.1"):
        Slide(synthetic_slide())
