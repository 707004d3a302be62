"""The latents stage: what it writes is a function of its inputs, resumes, and belongs to them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.synthetic import random_parts, synthetic_tiles
from training.data.batches import Batches, TileSet
from training.recipes import smoke_latents
from training.stages.latent_space import LatentSpace, mean_token, measure_latents
from training.stages.latents import StoredViews, write_views

EVERY = slice(None)


@pytest.fixture(scope="module")
def tiles():
    names = tuple(f"train/a/{k}.png" for k in range(6))
    index = torch.zeros(6, dtype=torch.int64)
    return TileSet(synthetic_tiles(6, seed=0), ("a",), index, names)


@pytest.fixture(scope="module")
def space():
    parts = random_parts()
    return LatentSpace(parts.vae.eval(), parts.encoder.eval())


def write(space, tiles, folder, data="these tiles", **changes):
    return write_views(space, tiles, replace(smoke_latents(), **changes), folder, data)


def everything(folder):
    views = StoredViews(folder)
    return views.take(torch.arange(len(views)))


@pytest.fixture
def folder(space, tiles, tmp_path):
    write(space, tiles, tmp_path / "latents")
    return tmp_path / "latents"


def test_views_are_read_by_index_in_any_order_across_shards(folder):
    views = StoredViews(folder)
    shards = [load_file(f) for f in sorted(folder.glob("*.safetensors"))]
    assert [len(s["cls"]) for s in shards] == [4, 1]
    index = torch.tensor([4, 0, 3, 4])
    for name, found in views.take(index).items():
        assert torch.equal(found, torch.cat([s[name] for s in shards])[index])
    assert "patches" not in views.take(index, with_patches=False)


def test_a_view_is_named_after_its_tile(folder, tiles):
    recipe = smoke_latents()
    shards = Batches(len(tiles), recipe.shard_size, recipe.seed)
    shown = torch.cat([shards.index(0), shards.index(1)])[: recipe.num_views].tolist()
    views = StoredViews(folder)
    assert [views.name(k) for k in range(5)] == [f"train/a/{k}.png" for k in shown]


def test_a_view_of_a_set_without_names_is_placed(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        del tensors["tiles"]
        save_file(tensors, file)
    expected = f"data set these tiles, view 0 of {folder / '000001.safetensors'}"
    assert StoredViews(folder).name(4) == expected


def test_statistics_are_those_of_all_views(folder):
    views, whole = StoredViews(folder), everything(folder)
    mean, variance = measure_latents(whole)
    torch.testing.assert_close(views.latent_mean, mean)
    torch.testing.assert_close(views.latent_variance, variance)
    torch.testing.assert_close(views.mean_patch, mean_token(whole["patches"]))


def test_the_variance_is_that_of_latents_drawn_from_the_posteriors(folder):
    whole = {k: v.float() for k, v in everything(folder).items()}
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn((200, *whole["mean"].shape), generator=draw)
    drawn = (whole["mean"] + whole["std"] * noise).transpose(0, 2).flatten(1)
    _, variance = measure_latents(whole)
    torch.testing.assert_close(drawn.var(1).double(), variance, rtol=0.02, atol=0)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(folder, space, tiles, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "000001.safetensors").write_bytes((folder / "000001.safetensors").read_bytes())
    assert write(space, tiles, other) == 0
    for file in folder.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_processes_share_the_shards_and_the_last_describes_them(
    folder, space, tiles, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    for rank, missing in ((0, 1), (1, 0)):
        monkeypatch.setattr("training.stages.latents.world", lambda rank=rank: _Place(rank, 2))
        assert write(space, tiles, other) == missing
        assert (other / "latents.json").exists() == (missing == 0)
    for name, found in everything(other).items():
        assert torch.equal(found, everything(folder)[name])


class _Place:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("changed", [{"data": "other tiles"}, {"seed": 9}, {"stain_jitter": 0.5}])
def test_a_folder_with_other_latents_is_refused_with_the_difference(folder, space, tiles, changed):
    with pytest.raises(ValueError, match=f"holds other latents.*{next(iter(changed))}"):
        write(space, tiles, folder, **changed)


def test_shards_of_an_unfinished_other_set_are_refused(folder, space, tiles):
    (folder / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"000000.safetensors is of another set"):
        write(space, tiles, folder, seed=9)


def test_latents_of_another_autoencoder_or_encoder_are_stale(folder):
    parts = random_parts()
    nn.init.zeros_(parts.vae.quant_conv.bias)
    with pytest.raises(ValueError, match="stale: its vae has digest"):
        StoredViews(folder).check(LatentSpace(parts.vae, parts.encoder))
    parts = random_parts()
    nn.init.constant_(next(parts.encoder.parameters()), 0.5)
    with pytest.raises(ValueError, match="stale: its encoder has digest"):
        StoredViews(folder).check(LatentSpace(parts.vae, parts.encoder))


def test_another_decoder_leaves_latents_valid(folder):
    parts = random_parts()
    for parameter in parts.vae.decoder.parameters():
        nn.init.zeros_(parameter)
    StoredViews(folder).check(LatentSpace(parts.vae, parts.encoder))


def test_an_unfinished_set_and_a_missing_or_damaged_shard_are_named(folder):
    file = folder / "000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"000001.safetensors is damaged"):
        StoredViews(folder).take(torch.tensor([4]))
    file.unlink()
    with pytest.raises(ValueError, match=r"000001.safetensors and 0 more shards are missing"):
        StoredViews(folder)
    (folder / "latents.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        StoredViews(folder)
