"""Image files as tiles: read strictly, written without loss.

What a file must be to be read as it is meant: 8-bit RGB, one picture. Everything else is refused by
name rather than converted, because the conversion would be a guess about colour, and colour is
what this package is about:

* CMYK, grey-scale, 1-bit, 16-bit and float images, transparent pixels: refused. Palettes and
  alpha channels that are opaque throughout are exact, so those are accepted.
* Several pictures in one file (animations, TIFF pages), and more than `MAX_PIXELS`: refused.
* EXIF orientation: applied, so that the tile is what viewers show; noted.
* Colour profiles: not applied, since the models were trained without; noted, and not carried on.

No torch here.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "WEBP", "JPEG", "TIFF", "BMP")
TILE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_END = "_mask"  # of the stem: a/tile_mask.png lies beside a/tile.png
_MASK_ENDS = (MASK_END, ".mask")  # the second is what unpacked tar shards have
MAX_PIXELS = 4096 * 4096  # of a tile; decoded it takes 50 MB
_ORIENTATION = 0x0112
# What Pillow's readers raise on damaged files, beside OSError and ValueError.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ItemError(ValueError):
    """A tile that cannot be used as it is; it costs itself only, and the message says why."""


class DecodedImage(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        notes: What was done or left undone, as half sentences.
    """

    pixels: np.ndarray
    notes: tuple[str, ...]


def masked_stem(stem: str) -> str | None:
    """Return the stem of the tile whose mask has this stem, None if it is no mask's."""
    num = len(MASK_END)  # of either
    return stem[:-num] if stem[-num:].lower() in _MASK_ENDS else None


def read_image(source: Path | bytes) -> DecodedImage:
    """Read an image file, or the bytes of one, by the rules of this module.

    Raises:
        ItemError: It cannot be read, or not without guessing.
    """
    try:
        stream: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except (OSError, ValueError) as error:
        raise ItemError(f"cannot be opened: {_reason(error)}") from error
    with stream:
        try:
            with Image.open(stream, formats=FORMATS) as image:
                return _read(image)
        except ItemError:
            raise
        except _DAMAGE as error:
            raise ItemError(f"is damaged or no image this reads: {_reason(error)}") from error


def check_strictness() -> None:
    """Refuse to go on if Pillow was told to fill truncated images with grey.

    Raises:
        ValueError: It was.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that damaged tiles would be filled "
            "with grey unnoticed; set it to False"
        )


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as PNG (3.2 ms and 109 kB per tile of 224 px).

    Run lengths instead of matches: of H&E they give smaller files in two thirds of the time.
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()


def encode_webp(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as `encode_tile` does."""
    return encode_tile(Image.fromarray(pixels))


def encode_tile(image: Image.Image) -> bytes:
    """Return an RGB image as lossless WebP, fast not small (1.6 ms and 80 kB per tile)."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True, method=0, quality=50)
    return stream.getvalue()


def decode_tile(content: bytes) -> np.ndarray:
    """Return a WebP's pixels, uint8 [H, W, 3].

    Raises:
        OSError: It is not a WebP, or is truncated.
    """
    with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
        return np.array(image.convert("RGB"))  # a copy: torch wants to be able to write


def _read(image: Image.Image) -> DecodedImage:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ItemError(f"is {width}x{height} px, more than {MAX_PIXELS:,} in all; cut it to tiles")
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise ItemError(f"holds {frames} pictures, expected one; save the one you mean")
    _check_depth(image)
    image.load()
    notes = []
    if "icc_profile" in image.info:
        notes.append("colour profile not applied")
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
        notes.append(f"turned by EXIF orientation {orientation}")
    return DecodedImage(_opaque(image), tuple(notes))


def _check_depth(image: Image.Image) -> None:
    """Refuse more than 8 bits per channel, which Pillow would cut to 8 where there is colour."""
    deep = image.mode.startswith("I") or image.mode == "F"
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    for tile in tiles:  # how it will decode, such as ("zip", box, offset, "RGB;16B")
        deep = deep or ";16" in str(tile[3:])
    if deep:
        raise ItemError(
            f"has more than 8 bits per channel (mode {image.mode}); scale it to 8 bits yourself"
        )


def _opaque(image: Image.Image) -> np.ndarray:
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "RGB" and "transparency" in image.info:
        raise ItemError("has a transparent colour, expected opaque RGB; paint its background")
    if image.mode == "RGBA":
        if image.getchannel("A").getextrema() != (255, 255):
            raise ItemError("has transparent pixels, expected opaque RGB; paint its background")
        image = image.convert("RGB")
    if image.mode != "RGB":
        raise ItemError(f"has mode {image.mode}, expected RGB; convert it, knowing its colours")
    return np.array(image)  # a copy: torch wants to be able to write


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow says where the file lies, or an address
        return "its first bytes are of no known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
