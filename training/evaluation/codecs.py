"""How tiles were compressed on disk, and how to give generated tiles the same history.

Metrics see compression: two sets of which only one is lossy differ by that alone (CytoSyn tech
report, arXiv 2603.18089). A file says how it was written, not what it was decoded from before.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.batches import TILE_SUFFIXES

# A shard is written by one process in one way; reading all headers of 40 M tiles takes hours.
_MAX_OF_SHARD = 16
LOSSLESS = ("png", "webp lossless", "tiff", "memory")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "jpeg2000", "webp")


def codec_of(content: BinaryIO, name: str) -> str:
    """Return `png`, `jpeg`, `webp lossy`, `webp lossless`, `tiff` or `tiff (jpeg)`.

    Args:
        content: The file, at its beginning.
        name: What to call it in an error.

    Raises:
        ValueError: Another format.
    """
    head = content.read(64)
    if head.startswith(b"\x89PNG"):
        return "png"
    if head.startswith(b"\xff\xd8"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp lossless" if b"VP8L" in head else "webp lossy"
    if head[:4] in (b"II*\0", b"MM\0*"):
        content.seek(0)
        with Image.open(content) as image:
            compression = str(image.info.get("compression", "raw"))
        return f"tiff ({compression})" if compression in _LOSSY_TIFF else "tiff"
    raise ValueError(f"{name} is no PNG, JPEG, WebP or TIFF; convert it")


def count_codecs(folder: Path) -> dict[str, int]:
    """Return how many tiles of a split use which codec, of shards the first 16.

    Args:
        folder: `<slide>/<tile>.{png,webp,...}` or `<slide>.tar` of such tiles.

    Raises:
        ValueError: No tiles, or one in another format.
    """
    counts = Counter(_codecs(folder))
    if not counts:
        raise ValueError(f"no tiles under {folder}; expected {folder}/<slide>/<tile>.png")
    return dict(sorted(counts.items()))


def _codecs(folder: Path) -> Iterator[str]:
    for file in folder.glob("*/*"):
        if file.suffix.lower() in TILE_SUFFIXES:
            with file.open("rb") as stream:
                yield codec_of(stream, str(file))
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as members:
            tiles = (m for m in members if Path(m.name).suffix.lower() in TILE_SUFFIXES)
            for member in islice(tiles, _MAX_OF_SHARD):
                content = cast("BinaryIO", members.extractfile(member))
                yield codec_of(content, f"{member.name} of {shard}")


def is_lossy(codec: str) -> bool:
    """Return whether a codec of `codec_of` or `recompress` (`webp:88`) changes pixels."""
    return codec not in LOSSLESS


def check_codecs(real: Iterable[str], generated: str, statement: str = "") -> None:
    """Raise unless all sets are lossy or all lossless, or a statement accepts that they differ.

    Args:
        real: Codecs of the real tiles.
        generated: `memory`, or what `recompress` gives the generated tiles.
        statement: Why a mixture is acceptable; recorded in the report.

    Raises:
        ValueError: A mixture without a statement.
    """
    kinds = {codec: is_lossy(codec) for codec in (*real, generated)}
    if len(set(kinds.values())) > 1 and not statement:
        listed = ", ".join(f"{k} ({'lossy' if v else 'lossless'})" for k, v in kinds.items())
        raise ValueError(
            f"real and generated tiles have different codecs: {listed}; give the generated tiles "
            "the codec of the real ones (--codec webp:88), or state why the mixture is acceptable "
            '(--mixed-codecs "REASON"), which is recorded'
        )


def recompress(images: Tensor, codec: str) -> Tensor:
    """Return uint8 images [N, 3, H, W] after being written and read once.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        codec: `memory` for none, else `jpeg:QUALITY` or `webp:QUALITY`, lossy, 1 to 100.

    Raises:
        ValueError: Another codec.
    """
    if codec == "memory":
        return images
    form, _, quality = codec.partition(":")
    if form not in ("jpeg", "webp") or not quality.isdigit() or not 1 <= int(quality) <= 100:
        raise ValueError(
            f"codec is {codec!r}, expected 'memory', 'jpeg:QUALITY' or 'webp:QUALITY', 1 to 100"
        )
    rows = []
    for image in images.cpu():
        buffer = io.BytesIO()
        array = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(buffer, form, quality=int(quality))
        with Image.open(buffer) as decoded:
            rows.append(torch.from_numpy(np.array(decoded.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(rows)
