"""Plans: the published sizes, and the FLOP of a step that really ran."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cytosyn_aug.model.encoder import TileEncoder
from training.command_line import main
from training.costs import FusedAttention, saved_bytes, step_uses
from training.data.batches import TileSet
from training.plan import plan
from training.recipes import tiny_encoder, tiny_repae, tiny_sit, tiny_vae, xl_repae, xl_sit, xl_vae
from training.stage_inputs import TRAINED
from training.stages.encoder import build_encoder
from training.stages.repae import RepaeStage
from training.stages.sit import build_transformer
from training.stages.vae import build_vae


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("name", ["tiny", "smoke", "xl"])
def test_every_recipe_has_a_plan(name, stage):
    if (name, stage) == ("xl", "encoder"):
        return  # H0-mini is not trained here
    assert plan(name, stage).flop_per_sample > 0


@pytest.fixture(scope="module")
def end_to_end():
    return plan("xl", "repae")


@pytest.mark.slow
def test_the_end_to_end_run_has_the_published_networks(end_to_end):
    found = end_to_end
    assert found.parameters["transformer"] == 682_906_128
    assert found.parameters["vae"] == 83_653_863
    assert found.state_bytes == 20 * sum(found.parameters.values())
    assert found.checkpoint_bytes < found.state_bytes


def test_the_end_to_end_run_fits_its_gpus_in_two_passes_and_not_in_one(end_to_end):
    """A tenth of 80 GB is left to what the plan does not count."""
    found = end_to_end
    assert (found.num_gpus, found.num_passes) == (8, 2)
    assert found.gpu_bytes < 0.9 * 80e9
    assert found.gpu_bytes + 0.9 * found.activation_bytes > 80e9


@pytest.mark.slow
def test_a_step_of_the_stage_itself_keeps_what_is_planned(monkeypatch):
    """Tiny and in float32, since there is no autocast on meta: all networks and their passes."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr("training.costs.gpu_autocast", nullcontext)
    recipe = replace(tiny_repae(), is_centred=False)
    tiles = TileSet(torch.zeros(48, 3, 224, 224, dtype=torch.uint8), ("a",), torch.zeros(48))
    with torch.device("meta"):
        encoder = build_encoder(tiny_encoder())
        networks = build_vae(tiny_vae()), build_transformer(tiny_sit(), 192), encoder
        planned = [use.kept for use in step_uses(recipe, "tiny")]
    stage = RepaeStage(recipe, tiles, tiles, *networks, torch.device("meta"))
    with FusedAttention():
        samples = stage.read(0, slice(0, 3))
        found = saved_bytes(stage.network, lambda: stage.losses(0, slice(0, 3), samples))
    fixed, each = (sum(numbers) for numbers in zip(*planned, strict=True))
    # Losses of outputs alone are what the plan leaves out.
    assert found == pytest.approx(fixed + 3 * each, rel=0.03)


@pytest.mark.slow
def test_a_published_step_runs_on_the_meta_device_and_costs_what_is_planned(
    monkeypatch, end_to_end
):
    """The stage itself, 683 M + 84 M parameters without memory, forward and backward."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on meta
    tiles = TileSet(torch.zeros(256, 3, 224, 224, dtype=torch.uint8), ("a",), torch.zeros(256))
    with torch.device("meta"):
        networks = build_vae(xl_vae()), build_transformer(xl_sit(), 768), TileEncoder()
    stage = RepaeStage(xl_repae(), tiles, tiles, *networks, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        stage.losses(0, slice(0, 1), stage.read(0, slice(0, 1)))["loss"].backward()
    planned = end_to_end.flop_per_sample
    # Bias, norms and the first layers' missing input gradients are what the plan leaves out.
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.03)


@pytest.mark.slow
def test_a_dry_run_prints_recipe_and_cost_and_touches_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["repae", "--recipe", "xl", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert '"vae_alignment_weight": 1.5' in printed
    assert "682,906,128" in printed
    assert "H100-hours" in printed
    assert "8 GPUs x 2 passes of 16" in printed
    assert "of activations" in printed
    assert "torchrun --standalone --nproc-per-node 8" in printed
    assert not list(tmp_path.iterdir())
