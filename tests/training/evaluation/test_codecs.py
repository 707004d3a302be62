"""Codecs are read from files and shards, given to generated tiles, and not mixed unnoticed."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.synthetic import synthetic_tiles
from training.evaluation.codecs import check_codecs, codec_of, count_codecs, is_lossy, recompress

PICTURE = Image.fromarray(synthetic_tiles(1, size=64)[0].permute(1, 2, 0).numpy())


def written(form, **options):
    buffer = io.BytesIO()
    PICTURE.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "options", "codec"),
    [
        ("png", {}, "png"),
        ("jpeg", {}, "jpeg"),
        ("webp", {"quality": 88}, "webp lossy"),
        ("webp", {"lossless": True}, "webp lossless"),
        ("tiff", {}, "tiff"),
        ("tiff", {"compression": "jpeg"}, "tiff (jpeg)"),
    ],
)
def test_the_codec_is_read_from_the_bytes_and_says_whether_pixels_survived(form, options, codec):
    content = written(form, **options)
    assert codec_of(io.BytesIO(content), "tile") == codec
    survived = np.array_equal(Image.open(io.BytesIO(content)).convert("RGB"), PICTURE)
    assert is_lossy(codec) != survived


def test_another_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"odd\.png is no PNG"):
        codec_of(io.BytesIO(written("bmp")), "odd.png")


def test_files_and_shards_are_counted(tmp_path):
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "a.webp").write_bytes(written("webp", quality=80))
    (tmp_path / "slide" / "b.png").write_bytes(written("png"))
    (tmp_path / "slide" / "notes.txt").write_text("not a tile")
    with tarfile.open(tmp_path / "other.tar", "w") as shard:
        for name in ("other/1_2.webp", "other/3_4.webp"):
            content = written("webp", lossless=True)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    assert count_codecs(tmp_path) == {"png": 1, "webp lossless": 2, "webp lossy": 1}


def test_of_a_shard_only_the_first_tiles_are_read(tmp_path):
    content = written("webp", lossless=True)
    with tarfile.open(tmp_path / "slide.tar", "w") as shard:
        for number in range(40):
            member = tarfile.TarInfo(f"slide/{number}_0.webp")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    assert count_codecs(tmp_path) == {"webp lossless": 16}


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tiles under"):
        count_codecs(tmp_path)


def test_lossy_and_lossless_tiles_are_not_compared_without_a_statement():
    check_codecs(["webp lossy", "jpeg"], "webp:88")
    check_codecs(["png", "webp lossless"], "memory")
    for real, generated in (
        (["webp lossy"], "memory"),
        (["png"], "jpeg:90"),
        (["png", "jpeg"], "memory"),
    ):
        with pytest.raises(ValueError, match="different codecs"):
            check_codecs(real, generated)
        check_codecs(real, generated, statement="a test")


@pytest.mark.parametrize(("codec", "form"), [("webp:70", "webp"), ("jpeg:90", "jpeg")])
def test_recompressed_tiles_are_what_a_file_would_give(codec, form):
    content = written(form, quality=int(codec[-2:]))
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    images = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    got = recompress(images, codec)
    assert got.shape == images.shape
    assert np.array_equal(got[1].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(recompress(images, "memory"), images)


@pytest.mark.parametrize("codec", ["webp", "webp:0", "jpeg:101", "png:9", "jpeg:best"])
def test_an_unknown_codec_is_refused(codec):
    with pytest.raises(ValueError, match="expected 'memory'"):
        recompress(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), codec)
