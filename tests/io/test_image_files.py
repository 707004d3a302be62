"""Image files that must not be read as tiles, and what is done with those that may."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from cytosyn_aug.io.image_files import (
    ItemError,
    check_strictness,
    encode_png,
    encode_webp,
    read_image,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def stored(image, format="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def png(width, height, depth, kind, content=b""):
    """Write a PNG by hand: Pillow writes no RGB of 16 bits, and no bombs."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


RGB = Image.fromarray(PIXELS)
DEEP = png(2, 2, 16, 2, b"".join(b"\0" + bytes(range(12)) for _ in range(2)))
FRAMES = [Image.fromarray(255 - PIXELS)]


def tiff16():
    import tifffile

    stream = io.BytesIO()
    tifffile.imwrite(stream, PIXELS.astype(np.uint16) * 257, photometric="rgb")
    return stream.getvalue()


def transparent():
    image = RGB.convert("RGBA")
    image.putpixel((3, 3), (1, 2, 3, 0))
    return image


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or no image"),
        (b"GIF89a" + bytes(100), "damaged or no image"),
        (stored(RGB)[:-700], "damaged or no image"),
        (stored(RGB, "JPEG")[:-500], "damaged or no image"),
        (stored(RGB, "WEBP", lossless=True)[:-500], "damaged or no image"),
        (stored(RGB, "TIFF")[: 48 * 64], "damaged or no image"),
        (stored(RGB.convert("CMYK"), "JPEG"), "mode CMYK, expected RGB"),
        (stored(RGB.convert("L")), "mode L, expected RGB"),
        (stored(RGB.convert("LA")), "mode LA, expected RGB"),
        (stored(RGB.convert("1")), "mode 1, expected RGB"),
        (stored(transparent()), "transparent pixels"),
        (stored(RGB, transparency=(1, 2, 3)), "transparent colour"),
        (DEEP, "more than 8 bits"),
        (tiff16(), "more than 8 bits"),
        (stored(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)), "more than 8 bits"),
        (stored(Image.fromarray(PIXELS[..., 0] / np.float32(255)), "TIFF"), "more than 8 bits"),
        (stored(RGB, "WEBP", save_all=True, append_images=FRAMES), "holds 2 pictures"),
        (stored(RGB, "PNG", save_all=True, append_images=FRAMES), "holds 2 pictures"),
        (stored(RGB, "TIFF", save_all=True, append_images=FRAMES), "holds 2 pictures"),
        (png(50_000, 50_000, 8, 2), "damaged or no image"),  # Pillow's own limit
        (png(5_000, 4_000, 8, 2), "is 5000x4000 px, more than"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(content, reason):
    with pytest.raises(ItemError, match=reason):
        read_image(content)


def test_what_is_exact_is_accepted():
    opaque = RGB.convert("RGBA")
    palette = RGB.quantize(32)
    for image, expected in ((RGB, PIXELS), (opaque, PIXELS), (palette, palette.convert("RGB"))):
        found, notes = read_image(stored(image))
        assert np.array_equal(found, np.asarray(expected))
        assert notes == ()
    for content in (
        encode_png(PIXELS),
        encode_webp(PIXELS),
        stored(RGB, "TIFF"),
        stored(RGB, "BMP"),
    ):
        assert np.array_equal(read_image(content).pixels, PIXELS)


def test_exif_turns_are_applied_and_profiles_are_not():
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found, notes = read_image(stored(RGB, exif=exif, icc_profile=profile))
    assert np.array_equal(found, np.rot90(PIXELS, -1))
    assert notes == ("colour profile not applied", "turned by EXIF orientation 6")


def test_a_file_that_is_not_there_or_may_not_be_read_is_named(tmp_path):
    with pytest.raises(ItemError, match="cannot be opened: No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ItemError, match="Is a directory"):
        read_image(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(ItemError, match="cannot be opened"):
        read_image(tmp_path / "loop.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about tags
def test_any_single_damaged_byte_gives_an_item_error_or_an_image():
    """No other exception may leave: it would end the run."""
    for whole in (stored(RGB), stored(RGB, "JPEG"), stored(RGB, "TIFF"), stored(RGB, "WEBP")):
        for position in range(0, min(len(whole), 400), 3):
            content = bytearray(whole)
            content[position] ^= 0xFF
            with suppress(ItemError):
                read_image(bytes(content))


def test_pillow_may_not_be_told_to_fill_truncated_images(monkeypatch):
    check_strictness()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is set"):
        check_strictness()
