import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cytosyn_aug.model.checkpoint import WEIGHTS_NAME, load_model, save_model
from tests.support.synthetic import random_parts, with_student


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


def test_a_student_comes_back_bit_equal_and_is_optional(student_folder, model_folder):
    student = load_model(student_folder).student
    written = with_student(random_parts()).student
    assert student.config["decoupled_depth"] == 1
    assert student.config["taught_guidance"] == (3.0, 0.0, 0.75)
    state = student.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in written.state_dict().items())
    assert load_model(model_folder).student is None


def test_the_student_is_part_of_the_digest(student_folder, model_folder, tmp_path):
    folder = shutil.copytree(student_folder, tmp_path / "model")
    before = load_model(folder).digest
    assert before != load_model(model_folder).digest
    file = folder / "student" / WEIGHTS_NAME
    tensors = load_file(file)
    tensors["final_layer.linear.bias"].add_(1)
    save_file(tensors, file)
    assert load_model(folder).digest != before


def test_a_student_stays_when_another_encoder_is_asked_for(student_folder):
    parts = load_model(student_folder, encoder=None)
    assert parts.encoder is None
    assert parts.stain_probe is None
    assert parts.student is not None


def test_a_student_without_a_tensor_is_refused(student_folder, tmp_path):
    folder = shutil.copytree(student_folder, tmp_path / "model")
    file = folder / "student" / WEIGHTS_NAME
    tensors = load_file(file)
    del tensors["guidance_embedder.mlp.0.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing: guidance_embedder.mlp.0.bias"):
        load_model(folder)


def other_statistics(student):
    student.bn.running_mean.add_(1)


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({}, other_statistics, "another bn.running_mean"),
        ({"conditioning_dim": 7}, None, "conditioning_dim 7 for 24"),
        ({"decoupled_depth": None}, None, "no decoupled_depth"),
        ({"taught_guidance": None}, None, "no taught_guidance"),
    ],
)
def test_a_student_of_another_transformer_is_refused(tmp_path, changes, edit, message):
    parts = with_student(random_parts(), **changes)
    if edit:
        edit(parts.student)
    save_model(tmp_path, parts, torch.float32)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
