import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

from cytosyn_aug import (
    DensityReference,
    DensityTransport,
    MacenkoNormalize,
    MacenkoReference,
    ReinhardNormalize,
    ReinhardReference,
    StainNormalize,
    StainReference,
)
from cytosyn_aug.cli.main import main
from cytosyn_aug.images import optical_density
from cytosyn_aug.io.files import atomic_file
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.slides import normalize as whole_slides
from cytosyn_aug.slides.normalize import normalize_slide, provenance_of
from cytosyn_aug.slides.pyramid import OME_NAMESPACE, TILE_PX, Codec, PyramidWriter, halve
from cytosyn_aug.slides.recipe import SlideRecipe
from cytosyn_aug.slides.seams import SeamMeter, tile_lines
from cytosyn_aug.stain.density import tissue_weight
from cytosyn_aug.stain.methods import fit_reference, method_of
from tests.support.synthetic import damage_tile, synthetic_tiles, write_slide

pytest.importorskip("tifffile", reason="normalising slides is not tested")

pytestmark = pytest.mark.usefixtures("remembered_tables")
LOSSLESS = SlideRecipe(compression="deflate")
ROWS, COLUMNS = 10, 12
HEIGHT, WIDTH = ROWS * 112, COLUMNS * 112
SOURCE, TARGET = synthetic_tiles(24), synthetic_tiles(12, seed=1)
# The target's laboratory stains weaker and redder.
TARGET = ((TARGET / 255) ** torch.tensor([0.6, 0.7, 1.0])[:, None, None] * 255).to(torch.uint8)


def tissue_picture():
    """Rows of tiles with bands of glass, and two columns of nothing but glass."""
    rows = [
        torch.cat([SOURCE[(5 * row + k) % 24] for k in range(COLUMNS)], 2) for row in range(ROWS)
    ]
    picture = torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()
    picture[:, -224:] = 243
    return picture


PICTURE = tissue_picture()


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    file = tmp_path_factory.mktemp("slide") / "patient-7.svs"
    return write_slide(file, PICTURE, mpp="0.5", power="20")


@pytest.fixture(scope="module")
def reference():
    return DensityReference.fit(TARGET)


@pytest.fixture(scope="module")
def source():
    return DensityReference.fit(SOURCE)


@pytest.fixture(scope="module")
def made(slide, reference, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "made.ome.tif"
    return normalize_slide(slide, out, reference, source=source, recipe=LOSSLESS)


def read(file, level=0):
    with openslide.OpenSlide(file) as opened:
        size = opened.level_dimensions[level]
        return np.asarray(opened.read_region((0, 0), level, size).convert("RGB"))


@pytest.mark.slow
def test_the_result_is_a_slide_of_the_same_size_and_scale(made):
    with openslide.OpenSlide(made.out) as opened:
        assert opened.dimensions == (WIDTH, HEIGHT) == (made.width_px, made.height_px)
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert opened.level_count == made.num_levels == 3
    assert np.array_equal(read(made.out, 1), halve(read(made.out)))
    assert (made.status, made.num_tiles, made.mpp) == ("normalized", 9, 0.5)
    assert made.num_bytes == made.out.stat().st_size


def test_glass_keeps_its_bits_and_tissue_changes(made):
    result = read(made.out)
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None]
    weight = tissue_weight(optical_density(pixels))[0, 0].numpy()
    assert 0.1 < (weight == 0).mean() < 0.5
    assert np.array_equal(result[weight == 0], PICTURE[weight == 0])
    changed = np.abs(result.astype(int) - PICTURE)[weight == 1].mean()
    assert changed > 5
    assert made.tissue == pytest.approx(weight.mean(), abs=0.005)


@pytest.mark.slow
def test_every_colour_becomes_one_colour_wherever_it_is(made):
    before, after = (x.astype(np.int64) @ [1 << 16, 1 << 8, 1] for x in (PICTURE, read(made.out)))
    number = len(np.unique(before))
    assert number > 1000
    assert len(np.unique(before << 24 | after)) == number


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cytosyn", "macenko", "reinhard", "transport"])
def test_tissue_is_changed_as_the_transform_changes_it(slide, generator, method, tmp_path):
    target, own = (
        fit_reference(method, tiles, generator if method == "cytosyn" else None)
        for tiles in (TARGET, SOURCE)
    )
    assert method_of(target) == method
    transform = {
        "cytosyn": lambda: StainNormalize(generator, target, source=own),
        "macenko": lambda: MacenkoNormalize(target, source=own),
        "reinhard": lambda: ReinhardNormalize(target, source=own),
        "transport": lambda: DensityTransport(target, source=own),
    }[method]()
    report = normalize_slide(
        slide, tmp_path / "a.tif", target, generator=generator, source=own, recipe=LOSSLESS
    )
    assert report.method == method
    expected = transform(SOURCE[:1])[0].permute(1, 2, 0).numpy()
    result = read(report.out)[:112, :112]
    assert np.abs(result.astype(int) - expected).max() <= 1  # sums of another order
    assert (result == expected).mean() > 0.999


