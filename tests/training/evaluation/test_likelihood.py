"""The mixture against torch's, its fit against a closed form, and what the divergence detects."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from training.evaluation import likelihood
from training.evaluation.likelihood import Mixture, fit_mixture, likelihood_reference

F64 = torch.float64
WIDTH = 24


def tiles(num, seed):
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(99))
    return torch.randn(num, WIDTH, dtype=F64, generator=draws) @ mix + 5


@pytest.fixture(scope="module")
def reference():
    return likelihood_reference(tiles(600, 0), tiles(300, 1), seed=0)


def test_the_mixture_is_torchs():
    torch.manual_seed(0)
    centres, log_variances = torch.randn(7, 3, dtype=F64), torch.randn(7, dtype=F64)
    scale = (log_variances / 2).exp()[:, None].expand(-1, 3)
    theirs = MixtureSameFamily(
        Categorical(torch.ones(7, dtype=F64)), Independent(Normal(centres, scale), 1)
    )
    points = torch.randn(600, 3, dtype=F64)
    got = Mixture(centres, log_variances).log_likelihood(points)
    torch.testing.assert_close(got, theirs.log_prob(points))


def test_a_centre_at_the_origin_gets_the_variance_of_maximum_likelihood():
    points = 3 * torch.randn(500, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    fitted = fit_mixture(torch.zeros(1, 6, dtype=F64), points)
    best = Mixture(torch.zeros(1, 6, dtype=F64), points.square().mean().log()[None])
    mean = fitted.log_likelihood(points).mean()
    # Fifty steps of Adam leave a thousandth.
    assert float(mean) == pytest.approx(float(best.log_likelihood(points).mean()), rel=1e-3)


def test_the_fit_does_not_depend_on_the_chunk(monkeypatch):
    centres, points = tiles(40, 2), tiles(90, 3)
    whole = fit_mixture(centres, points)
    monkeypatch.setattr(likelihood, "_CHUNK", 13)
    parts = fit_mixture(centres, points)
    torch.testing.assert_close(parts.log_variances, whole.log_variances, rtol=1e-3, atol=1e-3)


def test_as_good_as_training_tiles_is_about_zero(reference):
    fresh = reference.score(tiles(300, 2))
    assert abs(fresh.divergence) < 2
    assert abs(fresh.gap) < 5


@pytest.mark.parametrize(
    "worse",
    [
        pytest.param(lambda x: x + 4, id="shifted"),
        pytest.param(lambda x: 3 * (x - 5) + 5, id="too wide"),
        pytest.param(lambda x: x[:10].repeat(60, 1), id="ten tiles repeated"),
        pytest.param(lambda x: torch.cat([x[:, :12], x[:, :12].flip(0)], 1), id="wrong relations"),
    ],
)
def test_worse_tiles_have_a_larger_divergence(reference, worse):
    good = tiles(600, 2)
    assert reference.score(worse(good)).divergence > reference.score(good).divergence + 2


def test_copies_of_training_tiles_are_detected(reference):
    """They explain training tiles by far too well, and held-out tiles by far too badly."""
    train, fresh = tiles(600, 0), tiles(600, 2)
    noise = 1e-6 * torch.randn(600, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(5))
    copied, honest = reference.score(train + noise), reference.score(fresh)
    assert copied.gap < honest.gap - 100
    assert copied.divergence > honest.divergence + 20
    half = reference.score(torch.cat([train[:300] + noise[:300], fresh[:300]]))
    assert copied.gap < half.gap < honest.gap - 100


def test_the_divergence_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_TILES", 100)  # so that subsets are drawn
    train, test, made = tiles(300, 0), tiles(200, 1), tiles(200, 2)
    first, again, other = (
        likelihood_reference(train, test, seed=seed).score(made) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_features_are_standardised_first():
    train, test, made = tiles(200, 0), tiles(100, 1), tiles(100, 2)
    scale, shift = torch.logspace(-1, 1, WIDTH, dtype=F64), 7.0
    plain = likelihood_reference(train, test).score(made)
    scaled = likelihood_reference(train * scale + shift, test * scale + shift)
    assert scaled.score(made * scale + shift) == pytest.approx(plain, rel=1e-4, abs=1e-3)


def test_too_few_training_tiles_are_refused():
    with pytest.raises(ValueError, match="got 3 training tiles"):
        likelihood_reference(tiles(3, 0), tiles(9, 1))
