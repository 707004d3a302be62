"""Whole slides that are large, and runs on them that are killed."""

import multiprocessing
import os
import random
import time
import tracemalloc

import numpy as np
import pytest

from cytosyn_aug import DensityReference
from cytosyn_aug.slides import normalize as whole_slides
from cytosyn_aug.slides.normalize import normalize_slide
from cytosyn_aug.slides.pyramid import TILE_PX
from cytosyn_aug.stain.colour_table import ColourTable
from tests.support.synthetic import synthetic_tiles, write_slide

pytest.importorskip("tifffile", reason="slides are not normalised")

REFERENCE = DensityReference.fit(synthetic_tiles(3))


@pytest.fixture(autouse=True, scope="module")
def no_change():
    """Make no table of colours but this one: they take most of the time and of the memory."""
    table = ColourTable(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_slides, "ColourTable", lambda _: table)
        yield


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(tmp_path):
    def peak(num_rows):
        picture = np.full((num_rows * TILE_PX, TILE_PX, 3), (186, 112, 170), np.uint8)
        slide = write_slide(tmp_path / f"{num_rows}.svs", picture, mpp="0.5")
        out = tmp_path / f"{num_rows}.tif"
        tracemalloc.start()
        normalize_slide(slide, out, REFERENCE, source=REFERENCE, num_threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    block = TILE_PX * TILE_PX * 3
    assert peak(40) - peak(8) < 4 * block  # of 32 more, and of three more levels


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_run_killed_at_any_moment_and_started_again_writes_the_same(tmp_path):
    y, x = np.mgrid[:1500, :1500]
    grey = (200 + (x // 50 + y // 50) % 40).astype(np.uint8)
    slide = write_slide(tmp_path / "a.svs", np.stack([grey] * 3, -1), mpp="0.5")
    whole, out = tmp_path / "whole.tif", tmp_path / "out" / "a.tif"

    def run(to):
        return normalize_slide(slide, to, REFERENCE, overwrite=True)

    seconds = run(whole).seconds
    # Forked, as torch has nothing to do here: there is no tissue to fit to.
    process = multiprocessing.get_context("fork").Process(target=run, args=(out,))
    process.start()
    while not (out.parent.exists() and any(out.parent.iterdir())) and process.is_alive():
        time.sleep(0.002)
    time.sleep(moment := random.Random(os.getpid()).uniform(0, seconds))
    process.kill()
    process.join()
    left = [file.name for file in out.parent.iterdir()]
    assert left in ([f".a.tif.{process.pid}.tmp"], ["a.tif"]), moment
    run(out)
    assert [file.name for file in out.parent.iterdir()] == ["a.tif"]
    assert out.read_bytes() == whole.read_bytes()
