"""Small slides as scanners write them, from a picture: SVS, tiled TIFF, NDPI and MRXS.

What OpenSlide asks of each format is there, and what is peculiar to it: an SVS with JPEG tiles and
a label; an NDPI with offsets of eight bytes, one JPEG a level whose restart markers stand for
tiles, and a macro image; an MRXS of photos that overlap, are where the camera was, and may lack.

Sources: TIFF 6.0; OpenSlide 4, openslide-vendor-aperio.c, -hamamatsu.c, -mirax.c and
openslide-decode-tifflike.c.
"""

import io
import struct
from itertools import product

import numpy as np
from PIL import Image

TILE_PX = 256
PHOTO_PX, PHOTO_STEP = 256, 224  # of an MRXS; neighbours overlap by the difference
_SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
_MCU_PX = 8  # of JPEG without subsampling of colour
_KINDS = {"s": 2, "H": 3, "I": 4, "II": 5, "i": 9, "f": 11}


def jpeg(pixels, **settings):
    """Compress uint8 [H, W, 3] with colour at full resolution."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling="4:4:4", **settings)
    return stream.getvalue()


def reduced(picture, factor):
    """Return averages of `factor` squared pixels."""
    return np.asarray(Image.fromarray(picture).reduce(factor))


def write_svs(file, picture, mpp):
    """Write levels 1 and 4 as Aperio does, a thumbnail between them and a label at the end."""
    named, pages = "Aperio Image Library v12.0.15\r\n", []
    for level, image in enumerate((picture, reduced(picture, 4))):
        height, width = image.shape[:2]
        size = f"{width}x{height} [0,0 {width}x{height}] ({TILE_PX}x{TILE_PX}) JPEG/RGB Q=95"
        metadata = {270: ("s", f"{named}{size}|AppMag = 40|MPP = {mpp}")}
        pages.append(_tiled_page(image, metadata))
        if level == 0:  # where readers look for it
            pages.append(_strip_page(reduced(picture, 16), {270: ("s", f"{named}thumbnail")}))
    label = np.zeros((32, 32, 3), np.uint8)
    metadata = {254: ("I", [1]), 270: ("s", f"{named}label 32x32")}
    return _write_tiff(file, [*pages, _strip_page(label, metadata)])


def write_tif(file, picture, mpp):
    """Write levels 1 and 4 as a generic tiled TIFF, with its scale in the resolution tags."""
    coarse = _tiled_page(reduced(picture, 4), {254: ("I", [1])})
    return _write_tiff(file, [_tiled_page(picture, _resolution(mpp)), coarse])


def write_ndpi(file, picture, mpp):
    """Write levels 1 and 4 and a macro image; the width is a multiple of 32."""
    interval = picture.shape[1] // _MCU_PX // 4
    pages = []
    for factor, lens in ((1, 40.0), (4, 10.0), (16, -1.0)):
        metadata = {271: ("s", "Hamamatsu"), 65420: ("I", [1]), 65421: ("f", [lens])}
        metadata |= {65424: ("i", [0])} | _resolution(mpp * factor)  # the focal plane
        settings = {"restart_marker_blocks": interval} if factor == 1 else {}
        pages.append(_strip_page(reduced(picture, factor), metadata, **settings))
        if factor == 1:
            pages[0][0][65426] = ("I", _interval_starts(pages[0][1][0]))
    return _write_tiff(file, pages, is_ndpi=True)


def _resolution(mpp):
    pixels_per_cm = ("II", [round(1e8 / mpp), 10_000])
    return {282: pixels_per_cm, 283: pixels_per_cm, 296: ("H", [3])}


def _interval_starts(encoded):
    """Return where the restart intervals of a JPEG begin, from its start."""
    scan = encoded.index(b"\xff\xda")
    first = scan + 2 + int.from_bytes(encoded[scan + 2 : scan + 4], "big")
    markers = [k for k in range(first, len(encoded) - 1) if encoded[k] == 0xFF]
    return [first, *(k + 2 for k in markers if 0xD0 <= encoded[k + 1] <= 0xD7)]


def _tiled_page(image, metadata):
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)), "edge")
    corners = product(range(0, height, TILE_PX), range(0, width, TILE_PX))
    tiles = [jpeg(padded[y : y + TILE_PX, x : x + TILE_PX]) for y, x in corners]
    return _page(image, metadata | {322: ("I", [TILE_PX]), 323: ("I", [TILE_PX])}), tiles


def _strip_page(image, metadata, **settings):
    return _page(image, metadata | {278: ("I", [len(image)])}), [jpeg(image, **settings)]


def _page(image, metadata):
    """Return the tags of an image as number: (type, values), but not where its segments are."""
    height, width = image.shape[:2]
    size = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8, 8, 8])}
    colour = {259: ("H", [7]), 262: ("H", [6]), 277: ("H", [3]), 530: ("H", [1, 1])}
    return size | colour | metadata


def _write_tiff(file, pages, *, is_ndpi=False):
    """Write pages, of tags and segments each; an NDPI's offsets have four bytes more."""
    wide = "Q" if is_ndpi else "I"
    content, link = bytearray(b"II*\0" + struct.pack(f"<{wide}", 0)), 4
    for tags, segments in pages:
        offsets = []
        for segment in segments:
            offsets.append(len(content))
            content += segment
        where, sizes = (324, 325) if 322 in tags else (273, 279)
        counts = [len(segment) for segment in segments]
        tags = tags | {where: ("I", offsets), sizes: ("I", counts)}
        entries = b""
        for number, (kind, values) in sorted(tags.items()):
            if kind == "s":
                packed = values.encode() + b"\0"
            else:
                packed = struct.pack(f"<{len(values)}{kind[0]}", *values)
            count = len(packed) if kind == "s" else len(values) // len(kind)
            if len(packed) > 4 or kind == "s":
                packed, place = struct.pack("<I", len(content)), packed
                content += place
            entries += struct.pack("<HHI", number, _KINDS[kind], count) + packed.ljust(4, b"\0")
        struct.pack_into(f"<{wide}", content, link, len(content))
        content += struct.pack("<H", len(tags)) + entries
        link = len(content)
        content += struct.pack(f"<{wide}", 0) + bytes(4 * len(tags) if is_ndpi else 0)
    file.write_bytes(content)
    return file