def test_the_slide_s_own_stain_is_measured_on_its_tissue(slide, tmp_path):
    target = DensityReference.fit(TARGET)
    report = normalize_slide(slide, tmp_path / "a.tif", target, recipe=LOSSLESS)
    tissue = torch.from_numpy(read(report.out)[:, :-224].copy())
    found = DensityReference.fit(tissue.permute(2, 0, 1)[None])
    assert found.mean == pytest.approx(target.mean, abs=0.02)


def seam_ratio(picture, side):
    meter = SeamMeter()
    pixels = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None]
    weight = (tissue_weight(optical_density(pixels))[0, 0] * 255).to(torch.uint8).numpy()
    for row, column in np.ndindex(HEIGHT // side, WIDTH // side):
        y, x = row * side, column * side
        here = np.s_[y : y + side, x : x + side]
        meter.add(row, column, tile_lines(picture[here], weight[here]))
    return meter.ratio


def test_seams_are_those_of_the_slide(made):
    raw, ours = seam_ratio(PICTURE, 128), seam_ratio(read(made.out), 128)
    assert raw == pytest.approx(1, abs=0.3)
    assert ours == pytest.approx(raw, abs=0.1)
    assert ours <= 1.6
    assert made.seam_ratio is None  # two by two whole blocks are too few to tell


def test_the_seam_ratio_finds_tiles_that_were_changed_alone():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(60, 200, (16, 16, 3), np.uint8)).resize((448, 448))
    plain, shifted = SeamMeter(), SeamMeter()
    for row, column in np.ndindex(4, 4):
        y, x = row * 112, column * 112
        tile = np.asarray(smooth)[y : y + 112, x : x + 112]
        full = np.full(tile.shape[:2], 255, np.uint8)
        plain.add(row, column, tile_lines(tile, full))
        shift = 20 * ((row + column) % 2)
        shifted.add(row, column, tile_lines(tile + np.uint8(shift), full))
    assert plain.ratio == pytest.approx(1, abs=0.3)
    assert shifted.ratio > 2
    assert SeamMeter().ratio is None


def test_a_region_is_that_part_of_the_whole(slide, reference, source, made, tmp_path):
    recipe = SlideRecipe(compression="deflate", region=(100, 30, 600, 520))
    report = normalize_slide(slide, tmp_path / "a.tif", reference, source=source, recipe=recipe)
    assert np.array_equal(read(report.out), read(made.out)[30:550, 100:700])
    measured = [
        normalize_slide(slide, tmp_path / f"{k}.tif", reference, recipe=r).change_digest
        for k, r in enumerate([recipe, SlideRecipe(compression="deflate")])
    ]
    assert measured[0] == measured[1]


