import torch

from cytosyn_aug.model.solvers import denoised, interpolate, noised, velocity_target


def test_the_path_starts_at_data_and_ends_at_noise():
    x, eps = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(interpolate(x, eps, 0.0), x)
    assert torch.equal(interpolate(x, eps, 1.0), eps)


def test_the_target_velocity_leads_back_to_both_ends():
    x, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None]
    x_t, v = interpolate(x, eps, t), velocity_target(x, eps)
    torch.testing.assert_close(denoised(x_t, v, t), x)
    torch.testing.assert_close(noised(x_t, v, t), eps)