def write_mrxs(file, picture, mpp, missing=()):
    """Write levels 1, 2 and 4 as 3DHISTECH does, without the photos (column, row) that lack.

    Args:
        file: With its companion folder beside it.
        picture: uint8 [H, W, 3]; sides are whole photos, less what overlaps.
        mpp: Of level 1.
        missing: Photos that were not taken.
    """
    overlap = PHOTO_PX - PHOTO_STEP
    rows, columns = ((n - overlap) // PHOTO_STEP for n in picture.shape[:2])
    corners = {}
    for row, column in np.ndindex(rows, columns):
        is_inside = 0 < row < rows - 1 and 0 < column < columns - 1
        shift = 4 * ((column + 2 * row) % 4) if is_inside else 0  # stages are not exact
        corners[column, row] = column * PHOTO_STEP - shift, row * PHOTO_STEP - shift
    photos = {
        place: picture[y : y + PHOTO_PX, x : x + PHOTO_PX].copy()
        for place, (x, y) in corners.items()
        if place not in missing
    }
    levels = [photos, _concatenated(photos, 1), _concatenated(_concatenated(photos, 1), 2)]
    folder = file.with_suffix("")
    folder.mkdir()
    file.write_bytes(jpeg(reduced(picture, 16)))  # a preview; nobody asks what is in it
    (folder / "Slidedat.ini").write_text(_slidedat(columns, rows, overlap, mpp, len(levels)))
    index, data = _index(levels, columns, corners)
    (folder / "Index.dat").write_bytes(index)
    (folder / "Data0000.dat").write_bytes(data)
    return file


def _concatenated(photos, step):
    """Return two by two images halved, side by side; what lacks is white."""
    made = {}
    for column, row in photos:
        corner = column // (2 * step) * 2 * step, row // (2 * step) * 2 * step
        whole = made.setdefault(corner, np.full((PHOTO_PX, PHOTO_PX, 3), 255, np.uint8))
        x, y = ((p - q) // step * PHOTO_PX // 2 for p, q in zip((column, row), corner, strict=True))
        whole[y : y + PHOTO_PX // 2, x : x + PHOTO_PX // 2] = reduced(photos[column, row], 2)
    return made


def _slidedat(columns, rows, overlap, mpp, num_levels):
    sections = "".join(f"HIER_0_VAL_{k}_SECTION = LEVEL_{k}\n" for k in range(num_levels))
    text = (
        f"[GENERAL]\nSLIDE_ID = {_SLIDE_ID}\nIMAGENUMBER_X = {columns}\nIMAGENUMBER_Y = {rows}\n"
        "OBJECTIVE_MAGNIFICATION = 40\nCameraImageDivisionsPerSide = 1\n"
        f"[HIERARCHICAL]\nHIER_COUNT = 1\nHIER_0_NAME = Slide zoom level\n"
        f"HIER_0_COUNT = {num_levels}\n{sections}INDEXFILE = Index.dat\n"
        "NONHIER_COUNT = 1\nNONHIER_0_NAME = VIMSLIDE_POSITION_BUFFER\nNONHIER_0_COUNT = 1\n"
        "[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    )
    for k in range(num_levels):
        text += (
            f"[LEVEL_{k}]\nIMAGE_CONCAT_FACTOR = {int(k > 0)}\nIMAGE_FORMAT = JPEG\n"
            f"OVERLAP_X = {overlap / 2**k}\nOVERLAP_Y = {overlap / 2**k}\n"
            f"MICROMETER_PER_PIXEL_X = {mpp * 2**k}\nMICROMETER_PER_PIXEL_Y = {mpp * 2**k}\n"
            "IMAGE_FILL_COLOR_BGR = 16777215\n"
            f"DIGITIZER_WIDTH = {PHOTO_PX}\nDIGITIZER_HEIGHT = {PHOTO_PX}\n"
        )
    return text


def _index(levels, columns, corners):
    """Return Index.dat, which says where each image and the camera's places are, and Data0000.dat.

    Pointers lead to tables of pointers, those to records, and those to pages of entries.
    """
    data = b"".join(struct.pack("<?ii", True, *corner) for corner in corners.values())
    places = struct.pack("<7i", 1, 0, 0, 0, 0, len(data), 0)
    pages = []
    for images in levels:
        page = struct.pack("<2i", len(images), 0)
        for (column, row), image in sorted(images.items(), key=lambda item: item[0][::-1]):
            encoded = jpeg(image)
            page += struct.pack("<4i", row * columns + column, len(data), len(encoded), 0)
            data += encoded
        pages.append(page)
    head = b"01.02" + _SLIDE_ID.encode()
    tables = len(head) + 8
    records = tables + 4 * (len(pages) + 1)
    starts = [records + 8 * (len(pages) + 1)]
    for page in (*pages, places):
        starts.append(starts[-1] + len(page))
    index = head + struct.pack("<2i", tables, tables + 4 * len(pages))
    index += b"".join(struct.pack("<i", records + 8 * k) for k in range(len(pages) + 1))
    index += b"".join(struct.pack("<2i", 0, start) for start in starts[:-1])
    return index + b"".join(pages) + places, data
