"""Tensors on disk: shards, pickles, key maps, guesses."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cytosyn_aug.weights import (
    WEIGHTS_NAME,
    KeyMap,
    assign,
    compare,
    is_finite,
    read_tensors,
    weight_files,
)


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
    file.write_text(json.dumps({"vae": entries, "latents_bias": [1]}))
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


@pytest.mark.parametrize("text", ["[]", "{", '{"vae": 3}', '{"vae": {"a*": "b"}}'])
def test_a_file_that_is_no_key_map_is_refused(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match=r"keys.json (is not a key map|maps)"):
        KeyMap.load(tmp_path / "keys.json")


def test_the_guess_needs_the_same_shape():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    tensors = dict(network.state_dict())
    tensors["zero.weight"] = tensors.pop("0.weight")
    tensors["one.weight"] = tensors.pop("1.weight")
    found = compare("Sequential", network, tensors)
    assert found.guess == {"zero.weight": "0.weight", "one.weight": "1.weight"}


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
