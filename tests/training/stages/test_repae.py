"""REPA-E: who receives which gradient, and whose statistics move."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cytosyn_aug.model.transformer import SiT
from tests.support.synthetic import SIZE, random_parts, synthetic_tiles
from training.data.batches import TileSet, step_generator
from training.engine.loop import recipe_dict, train
from training.recipes import smoke_repae
from training.stages.discriminator import PatchDiscriminator, judge_loss
from training.stages.repae import (
    RepaeStage,
    _windows,
    batch_moments,
    frozen,
    move_statistics,
    whiten_batch,
)

ROWS = slice(None)
AUTOENCODER = ("l1", "perceptual", "texture", "kl", "adversarial", "vae_alignment")
TRANSFORMER = ("velocity", "alignment")


def make_stage(**changes):
    parts = random_parts()
    settings = {k: v for k, v in parts.transformer.config.items() if not k.startswith("_")}
    transformer = SiT(**settings | {"z_dims": (24,), "projector_dim": 16})
    for parameter in transformer.parameters():  # zero gates would stop gradients
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    images = torch.cat([synthetic_tiles(6, seed=s) for s in range(2)])
    tiles = TileSet(images, ("a", "b"), torch.arange(12) // 6)
    recipe = replace(smoke_repae(), decode_px=64, **changes)
    return RepaeStage(
        recipe, tiles, tiles, parts.vae, transformer, parts.encoder, torch.device("cpu")
    )


def losses(stage, step=0):
    return stage.losses(step, ROWS, stage.read(step, ROWS))


def parts_with_gradient(stage, name):
    stage.network.zero_grad(set_to_none=True)
    losses(stage)[name].backward()
    return {
        part
        for part, module in stage.network.items()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    }


@pytest.mark.parametrize("name", AUTOENCODER)
def test_what_judges_the_autoencoder_teaches_only_it(name):
    assert parts_with_gradient(make_stage(), name) == {"vae"}


@pytest.mark.parametrize("name", TRANSFORMER)
def test_velocity_and_alignment_teach_only_the_transformer(name):
    assert parts_with_gradient(make_stage(), name) == {"transformer"}


def test_the_judge_teaches_itself_only():
    assert parts_with_gradient(make_stage(), "judge") == {"judge"}


@pytest.mark.parametrize("name", ["l1", "adversarial"])
def test_reconstruction_reaches_both_halves_and_alignment_the_encoder_only(name):
    stage = make_stage()

    def reached(loss):
        stage.network.zero_grad(set_to_none=True)
        losses(stage)[loss].backward()
        named = stage.network["vae"].named_parameters()
        return {k.split(".")[0] for k, p in named if p.grad is not None and p.grad.any()}

    assert {"encoder", "decoder"} <= reached(name)
    assert "decoder" not in reached("vae_alignment")
    assert "encoder" in reached("vae_alignment")


def test_one_backward_pass_gives_what_separate_steps_would():
    """The sum leaks nothing: each part's gradient is that of its own losses."""
    stage = make_stage(adversarial_from=0)
    stage.network.zero_grad(set_to_none=True)
    losses(stage)["loss"].backward()
    together = {
        k: p.grad.clone() for k, p in stage.network.named_parameters() if p.grad is not None
    }
    weights = {"velocity": 1.0, "alignment": stage.recipe.alignment_weight}
    stage.network.zero_grad(set_to_none=True)
    found = losses(stage)
    sum(w * found[k] for k, w in weights.items()).backward()
    for name, parameter in stage.network["transformer"].named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, together[f"transformer.{name}"], rtol=1e-3, atol=1e-6
            )


def test_the_judge_counts_only_from_its_step():
    stage = make_stage(adversarial_from=1, adversarial_weight=1e6)
    found = [losses(stage, step)["loss"].detach().abs() for step in (0, 1)]
    assert found[1] > 100 * found[0]


