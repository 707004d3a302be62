"""A generator travels to other processes without its weights."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cytosyn_aug import EditRecipe, StainNormalize, StainReference
from cytosyn_aug.model.checkpoint import load_model, save_model
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.loading import ModelHandle
from tests.support.synthetic import random_parts, synthetic_tiles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", random_parts(), torch.float32)
    return tmp_path / "model"


def test_copies_in_one_process_are_the_same_object(folder):
    generator = TileGenerator.from_pretrained(folder, batch_size=3)
    assert pickle.loads(pickle.dumps(generator)) is generator
    assert copy.deepcopy(generator) is generator


def test_a_copy_is_the_same_object_after_memory_ran_out(folder):
    generator = TileGenerator.from_pretrained(folder, batch_size=4)
    generator.batches.size = 2
    assert copy.deepcopy(generator) is generator
    handle = generator.handle()
    del generator
    assert TileGenerator.from_handle(handle).batch_size == 2


def test_what_is_compiled_stays_behind(folder):
    generator = TileGenerator.from_pretrained(folder)
    tiles = generator.sample(per_condition=3, steps=2)
    generator.compile()  # nothing is compiled before it is called
    packed = pickle.dumps(generator)
    assert len(packed) < 2_000
    del generator  # or the copy would be the same object
    other = pickle.loads(packed)
    assert not other.batches.is_static
    assert torch.equal(other.sample(per_condition=3, steps=2), tiles)


def test_a_pickle_holds_no_weights(folder):
    assert len(pickle.dumps(TileGenerator.from_pretrained(folder))) < 2_000


@pytest.mark.slow
def test_another_process_loads_at_first_use_and_gives_the_same(folder, tmp_path):
    generator = TileGenerator.from_pretrained(folder)
    tiles = synthetic_tiles(2)
    transform = StainNormalize(
        generator, StainReference.fit(generator, synthetic_tiles(3, seed=5)), recipe=EditRecipe()
    )
    torch.save(transform(tiles), tmp_path / "want.pt")
    (tmp_path / "transform.pkl").write_bytes(pickle.dumps((transform, tiles)))
    code = (
        "import pickle, sys, torch\n"
        f"transform, tiles = pickle.load(open({str(tmp_path / 'transform.pkl')!r}, 'rb'))\n"
        "assert not transform.generator.is_loaded\n"
        f"want = torch.load({str(tmp_path / 'want.pt')!r})\n"
        "assert torch.equal(transform(tiles), want)\n"
        "assert transform.generator.is_loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_spawned_worker_transforms(generator):
    reference = StainReference.fit(generator, synthetic_tiles(3, seed=5))
    transform = StainNormalize(generator, reference)
    tiles = synthetic_tiles(2)
    loader = DataLoader(
        Transformed(transform, tiles), num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack([transform(t) for t in tiles]))


class Transformed(torch.utils.data.Dataset):
    def __init__(self, transform, tiles):
        self.transform, self.tiles = transform, tiles

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        return self.transform(self.tiles[index])


def test_weights_that_changed_since_are_refused_by_both_digests(folder):
    generator = TileGenerator.from_pretrained(folder)
    handle = generator.handle()
    del generator
    save_model(folder, random_parts(seed=1), torch.float32)
    other = TileGenerator.from_handle(handle)
    changed = load_model(folder).digest
    with pytest.raises(ValueError, match=f"holds model {changed}.*made with {handle.digest}"):
        other.features(synthetic_tiles(1))


def test_a_folder_that_is_gone_is_named(folder):
    handle = TileGenerator.from_pretrained(folder).handle()
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="model"):
        TileGenerator.from_handle(handle).vae  # noqa: B018


def test_how_it_was_loaded_travels_along(folder):
    generator = TileGenerator.from_pretrained(
        folder, encoder=None, dtype=torch.bfloat16, batch_size=5
    )
    handle = generator.handle()
    del generator
    other = TileGenerator.from_handle(ModelHandle.from_dict(handle.to_dict()))
    assert (other.has_encoder, other.dtype, other.batch_size) == (False, torch.bfloat16, 5)
    assert other.encoder is None
    assert next(other.transformer.parameters()).dtype == torch.bfloat16


def test_a_relative_path_is_found_from_another_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    handle = TileGenerator.from_pretrained("model").handle()
    monkeypatch.chdir(tmp_path.parent)
    assert TileGenerator.from_handle(handle).encoder is not None


def test_a_generator_built_in_memory_cannot_travel():
    with pytest.raises(ValueError, match="built from parts in memory"):
        pickle.dumps(TileGenerator(random_parts()))


def test_foreign_dictionaries_are_refused():
    with pytest.raises(ValueError, match=r"expected one of cytosyn_aug\.TileGenerator"):
        ModelHandle.from_dict({"kind": "something"})


def test_attributes_that_do_not_exist_are_errors(generator):
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        generator.colour  # noqa: B018