def test_a_coarser_scale_is_reduced_without_borders(slide, reference, source, tmp_path):
    reports = []
    for k, region in enumerate([None, (160, 160, 800, 640)]):
        recipe = SlideRecipe(compression="deflate", mpp=0.8, region=region, strength=0.0)
        reports.append(
            normalize_slide(slide, tmp_path / f"{k}.tif", reference, source=source, recipe=recipe)
        )
    whole, part = (read(report.out) for report in reports)
    assert reports[0].mpp == pytest.approx(0.8)
    assert whole.shape == (HEIGHT * 5 // 8, WIDTH * 5 // 8, 3)
    expected = Image.fromarray(PICTURE).resize(whole.shape[1::-1], Image.Resampling.LANCZOS)
    assert np.abs(whole.astype(int) - np.asarray(expected)).max() <= 1
    inner = whole[100 + 4 : 500 - 4, 100 + 4 : 600 - 4].astype(int)
    assert np.abs(part[4:-4, 4:-4] - inner).max() <= 1


def test_the_file_does_not_depend_on_threads(slide, reference, source, made, tmp_path):
    out = tmp_path / "made.ome.tif"
    again = normalize_slide(slide, out, reference, source=source, recipe=LOSSLESS, num_threads=1)
    assert out.read_bytes() == made.out.read_bytes()
    assert again.pixels_digest == made.pixels_digest


def test_nothing_of_the_slide_s_metadata_is_left(slide, reference, source, tmp_path):
    reports = [
        normalize_slide(
            slide,
            tmp_path / f"{keeps}.tif",
            reference,
            source=source,
            recipe=SlideRecipe(keeps_thumbnail=keeps),
        )
        for keeps in (False, True)
    ]
    for report in reports:
        content = report.out.read_bytes()
        assert b"Aperio" not in content
        assert b"patient-7" not in content
    import tifffile

    pages = []
    for report in reports:
        with tifffile.TiffFile(report.out) as tiff:
            pages.append(len(tiff.pages))
    assert pages == [3, 4]


def test_a_slide_without_tissue_keeps_its_colours(reference, synthetic_slide, tmp_path):
    glass = synthetic_slide(grid="..\n..", side=256, mpp="0.5", power="20")
    report = normalize_slide(glass, tmp_path / "a.tif", reference, recipe=LOSSLESS)
    assert report.status == "no_tissue"
    assert "no tissue was found" in report.notes[-1]
    assert np.array_equal(read(report.out), read(glass))


def test_a_damaged_block_costs_the_slide_or_if_allowed_itself(slide, reference, source, tmp_path):
    damaged = shutil.copy(slide, tmp_path / "damaged.svs")
    damage_tile(tmp_path / "damaged.svs", 3)  # of 6 in a row, 256 px each
    out = tmp_path / "out" / "a.tif"
    with pytest.raises(SlideError, match=r"damaged\.svs at x=512 y=0 level 0 cannot be decoded"):
        normalize_slide(damaged, out, reference, source=source)
    assert not list(out.parent.iterdir())
    recipe = SlideRecipe(compression="deflate", allows_damage=True)
    report = normalize_slide(damaged, out, reference, source=source, recipe=recipe)
    assert report.damaged == ((512, 0),)
    result = read(out)
    assert not result[:TILE_PX, 512:1024].any()
    assert result[TILE_PX:].any(-1).all()


def test_an_error_on_the_way_leaves_nothing(slide, reference, source, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt(f"{done} of {total}")

    with pytest.raises(KeyboardInterrupt, match="1 of 9"):
        normalize_slide(slide, tmp_path / "a.tif", reference, source=source, progress=stop)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed(slide, reference, source, tmp_path):
    (tmp_path / ".a.tif.4711.tmp").write_bytes(b"half")
    (tmp_path / ".b.tif.4711.tmp").write_bytes(b"of another")
    normalize_slide(slide, tmp_path / "a.tif", reference, source=source)
    assert {f.name for f in tmp_path.iterdir()} == {"a.tif", ".b.tif.4711.tmp"}


def test_a_disk_that_is_too_small_is_found_before_the_work(
    slide, reference, source, tmp_path, monkeypatch
):
    usage = namedtuple("Usage", "free")(1000)
    monkeypatch.setattr(whole_slides.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"about [\d,]+ bytes are needed and 1,000 are free.*a\.tif"):
        normalize_slide(slide, tmp_path / "a.tif", reference, source=source)
    assert not list(tmp_path.iterdir())


def test_a_slide_without_scale_needs_one(reference, source, tmp_path):
    bare = write_slide(tmp_path / "bare.tif", PICTURE[:300, :300], mpp=None, power=None)
    with pytest.raises(SlideError, match=r"bare\.tif states neither"):
        normalize_slide(bare, tmp_path / "a.tif", reference, source=source)
    recipe = SlideRecipe(slide_mpp=0.5)
    report = normalize_slide(bare, tmp_path / "a.tif", reference, source=source, recipe=recipe)
    assert report.mpp == 0.5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"region": (0, 0, WIDTH + 1, 10)}, "1344x1120 px, and the region x=0 y=0 of 1345x10"),
        ({"region": (-1, 0, 10, 10)}, "not inside"),
        ({"region": (0, 0, 0, 10)}, "not inside"),
        ({"mpp": 0.25}, r"0\.5 microns/pixel, coarser than the wanted 0\.25"),
    ],
)
def test_what_a_slide_cannot_give_is_refused(slide, reference, tmp_path, changed, said):
    with pytest.raises(SlideError, match=said):
        normalize_slide(slide, tmp_path / "a.tif", reference, recipe=SlideRecipe(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"quality": 10}, "quality is 10"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"mpp": 0.0}, "mpp is 0, expected 0.05 to 10 microns/pixel"),
        ({"mpp": 40.0}, "mpp is 40"),
        ({"mpp": float("nan")}, "mpp is nan"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        SlideRecipe(**changed)


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "Aperio Image Library |MPP = 0.5",
        "<OME><Image>",
        '<OME xmlns="elsewhere"><Image><Description>{"a": 1}</Description></Image></OME>',
        f'<OME xmlns="{OME_NAMESPACE}"><Image><Description>a note</Description></Image></OME>',
        f'<OME xmlns="{OME_NAMESPACE}"><Image/></OME>',
    ],
)
def test_files_of_other_software_state_no_provenance(comment):
    assert provenance_of(SimpleNamespace(comment=comment)) == {}


