import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import openslide
import pytest

from cytosyn_aug.slides.pyramid import TILE_PX, Codec, PyramidWriter, halve, level_sizes

tifffile = pytest.importorskip("tifffile", reason="written pyramids are not tested")

LOSSLESS = Codec(compression="deflate")


def smooth_picture(width, height):
    y, x = np.mgrid[:height, :width]
    return np.stack([x // 4 % 256, y // 4 % 256, (x + y) // 8 % 256], -1).astype(np.uint8)


def write_pyramid(file, picture, codec=LOSSLESS, description="", thumbnail=None):
    height, width = picture.shape[:2]
    with file.open("wb") as stream:
        writer = PyramidWriter(stream, width, height, mpp=0.2528, codec=codec)
        for y in range(0, height, TILE_PX):
            for x in range(0, width, TILE_PX):
                tile = picture[y : y + TILE_PX, x : x + TILE_PX]
                writer.add(codec.encode_tile(tile), halve(tile))
        assert writer.finish(description, thumbnail) == file.stat().st_size
    return file


def averages(picture):
    """The definition, written out: every pixel is the rounded mean of four."""
    height, width = (n // 2 for n in picture.shape[:2])
    four = picture[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).astype(float)
    return np.floor(four.mean((1, 3)) + 0.5).astype(np.uint8)


@pytest.mark.parametrize(
    "size", [(1, 1), (512, 512), (513, 512), (700, 1025), (1030, 1), (1537, 600)]
)
def test_openslide_reads_a_pyramid_of_averages(tmp_path, size):
    picture = smooth_picture(*size)
    file = write_pyramid(tmp_path / "a.tif", picture)
    with openslide.OpenSlide(file) as slide:
        assert slide.level_dimensions == tuple(level_sizes(*size))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2528, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2528, rel=1e-6)
        for level, shape in enumerate(slide.level_dimensions):
            read = np.asarray(slide.read_region((0, 0), level, shape).convert("RGB"))
            assert np.array_equal(read, picture)
            picture = averages(picture)


def test_the_levels_are_in_ome_xml_s_place_and_in_the_chain(tmp_path):
    picture = smooth_picture(1537, 600)
    file = write_pyramid(tmp_path / "a.ome.tif", picture, description="a < b & c: \u00b5")
    with tifffile.TiffFile(file) as tiff:
        assert tiff.is_ome
        (series,) = tiff.series
        assert [level.shape[:2] for level in series.levels] == [(600, 1537), (300, 768), (150, 384)]
        assert np.array_equal(series.levels[1].asarray(), averages(picture))
        assert tiff.pages[0].subifds == tuple(page.offset for page in tiff.pages[1:])
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
    assert pixels["Description"] == "a < b & c: \u00b5"
    assert pixels["Pixels"]["PhysicalSizeX"] == 0.2528


def test_jpeg_keeps_colour_and_says_how_it_is_sampled(tmp_path):
    picture = smooth_picture(700, 520)
    file = write_pyramid(tmp_path / "a.tif", picture, Codec(quality=95))
    with openslide.OpenSlide(file) as slide:
        read = np.asarray(slide.read_region((0, 0), 0, (700, 520)).convert("RGB"))
    error = read.astype(float) - picture
    assert np.abs(error.mean((0, 1))).max() < 0.5
    assert (error**2).mean() < 8  # 39 dB
    with tifffile.TiffFile(file) as tiff:
        assert tiff.pages[0].tags["YCbCrSubSampling"].value == (2, 1)


def test_a_thumbnail_is_no_level(tmp_path):
    file = write_pyramid(
        tmp_path / "a.tif", smooth_picture(700, 520), thumbnail=smooth_picture(70, 52)
    )
    with openslide.OpenSlide(file) as slide:
        assert slide.level_count == 2
        assert not slide.associated_images
    with tifffile.TiffFile(file) as tiff:
        assert len(tiff.series[0].levels) == 2
    with tifffile.TiffFile(file, is_ome=False) as tiff:
        assert np.array_equal(tiff.pages[2].asarray(), smooth_picture(70, 52))


def test_memory_does_not_grow_with_the_height():
    class Nowhere:
        """A stream that forgets."""

        position = 0

        def write(self, content):
            self.position += len(content)

        def tell(self):
            return self.position

        def seek(self, *_):
            pass

    def peak(rows):
        tile = np.zeros((TILE_PX, TILE_PX, 3), np.uint8)
        encoded, half = Codec().encode_tile(tile), halve(tile)
        tracemalloc.start()
        writer = PyramidWriter(Nowhere(), 1024, rows * TILE_PX, mpp=0.5, codec=Codec())
        for _ in range(2 * rows):
            writer.add(encoded, half)
        writer.finish("")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(64) - peak(16) < TILE_PX * TILE_PX * 3  # less than a tile for 96 more


def test_a_pyramid_lacks_no_tile_and_has_no_more(tmp_path):
    tile = smooth_picture(10, 10)
    with (tmp_path / "a.tif").open("wb") as stream:
        writer = PyramidWriter(stream, 10, 10, mpp=0.5, codec=LOSSLESS)
        with pytest.raises(ValueError, match="got 0 of 1 tiles"):
            writer.finish("")
        writer.add(LOSSLESS.encode_tile(tile), halve(tile))
        with pytest.raises(ValueError, match="more than the 1 tiles"):
            writer.add(LOSSLESS.encode_tile(tile), halve(tile))


def test_a_killed_run_leaves_nothing_under_the_name(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from cytosyn_aug.io.files import atomic_file\n"
        "from cytosyn_aug.slides.pyramid import Codec, PyramidWriter, halve\n"
        "tile, codec = np.zeros((512, 512, 3), np.uint8), Codec()\n"
        "with atomic_file(Path(sys.argv[1])) as stream:\n"
        "    writer = PyramidWriter(stream, 512, 5120, mpp=0.5, codec=codec)\n"
        "    for row in range(10):\n"
        "        writer.add(codec.encode_tile(tile), halve(tile))\n"
        "        if row == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    file = tmp_path / "a.tif"
    done = subprocess.run([sys.executable, "-c", code, str(file)])
    assert done.returncode == -signal.SIGKILL
    assert not file.exists()


@pytest.mark.parametrize("changed", [{"compression": "webp"}, {"quality": 20}])
def test_a_codec_that_readers_lack_is_refused(changed):
    with pytest.raises(ValueError, match="expected"):
        Codec(**changed)
