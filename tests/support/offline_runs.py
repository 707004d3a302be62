"""Short ways to run offline functions in tests and to read what they wrote."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from cytosyn_aug import offline
from cytosyn_aug.runs.recipes import Work

QUIET = Work(progress=False)


def read(file):
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def digest(folder):
    """Return every file below a folder with the hash of its bytes."""
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def rows(out):
    return pq.read_table(out / "manifest.parquet").to_pylist()


def augment(tree, out, small, laboratories, **changes):
    settings = {"references": laboratories, "variants": 2, "unit_tiles": 3, "work": QUIET}
    return offline.augment(tree, out, small, **settings | changes)
