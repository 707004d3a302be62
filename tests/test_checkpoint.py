import json
import shutil

import pytest
import torch
from conftest import random_parts
from safetensors.torch import load_file, save_file

from cytosyn_aug.checkpoint import WEIGHTS_NAME, load_model, save_model


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def edit_weights(folder, change):
    file = folder / "transformer" / WEIGHTS_NAME
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_saved_model_reopens_bit_equal(model_folder):
    parts = load_model(model_folder)
    old = random_parts()
    for name in ("vae", "transformer", "encoder", "stain_probe"):
        state = getattr(parts, name).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in getattr(old, name).state_dict().items())


def test_half_precision_keeps_latent_statistics_in_full(tmp_path):
    parts = random_parts()
    parts.transformer.bn.running_mean.fill_(0.123456789)
    save_model(tmp_path, parts)
    stored = load_file(tmp_path / "transformer" / WEIGHTS_NAME)
    assert stored["pos_embed"].dtype == torch.float16
    assert torch.equal(stored["bn.running_mean"], parts.transformer.bn.running_mean)


def test_every_difference_is_named_at_once(copy):
    def change(tensors):
        del tensors["blocks.0.attn.qkv.bias"]
        tensors["blocks.9.attn.qkv.bias"] = torch.zeros(3)
        tensors["final_layer.linear.bias"] = torch.zeros(5)
        tensors["x_embedder.proj.bias"][0] = float("nan")

    edit_weights(copy, change)
    with pytest.raises(ValueError, match="does not fit SiT") as error:
        load_model(copy)
    message = str(error.value)
    assert "missing: blocks.0.attn.qkv.bias" in message
    assert "unexpected: blocks.9.attn.qkv.bias" in message
    assert "shape: final_layer.linear.bias is [5], expected [16]" in message
    assert "not finite: x_embedder.proj.bias" in message


def test_one_changed_weight_changes_the_digest(copy, model_folder):
    assert load_model(copy).digest == load_model(model_folder).digest
    edit_weights(copy, lambda tensors: tensors["final_layer.linear.bias"].add_(1))
    assert load_model(copy).digest != load_model(model_folder).digest


def test_a_truncated_weight_file_is_called_corrupt(copy):
    file = copy / "vae" / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="corrupt"):
        load_model(copy)


def test_a_partial_folder_names_the_missing_file(copy):
    (copy / "vae" / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"vae.*is missing"):
        load_model(copy)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is this a model folder"):
        load_model(tmp_path)


def test_another_format_version_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        load_model(copy)


def test_a_config_of_another_class_is_refused(copy):
    (copy / "transformer" / "config.json").write_text(json.dumps({"num_layers": 3}))
    with pytest.raises(ValueError, match="does not describe a SiT"):
        load_model(copy)
