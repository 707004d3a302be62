"""Export: a card with an evaluation's numbers, also where the encoder may not be copied."""

import json

import pytest
from safetensors.torch import save_file

from cytosyn_aug.model.checkpoint import load_model
from tests.support.synthetic import SIZE, random_parts
from training.export import export
from training.model_card import CardSources


def write_report(folder, digest):
    folder.mkdir(exist_ok=True)
    (folder / "numbers.json").write_text(json.dumps({"digest": digest, "psnr_db": 24.5}))
    return CardSources(reports={"student": folder})


@pytest.mark.slow
def test_a_model_whose_encoder_is_not_copied_is_known_together_with_it(tmp_path):
    parts = random_parts()
    h0_mini = tmp_path / "h0_mini.safetensors"
    state = parts.encoder.vit.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, h0_mini)
    parts = parts._replace(encoder=None, stain_probe=None)
    folder = tmp_path / "model"
    digest = export(folder, parts, CardSources(), encoder=h0_mini)
    assert digest == load_model(folder, encoder=h0_mini).digest != load_model(folder).digest
    assert not (folder / "encoder").exists()
    evaluated = write_report(tmp_path / "report", digest)
    assert export(folder, parts, evaluated, encoder=h0_mini) == digest
    assert "| 24.5 |" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="evaluate the exported model"):
        export(folder, parts, write_report(tmp_path / "report", "0" * 16), encoder=h0_mini)
    assert load_model(folder).tile.size_px == SIZE


def test_weights_that_change_on_disk_are_reported(tmp_path, monkeypatch):
    from training import export as module

    def damaged(folder, **options):
        parts = load_model(folder, **options)
        next(parts.vae.parameters()).data.add_(1)
        return parts

    monkeypatch.setattr(module, "load_model", damaged)
    with pytest.raises(RuntimeError, match=r"vae\..* changed on disk"):
        module.export(tmp_path / "model", random_parts(), CardSources())
