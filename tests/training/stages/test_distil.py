"""The distil stage: it starts as the teacher, teaches only the student, and resumes bit for bit."""

from dataclasses import replace

import pytest
import torch

from cytosyn_aug.model.solvers import guide
from cytosyn_aug.model.transformer import SiT
from tests.support.synthetic import random_parts, synthetic_tiles
from training.data.batches import TileSet
from training.engine.loop import recipe_dict, train
from training.recipes import smoke_distil, smoke_latents, tiny_distil, tiny_sit, xl_distil
from training.stages.distil import DistilStage, build_student, guided_velocity
from training.stages.latent_space import LatentSpace
from training.stages.latents import StoredViews, write_views
from training.stages.sit import build_transformer


@pytest.fixture(scope="module")
def tiles():
    images = torch.cat([synthetic_tiles(10, seed=s) for s in range(2)])
    return TileSet(images, ("a", "b"), torch.arange(20) // 10)


@pytest.fixture
def make_stage(tiles, tmp_path):
    def make(num_views=4, **changes):
        parts = random_parts()
        space = LatentSpace(parts.vae.eval(), parts.encoder.eval())
        latents = replace(smoke_latents(), num_views=num_views, has_patches=False)
        folder = tmp_path / f"latents{num_views}"
        write_views(space, tiles, latents, folder, data="these tiles")
        recipe = replace(smoke_distil(), **changes)
        return DistilStage(recipe, StoredViews(folder), tiles, space, parts.transformer)

    return make


def losses(stage, rows=slice(None)):
    return stage.losses(0, rows, stage.read(0, rows))


def test_a_student_has_its_teachers_weights_and_an_untaught_guidance():
    teacher = random_parts().transformer
    student = build_student(smoke_distil(), teacher)
    state = student.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    added = {k.split(".")[0] for k in state.keys() - teacher.state_dict().keys()}
    assert added == {"guidance_embedder"}
    x, t, condition = torch.randn(2, 4, 14, 14), torch.rand(2), torch.randn(2, 24)
    guided = student(x, t, condition, t, torch.tensor([1.0, 3.0]))
    assert torch.equal(guided, teacher(x, t, condition))


def test_without_guidance_the_velocity_half_has_nothing_to_learn_at_first(make_stage):
    """Up to bfloat16: the teacher runs on the conditions and the null condition in one batch."""
    sizes = {"batch_size": 16, "num_views": 16}  # enough times inside the guidance interval
    stage = make_stage(plain_share=1.0, **sizes)
    assert losses(stage)["velocity_mse"].item() < 1e-4
    assert losses(make_stage(plain_share=0.0, **sizes))["velocity_mse"].item() > 1e-3


@pytest.mark.parametrize("target", ["derivative", "midpoint"])
def test_gradients_reach_the_student_and_nothing_else(make_stage, target):
    stage = make_stage(target=target)
    losses(stage)["loss"].backward()
    student = dict(stage.network.student.named_parameters())
    without = {k for k, p in student.items() if p.grad is None}
    assert without == {"pos_embed"}
    assert stage.network.error_scale.linear.weight.grad is not None
    for part in (stage.teacher, stage.space.vae, stage.space.encoder):
        assert all(p.grad is None for p in part.parameters())


def test_the_teachers_guidance_is_the_samplers(make_stage):
    """At one scale and one time for all, inside the interval, at its end and outside."""
    stage = make_stage()
    x, condition = torch.randn(3, 4, 14, 14), torch.randn(3, 24)
    for time in (0.3, 0.75, 0.8):
        t = torch.full((3,), time)
        got = guided_velocity(stage.teacher, x, t, condition, torch.full((3,), 2.5), stage.recipe)
        want = guide(stage.teacher, condition, torch.zeros(24), 2.5, 0.0, 0.75)(x, time)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_half_of_a_batch_is_at_r_equal_t_and_the_rest_jumps_towards_data(make_stage):
    stage = make_stage(batch_size=6, num_views=8)
    draws = stage._draws(6, torch.Generator().manual_seed(0))
    assert torch.equal(draws.t[::2], draws.r[::2])
    assert bool((draws.r[1::2] < draws.t[1::2]).all())
    with pytest.raises(ValueError, match="split a pair"):
        losses(stage, slice(3, 6))
    assert bool(((draws.guidance >= 1) & (draws.guidance <= 3)).all())


@pytest.mark.slow
def test_a_resumed_distillation_is_bit_equal_to_an_undisturbed_one(make_stage, tmp_path):
    recipe = recipe_dict(smoke_distil())
    loop = smoke_distil().loop
    train(make_stage(), loop, tmp_path / "whole", recipe=recipe)
    assert train(make_stage(), loop, tmp_path / "parts", recipe=recipe, minutes=0.0) == 1
    assert train(make_stage(), loop, tmp_path / "parts", recipe=recipe) == 2
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    for key in ("network", "average"):
        for name, value in whole[key].items():
            assert torch.equal(value, parts[key][name]), name


def test_a_report_shows_and_measures_both(make_stage, tmp_path):
    stage = make_stage()
    numbers = stage.report(stage.network, tmp_path, 7)
    assert (tmp_path / "samples_000007.png").exists()
    assert numbers["student_4_at_1"] > 0
    assert {"ab2_1_at_2", "student_1_at_2", "val_loss"} <= numbers.keys()


def test_the_xl_recipe_fits_the_released_transformer():
    """On the meta device: CytoSyn's parameters without projector, and a guidance embedder."""
    with torch.device("meta"):
        student = build_student(xl_distil(), SiT())
        x, t, condition = torch.empty(2, 4, 28, 28), torch.empty(2), torch.empty(2, 768)
        assert student(x, t, condition, t, t).shape == x.shape
    added = (256 + 1) * 1152 + (1152 + 1) * 1152
    assert sum(p.numel() for p in student.parameters()) == 674_774_800 + added
    assert student.config["decoupled_depth"] == 20


def test_the_tiny_recipe_fits_tinys_transformer():
    with torch.device("meta"):
        student = build_student(tiny_distil(), build_transformer(tiny_sit(), 192))
    assert student.decoupled_depth < len(student.blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size is 5"),
        ({"target": "magic"}, "target is 'magic'"),
        ({"guidance_max": 0.5}, "guidance up to 0.5"),
        ({"guidance_low": 0.8}, "from 0.8 to 0.75"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(smoke_distil(), **changes)