def test_what_a_file_states_is_read_back_whatever_it_holds(tmp_path):
    provenance = {"name": "<Description>]]>&amp;\u00e9\u4e2d{}</Description>"}
    tile, codec = np.full((30, 20, 3), 200, np.uint8), Codec()
    with (tmp_path / "a.tif").open("wb") as stream:
        writer = PyramidWriter(stream, 20, 30, mpp=0.5, codec=codec)
        writer.add(codec.encode_tile(tile), halve(tile))
        writer.finish(json.dumps(provenance, ensure_ascii=False))
    with Slide(tmp_path / "a.tif", mpp=0.5) as written:
        assert provenance_of(written) == provenance


def test_a_file_states_its_recipe_as_those_of_earlier_versions(made):
    with Slide(made.out, mpp=0.5) as written:
        recipe = provenance_of(written)["recipe"]
    assert list(recipe)[:3] == ["strength", "preserve", "region"]
    assert recipe["preserve"] == "color"


def test_existing_files_are_safe(slide, reference, source, made, tmp_path):
    file = shutil.copy(made.out, tmp_path / "a.tif")
    with pytest.raises(FileExistsError, match="allow overwriting"):
        normalize_slide(slide, file, reference, source=source)
    with pytest.raises(ValueError, match="is the slide itself"):
        normalize_slide(file, file, reference, source=source, overwrite=True)
    with pytest.raises(ValueError, match=r"expected \.tif"):
        normalize_slide(slide, tmp_path / "a.svs", reference, source=source)
    report = normalize_slide(slide, file, reference, source=source, overwrite=True)
    assert report.num_bytes == (tmp_path / "a.tif").stat().st_size


@pytest.mark.slow
def test_a_slide_that_is_not_there_is_a_usage_error(slide, tmp_path, capsys):
    words = ["--reference", str(slide), "--method", "macenko", "--quiet"]
    assert main(["normalize-slide", "gone.svs", str(tmp_path / "c.tif"), *words]) == 2
    assert "gone.svs cannot be opened" in capsys.readouterr().err
    assert main(["normalize-slide", str(slide), str(tmp_path / "a.tif"), *words]) == 0
    capsys.readouterr()
    reinhard = [*words[:2], "--method", "reinhard", "--quiet"]
    assert main(["normalize-slide", str(slide), str(tmp_path / "a.tif"), *reinhard]) == 2
    assert "allow overwriting it (--overwrite)" in capsys.readouterr().err  # and is something else


def test_the_command_finds_nested_slides_and_no_hidden_files(slide, tmp_path, capsys):
    (tmp_path / "in" / "batch").mkdir(parents=True)
    shutil.copy(slide, tmp_path / "in" / "batch" / "a.svs")
    (tmp_path / "in" / "._a.svs").write_text("what macOS leaves beside a file")
    words = ["--reference", str(slide), "--method", "macenko", "--quiet"]
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    assert main(["normalize-slide", source, out, *words]) == 0
    assert (tmp_path / "out" / "batch" / "a.ome.tif").is_file()
    assert main(["normalize-slide", source, str(tmp_path / "in" / "out"), *words]) == 2
    assert "lie in each other" in capsys.readouterr().err


def test_two_processes_do_not_write_one_slide(slide, tmp_path, reference, source):
    out = tmp_path / "a.tif"
    with atomic_file(out) as stream:  # as the other process holds it
        with pytest.raises(FileExistsError, match="is being written by another process"):
            normalize_slide(slide, out, reference, source=source)
        stream.write(b"the other's")
    assert out.read_bytes() == b"the other's"


def test_the_command_takes_the_scale_of_a_slide_that_states_a_wrong_one(slide, tmp_path, capsys):
    words = ["--reference", str(slide), "--method", "macenko", "--quiet", "--slide-mpp", "0.25"]
    assert main(["normalize-slide", str(slide), str(tmp_path / "a.tif"), *words]) == 0
    assert "at 0.25 microns/pixel" in capsys.readouterr().out


def test_references_must_fit_each_other_and_the_model(slide, reference, generator, tmp_path):
    out = tmp_path / "a.tif"
    with pytest.raises(ValueError, match="source is MacenkoReference and reference Density"):
        normalize_slide(slide, out, reference, source=MacenkoReference.fit(SOURCE))
    stain = StainReference.fit(generator, TARGET)
    with pytest.raises(ValueError, match="pass generator="):
        normalize_slide(slide, out, stain, source=stain)
    with pytest.raises(TypeError, match="reference is str"):
        normalize_slide(slide, out, "lab.json")
    with pytest.raises(SlideError, match=r"gone\.svs cannot be opened"):
        normalize_slide(tmp_path / "gone.svs", out, ReinhardReference.fit(TARGET))
