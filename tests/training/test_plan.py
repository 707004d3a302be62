"""Plans: the published sizes, and the FLOP of a step that really ran."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cytosyn_aug.encoder import TileEncoder
from training.__main__ import main
from training.data import TileSet
from training.plan import plan
from training.recipes import xl_repae, xl_sit, xl_vae
from training.repae import RepaeStage
from training.sit import build_transformer
from training.stages import TRAINED
from training.vae import build_vae


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("name", ["tiny", "smoke", "xl"])
def test_every_recipe_has_a_plan(name, stage):
    if (name, stage) == ("xl", "encoder"):
        return  # H0-mini is not trained here
    assert plan(name, stage).flop_per_sample > 0


def test_the_end_to_end_run_has_the_published_networks():
    found = plan("xl", "repae")
    assert found.parameters["transformer"] == 682_906_128
    assert found.parameters["vae"] == 83_653_863
    assert found.state_bytes == 20 * sum(found.parameters.values())
    assert found.checkpoint_bytes < found.state_bytes


def test_a_published_step_runs_on_the_meta_device_and_costs_what_is_planned(monkeypatch):
    """The stage itself, 683 M + 84 M parameters without memory, forward and backward."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on meta
    tiles = TileSet(torch.zeros(256, 3, 224, 224, dtype=torch.uint8), ("a",), torch.zeros(256))
    with torch.device("meta"):
        networks = build_vae(xl_vae()), build_transformer(xl_sit(), 768), TileEncoder()
    stage = RepaeStage(xl_repae(), tiles, tiles, *networks, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        stage.losses(0, slice(0, 1), stage.read(0, slice(0, 1)))["loss"].backward()
    planned = plan("xl", "repae").flop_per_sample
    # Bias, norms and the first layers' missing input gradients are what the plan leaves out.
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.03)


def test_a_dry_run_prints_recipe_and_cost_and_touches_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["training", "repae", "--recipe", "xl", "--dry-run"])
    main()
    printed = capsys.readouterr().out
    assert '"vae_alignment_weight": 1.5' in printed
    assert "682,906,128" in printed
    assert "H100-hours" in printed
    assert not list(tmp_path.iterdir())
