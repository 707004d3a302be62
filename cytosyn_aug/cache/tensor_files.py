"""Safetensors files written as a stream and read by memory map, without a copy of either.

The library's own reader copies what it loads, and its writer takes all bytes at once. Files of
this module are plain safetensors: any reader of that format reads them. No torch here.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cytosyn_aug.io.files import atomic_file

DTYPES: dict[str, np.dtype[Any]] = {  # Any: each of another type
    "U8": np.dtype("uint8"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # of the format


class TensorFile(NamedTuple):
    """A safetensors file that is mapped into memory.

    Attributes:
        tensors: Read-only views into the map; they keep it open.
        metadata: Text beside them.
        size: Length of the file in bytes.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    size: int


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file that is complete or absent.

    Args:
        file: Final name; its folder must exist.
        tensors: Arrays of uint8, uint16, uint32, uint64, float16 or float32. Widest numbers are
            laid first, so that every tensor starts at a multiple of its item size.
        metadata: Text to put beside them.

    Raises:
        OSError: Disk full, no permission and the like; names the file and how far it got.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    offset = 0
    for name, array in ordered:
        span = [offset, offset + array.nbytes]
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            stream.write(np.ascontiguousarray(array).data)


def map_tensors(file: Path) -> TensorFile:
    """Map a safetensors file into memory; pages are read when they are looked at.

    The length is checked before anything is mapped, because looking past the end of a truncated
    file would kill the process rather than raise.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not a safetensors file, truncated, or with a tensor of another dtype.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        if size < 10:
            raise ValueError(f"{file} has {size} bytes, expected a safetensors file; remove it")
        view = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    length = int.from_bytes(view[:8], "little")
    try:
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(view[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        tensors = {k: _view(view, 8 + length, entry) for k, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes expected, {size:,} found")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); remove it") from error
    return TensorFile(tensors, metadata, size)


def _view(view: mmap.mmap, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    count = math.prod(shape)
    if begin < 0 or end - begin != count * dtype.itemsize or start + end > len(view):
        raise ValueError(f"a tensor of {shape} at bytes {begin} to {end}")
    return np.frombuffer(view, dtype, count, start + begin).reshape(shape)
