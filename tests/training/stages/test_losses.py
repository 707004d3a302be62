import pytest
import torch
from torch.distributions import Normal, kl_divergence

from training.stages.losses import alignment, kl_to_standard_normal, pooled_colour, velocity_error


def test_kl_is_torchs():
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    want = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, std), want)


def test_pooled_colour_ignores_texture_and_sees_colour():
    a = torch.rand(1, 3, 16, 16)
    assert pooled_colour(a, a.flip(3).flip(3).roll(0)).item() == 0
    texture = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 1, 16).expand(1, 3, 16, 16)
    assert pooled_colour(a + texture, a).item() == pytest.approx(0, abs=1e-6)
    assert pooled_colour(a + 0.25, a).item() == pytest.approx(0.25)


def test_alignment_is_minus_the_cosine_and_survives_half_precision():
    tokens = torch.randn(2, 5, 8)
    assert alignment(tokens, 3 * tokens).item() == pytest.approx(-1)
    assert alignment(tokens, -tokens).item() == pytest.approx(1)
    assert torch.isfinite(alignment((tokens * 1e-4).half(), tokens.half()))


def test_velocity_error_is_the_mean_square():
    assert velocity_error(torch.zeros(2, 2), torch.full((2, 2), 3.0)).item() == 9
