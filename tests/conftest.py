"""Fixtures that tests share: a small random model, and synthetic tiles and slides."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, or they wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from PIL import Image

from cytosyn_aug.model.checkpoint import load_model, save_model
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.slides import normalize as whole_slides
from tests.support.synthetic import (
    SIZE,
    random_parts,
    save_tile,
    slide_picture,
    synthetic_tiles,
    with_student,
    write_slide,
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, random_parts(), torch.float32)
    return folder


@pytest.fixture(scope="session")
def generator(model_folder):
    return TileGenerator(load_model(model_folder))


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_student")
    save_model(folder, with_student(random_parts()), torch.float32)
    return folder


@pytest.fixture
def tiles():
    return synthetic_tiles(4)


@pytest.fixture
def synthetic_slide(tmp_path):
    """Return a function that writes a slide of the given name and returns its path."""

    def write(name="slide.svs", grid="##\n##", side=128, seed=0, **facts):
        file = tmp_path / "slides" / name
        file.parent.mkdir(exist_ok=True)
        return write_slide(file, slide_picture(grid, side, seed), **facts)

    return write


@pytest.fixture(scope="session")
def small(model_folder):
    """The random model with batches of four."""
    return TileGenerator(load_model(model_folder), batch_size=4)


@pytest.fixture(scope="session")
def laboratories(tmp_path_factory):
    """Two folders of tiles to restain to."""
    folder = tmp_path_factory.mktemp("laboratories")
    for name, seed in (("a", 7), ("b", 8)):
        for k, tile in enumerate(synthetic_tiles(3, seed=seed)):
            save_tile(folder / name / f"{k}.png", 255 - tile // 2)
    return [folder / "a", folder / "b"]


@pytest.fixture
def tree(tmp_path):
    """Ten tiles of two classes, one of them with a mask and one of them blank."""
    folder = tmp_path / "in"
    for k, tile in enumerate(synthetic_tiles(9)):
        label = "tumour" if k % 2 else "stroma"
        save_tile(folder / label / f"slide{k % 3}_{k * 10}_{k}.png", tile)
    blank = torch.full((3, SIZE, SIZE), 250, dtype=torch.uint8)
    save_tile(folder / "stroma" / "blank.png", blank)
    Image.new("L", (SIZE, SIZE), 1).save(folder / "tumour" / "slide1_10_1_mask.png")
    return folder


@pytest.fixture(scope="session")
def tables():
    """Colour tables by what they do to some colours: one takes a second, and tests make many."""
    return {}


@pytest.fixture
def remembered_tables(tables, monkeypatch):
    """Make a colour table only where no other test has made it."""
    levels = torch.linspace(0, 255, 9).round()
    probe = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 27, 27)

    def remembered(recolour, make=whole_slides.ColourTable):
        key = b"" if recolour is None else recolour(probe).numpy().tobytes()
        if key not in tables:
            if len(tables) == 8:  # of 64 MB
                tables.clear()
            tables[key] = make(recolour)
        return tables[key]

    monkeypatch.setattr(whole_slides, "ColourTable", remembered)
