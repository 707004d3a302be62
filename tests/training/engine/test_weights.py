"""Weights of runs and folders: means of several, one as it is, and what is left of a cut one."""

import json
import shutil

import pytest
import torch

from tests.support.synthetic import random_parts
from training.build import load_vae
from training.engine.checkpoints import NAMES
from training.engine.weights import mean_weights, stage_weights
from training.stage_inputs import StageInputs


def save_run(folder, step, num_steps, value):
    folder.mkdir(exist_ok=True)
    recipe = json.dumps({"loop": {"num_steps": num_steps}})
    state = {"step": step, "recipe": recipe, "average": {"w": torch.tensor([value])}}
    torch.save(state, folder / NAMES[0])


def test_the_mean_of_several_runs_lies_between_them():
    one, other = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, -4.0])}
    assert mean_weights([one, other])["w"].tolist() == [0.5, -1.0]


def test_one_run_is_its_own_mean_to_the_bit():
    weights = torch.tensor([-0.0, 1e-8, 3.0], dtype=torch.float16)
    (found,) = mean_weights([{"w": weights}]).values()
    assert found.dtype == weights.dtype
    assert torch.equal(found.view(torch.int16), weights.view(torch.int16))


def test_of_a_run_whose_checkpoint_was_cut_short_the_one_before_is_taken(tmp_path, capsys):
    save_run(tmp_path, 8, 8, 1.0)
    newest, before = (tmp_path / name for name in NAMES)
    newest.rename(before)
    newest.write_bytes(before.read_bytes()[:200])
    assert stage_weights(tmp_path, "any")["w"].item() == 1.0
    assert "was cut short" in capsys.readouterr().err
    newest.unlink()  # killed between the two renames
    assert stage_weights(tmp_path, "any")["w"].item() == 1.0
    before.write_bytes(b"")
    with pytest.raises(ValueError, match="can be read"):
        stage_weights(tmp_path, "any")


def test_a_run_that_is_not_at_its_end_is_taken_and_named(tmp_path, capsys):
    save_run(tmp_path, 5200, 8000, 1.0)
    assert stage_weights(tmp_path, "any")["w"].item() == 1.0
    assert "is at step 5,200 of 8,000" in capsys.readouterr().err
    save_run(tmp_path, 8000, 8000, 1.0)
    stage_weights(tmp_path, "any")
    assert not capsys.readouterr().err


def test_an_autoencoder_may_come_from_a_folder_of_diffusers(tmp_path):
    vae = random_parts().vae
    vae.save_pretrained(tmp_path / "sd-vae")
    found = load_vae(StageInputs(recipe="xl", vae=(tmp_path / "sd-vae",)))
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in vae.state_dict().items())
    assert not any(p.requires_grad for p in found.parameters())
    shutil.copytree(tmp_path / "sd-vae", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises((ValueError, OSError), match="other"):
        stage_weights(tmp_path / "other", "vae")