def test_alignment_of_latents_leaves_the_running_statistics_and_velocity_moves_them():
    stage = make_stage()
    bn = stage.network["transformer"].bn
    bn.running_mean.fill_(5.0)
    losses(stage)
    once = bn.running_mean.clone()
    assert not torch.equal(once, torch.full((4,), 5.0))
    # One move of a tenth towards the batch, not two.
    moved = (5.0 - once) / 0.1
    expected = torch.full((4,), 5.0)
    reference = nn.BatchNorm2d(4, eps=1e-4, affine=False)
    reference.running_mean.copy_(expected)
    stage.network["transformer"].bn.running_mean.copy_(expected)
    seen = []
    original = stage._flow
    stage._flow = lambda latents, *rest: (seen.append(latents), original(latents, *rest))[1]
    stage._compute(*_inputs(stage))
    reference(seen[0])
    torch.testing.assert_close(5.0 - reference.running_mean, 0.1 * moved, rtol=1e-3, atol=1e-4)


def _inputs(stage):
    draws = stage._draws(step_generator(stage.recipe.seed, 0))
    from training.data.batches import change_stain, crop_and_turn

    images = crop_and_turn(stage.tiles.images[stage.batches.index(0)], draws.views, SIZE)
    return stage._batch(change_stain(images, draws.maps)), draws


@pytest.mark.slow
def test_a_compiled_step_has_the_gradients_of_an_eager_one():
    """Traced with its backward pass, which must not meet statistics that moved meanwhile."""
    found = []
    for is_compiled in (False, True):
        stage = make_stage()
        if is_compiled:
            stage.compute = torch.compile(stage._compute, backend="aot_eager")
        losses(stage)["loss"].backward()
        found.append({k: p.grad for k, p in stage.network.named_parameters()})
    for name, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-2, atol=1e-3)


def test_batch_whitening_is_torchs_batch_norm():
    latents = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours, theirs = (nn.BatchNorm2d(4, eps=1e-4, affine=False) for _ in range(2))
    moments = batch_moments(latents)
    whitened = whiten_batch(latents, moments, ours.eps)
    torch.testing.assert_close(whitened, theirs(latents), rtol=1e-4, atol=1e-5)
    move_statistics(ours, moments)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    count = latents.numel() / 4  # torch keeps the unbiased variance; 1 / count is the difference
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=2 / count, atol=1e-6)


def test_latents_that_are_not_finite_do_not_move_the_statistics():
    norm = nn.BatchNorm2d(4, eps=1e-4, affine=False)
    latents = torch.randn(2, 4, 3, 3)
    latents[0, 0, 0, 0] = float("nan")
    move_statistics(norm, batch_moments(latents))
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))


def test_frozen_modules_pass_gradients_on_and_thaw_again():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_windows_are_cut_where_they_were_drawn():
    images = torch.arange(2 * 1 * 4 * 4).view(2, 1, 4, 4)
    cut = _windows(images, torch.tensor([[0, 1], [2, 2]]), 2)
    assert cut.tolist() == [[[[1, 2], [5, 6]]], [[[26, 27], [30, 31]]]]


def test_the_judge_scores_each_image_by_itself():
    judge = PatchDiscriminator(8)
    pixels = torch.randn(3, 3, 64, 64)
    scores = judge(pixels)
    assert scores.shape == (3, 1, 6, 6)
    torch.testing.assert_close(judge(pixels[1:2]), scores[1:2])


def test_a_judge_that_tells_apart_by_a_margin_has_no_loss():
    assert float(judge_loss(torch.tensor([1.5]), torch.tensor([-2.0]))) == 0.0
    assert float(judge_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1.0


def test_the_aligned_tokens_alone_are_those_of_the_whole_pass():
    transformer = random_parts().transformer
    x, t, c = torch.randn(2, 4, 14, 14), torch.rand(2), torch.randn(2, 24)
    assert torch.equal(transformer.aligned_tokens(x, t, c), transformer.forward_tokens(x, t, c)[1])


def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(tmp_path):
    recipe = recipe_dict(smoke_repae())
    loop = smoke_repae().loop
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


@pytest.mark.slow
def test_training_lowers_reconstruction_and_velocity(tmp_path):
    loop = replace(smoke_repae().loop, num_steps=12, report_every_steps=12, warmup_steps=2)
    stage = make_stage()
    first = stage.report(stage.network, tmp_path, 0)
    train(stage, loop, tmp_path, recipe={})
    last = stage.report(stage.network, tmp_path, 1)
    assert last["psnr_db"] > first["psnr_db"] + 1
    assert last["val_velocity"] < first["val_velocity"]
