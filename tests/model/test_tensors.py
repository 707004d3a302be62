"""Tensors on disk: shards, pickles, key maps, guesses."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cytosyn_aug.model.differences import compare, is_finite
from cytosyn_aug.model.tensors import WEIGHTS_NAME, KeyMap, assign, read_tensors, weight_files


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    where = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(where))
    with pytest.raises(FileNotFoundError, match=r"two.safetensors.* are missing"):
        weight_files(tmp_path)


def test_shards_that_repeat_a_name_are_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"repeats \['a'\]"):
        read_tensors(sorted(tmp_path.glob("*.safetensors")))


def test_pickles_are_not_loaded_but_named(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="cytosyn-aug convert"):
        weight_files(tmp_path)


def test_a_key_map_renames_by_name_and_prefix_and_leaves_out(tmp_path):
    file = tmp_path / "keys.json"
    entries = {"old": "new", "module.*": "*", "ema_step": None}
    file.write_text(json.dumps({"vae": entries, "latents_bias": [1], "latents_scale": [2]}))
    key_map = KeyMap.load(file)
    tensors = {k: torch.zeros(1) for k in ("old", "module.a.b", "ema_step", "same")}
    assert set(key_map.rename("vae", tensors)) == {"new", "a.b", "same"}
    assert set(key_map.rename("transformer", tensors)) == set(tensors)
    assert key_map.latents_bias == (1.0,)


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"absent": "x"}, "does not hold"), ({"a": "b"}, "two tensors of vae the name b")],
)
def test_a_key_map_that_does_not_apply_is_refused(entries, message):
    tensors = {"a": torch.zeros(1), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        KeyMap(names={"vae": entries}).rename("vae", tensors)


def test_the_most_particular_entry_of_a_key_map_wins():
    key_map = KeyMap(names={"vae": {"ema.*": "*", "ema.step": None}})
    tensors = {k: torch.zeros(1) for k in ("ema.a", "ema.step")}
    assert set(key_map.rename("vae", tensors)) == {"a"}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"vae": 3}',
        '{"vae": {"a*": "b"}}',
        '{"transfomer": {"a": "b"}}',
        '{"latents_bias": [0, 0, 0, 0]}',
    ],
)
def test_a_file_that_is_no_key_map_is_refused(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match=r"keys.json (is not a key map|maps|holds)"):
        KeyMap.load(tmp_path / "keys.json")


def test_the_guess_needs_the_same_shape():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    tensors = dict(network.state_dict())
    tensors["zero.weight"] = tensors.pop("0.weight")
    tensors["one.weight"] = tensors.pop("1.weight")
    found = compare("Sequential", network, tensors)
    assert found.guess == {"zero.weight": "0.weight", "one.weight": "1.weight"}


def blocks(num, names):
    """A network of equal blocks whose layers have these names."""
    layers = {name: nn.Linear(3, 4 if k % 2 else 3) for k, name in enumerate(names)}
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict(layers) for _ in range(num))})


def test_no_block_is_given_the_weights_of_another():
    """Likeness alone takes `blocks.10.one` for `blocks.1.net0`, and loads it."""
    network, stored = blocks(28, ["fc1", "norm"]), blocks(28, ["ff_net_0", "scale"])
    guess = compare("Blocks", network, stored.state_dict()).guess
    assert guess == {
        f"blocks.{k}.{old}.{kind}": f"blocks.{k}.{new}.{kind}"
        for k in range(28)
        for old, new in (("ff_net_0", "fc1"), ("scale", "norm"))
        for kind in ("weight", "bias")
    }


def test_a_name_that_fits_twice_is_not_guessed():
    network, stored = blocks(2, ["xa", "n", "xb"]), blocks(2, ["xc", "n", "xd"])
    assert compare("Blocks", network, stored.state_dict()).guess == {}


def test_a_prefix_is_seen_and_a_second_set_of_weights_left_out():
    network = blocks(2, ["fc1", "norm"])
    state = network.state_dict()
    stored = {f"{p}{k}": v for p in ("model.", "ema.") for k, v in state.items()}
    found = compare("Blocks", network, stored | {"blocks.0.fc1.weight": torch.zeros(3, 3)})
    assert found.guess == {"ema.*": "*", "model.*": None}


def test_blocks_share_a_line():
    network = blocks(12, ["fc1", "norm"])
    state = {k: v for k, v in network.state_dict().items() if "norm" in k or ".3." in k}
    lines = compare("Blocks", network, state).lines()
    assert lines == [f"missing: blocks.[0-2,4-11].fc1.{kind}" for kind in ("bias", "weight")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.safetensors", "b.safetensors"], "keep the one you want"),
        ([f"{WEIGHTS_NAME}.index.json"], "names no shards"),
    ],
)
def test_weights_that_cannot_be_told_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        weight_files(tmp_path)


def test_a_single_file_may_have_any_name(tmp_path):
    file = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert weight_files(tmp_path) == [file]


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    file = tmp_path / WEIGHTS_NAME
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_tensors([file])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_seen(dtype, bad):
    tensor = torch.ones(1000, dtype=dtype)
    assert is_finite(tensor)
    tensor[777] = bad
    assert not is_finite(tensor)


def test_tensors_of_the_wanted_type_are_not_copied():
    with torch.device("meta"):
        network = nn.Linear(3, 4)
    tensors = {k: torch.randn(v.shape) for k, v in network.state_dict().items()}
    assign(network, tensors, torch.float32)
    assert network.weight.data_ptr() == tensors["weight"].data_ptr()
