"""Tiles of training slides that are kept apart: what `evaluate --unseen` wants."""

import csv
import json
import tarfile
from dataclasses import replace

import pytest
import torch

from tests.support.synthetic import slide_picture, write_slide
from tests.training.data.test_tiles import RECIPE, cut, rows, tree
from training.data.batches import load_tiles
from training.data.tile_folders import list_tiles
from training.data.tiles import make_tiles
from training.evaluation.codecs import count_codecs
from training.evaluation.evaluate import Evaluation, _training_tiles
from training.recipes import smoke_tile, xl_tile

APART = replace(RECIPE, unseen_share=0.3)
GRID = "#####\n#####\n#####\n#####\n#####"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Four slides of 25 tiles; their folder."""
    folder = tmp_path_factory.mktemp("slides")
    for k in range(4):
        write_slide(folder / f"s{k}.svs", slide_picture(GRID, 128, k))
    return folder


@pytest.fixture(scope="module")
def out(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles") / "out"
    cut(slides, folder, APART)
    return folder


def places(folder, split):
    found = [r for r in rows(folder) if r["split"] == split]
    return {(r["slide"], r["x_level0"], r["y_level0"]) for r in found}


def members(folder):
    names = set()
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            names |= set(tar.getnames())
    return names


def test_they_are_tiles_of_training_slides_and_no_training_tiles(slides, out, tmp_path):
    cut(slides, tmp_path / "all")
    train, unseen = places(out, "train"), places(out, "unseen")
    assert train.isdisjoint(unseen)
    assert train | unseen == places(tmp_path / "all", "train")
    assert {slide for slide, _, _ in unseen} == {slide for slide, _, _ in train}
    assert places(out, "val") == places(tmp_path / "all", "val")
    assert 5 <= len(unseen) <= 25  # of 50, at a share of 0.3: three standard errors


def test_readers_of_training_shards_do_not_meet_them(out):
    found = {split: members(out / split) for split in ("train", "unseen")}
    for split, names in found.items():
        assert names == {f"{s}/{x}_{y}.webp" for s, x, y in places(out, split)}
    train, unseen = (load_tiles(out / split, 64) for split in ("train", "unseen"))
    assert not (train.images[:, None] == unseen.images[None]).flatten(2).all(2).any()


def test_a_larger_set_trains_on_nothing_that_a_smaller_one_kept_apart(slides, out, tmp_path):
    cut(slides, tmp_path / "small", replace(APART, num_tiles=40))
    assert places(tmp_path / "small", "train") < places(out, "train")
    assert places(tmp_path / "small", "unseen") < places(out, "unseen")


def test_they_do_not_depend_on_processes_and_come_back_when_lost(slides, out, tmp_path):
    cut(slides, tmp_path / "out", APART, num_workers=1)
    assert tree(tmp_path / "out") == tree(out)
    next((tmp_path / "out" / "unseen").glob("*.tar")).unlink()
    cut(slides, tmp_path / "out", APART)
    assert tree(tmp_path / "out") == tree(out)


def test_they_are_counted_in_the_tables(out):
    number = len(places(out, "unseen"))
    counts = json.loads((out / "dataset.json").read_text())["splits"]
    assert counts["unseen"] == {"slides": 2, "patients": 2, "sites": 1, "tiles": number}
    assert counts["train"]["tiles"] == len(places(out, "train"))
    with (out / "slides.csv").open(newline="") as stream:
        found = [(r["split"], int(r["num_unseen"])) for r in csv.DictReader(stream)]
    assert sum(num for _, num in found) == number
    assert all(num == 0 for split, num in found if split == "val")


def test_evaluate_takes_their_folder(out):
    number = len(places(out, "unseen"))
    assert count_codecs(out / "unseen") == {"webp lossless": number}
    config = Evaluation(unseen=out / "unseen")
    real, bank = _training_tiles(out, 64, 1000, config)
    assert len(real) == number
    assert torch.equal(bank, load_tiles(out / "train", 64).images)


def test_given_tiles_are_kept_apart_too(slides, out, tmp_path):
    for split in ("train", "val"):
        for slide, x, y in places(out, split):
            file = tmp_path / "given" / split / slide / f"{x}_{y}.webp"
            file.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(out / split / f"{slide}.tar") as tar:
                file.write_bytes(tar.extractfile(f"{slide}/{x}_{y}.webp").read())
    make_tiles(list_tiles(tmp_path / "given"), APART, tmp_path / "again", num_workers=0)
    train, unseen = (places(tmp_path / "again", split) for split in ("train", "unseen"))
    assert unseen
    assert train.isdisjoint(unseen)
    assert train | unseen == places(out, "train")


def test_a_share_of_all_tiles_is_refused():
    with pytest.raises(ValueError, match=r"unseen_share is 1\.0, expected 0 to less than 1"):
        replace(RECIPE, unseen_share=1.0)


def test_recipes_of_the_whole_pipeline_keep_enough_apart():
    """full.sh and smoke.sh evaluate with them."""
    assert smoke_tile().unseen_share > 0
    assert xl_tile().num_tiles * 0.9 * xl_tile().unseen_share > 3 * 10_000  # full.sh's NUM
