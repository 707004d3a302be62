import torch

from cytosyn_aug.model.encoder import StainProbe
from cytosyn_aug.stain.density import moment_statistics, moments_from_statistics


def test_the_probe_answers_in_units_of_density():
    probe = StainProbe(conditioning_dim=4)
    probe.shift.fill_(0.5)
    probe.scale.fill_(0.1)
    cls = torch.randn(3, 4)
    torch.testing.assert_close(
        probe.statistics(cls), (probe(cls).double() * 0.1 + 0.5), atol=1e-7, rtol=1e-6
    )


def test_nine_statistics_hold_the_moments_exactly():
    a = torch.randn(5, 3, 3, dtype=torch.float64)
    mean, covariance = torch.rand(5, 3, dtype=torch.float64), a @ a.transpose(1, 2)
    back = moments_from_statistics(moment_statistics(mean, covariance))
    torch.testing.assert_close(back.mean, mean)
    torch.testing.assert_close(back.covariance, covariance)


def test_statistics_scale_with_optical_density():
    """Twice the stain is twice the statistics, so that averaging them is meaningful."""
    a = torch.randn(2, 3, 3, dtype=torch.float64)
    mean, covariance = torch.rand(2, 3, dtype=torch.float64), a @ a.transpose(1, 2)
    torch.testing.assert_close(
        moment_statistics(2 * mean, 4 * covariance), 2 * moment_statistics(mean, covariance)
    )
