"""Feature likelihood divergence: fidelity, diversity and novelty of generated tiles in one number.

Generated tiles are the centres of a mixture of isotropic normal distributions whose variances
are fitted to training tiles; the number is how unlikely held-out tiles are under it. A tile that
copies a training tile gets a tiny variance and then explains nothing that is held out.

Source: Jiralerspong et al. (2023), "Feature Likelihood Divergence", section 3, written from the
paper. Deviations: subsets are seeded; the fit takes the whole training set in each of its steps
and keeps the best one; features that hardly vary are not blown up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.evaluation.metrics import checked, spreads

MAX_TILES = 10_000
NUM_STEPS = 50
LEARNING_RATE = 0.5
_LOG_VARIANCE_LIMIT = 40.0
_CHUNK = 512


class FeatureLikelihood(NamedTuple):
    """How a set of generated tiles explains held-out ones.

    Attributes:
        divergence: 100 times the negative log-likelihood of held-out tiles a feature, less that
            under training tiles; about 0 for tiles as good as training tiles, higher is worse.
        gap: 100 times (that of training tiles - that of held-out tiles) a feature; negative when
            training tiles are likelier. Compare with the gap of real tiles that were not trained
            on, because the two sets may show different tissue.
    """

    divergence: float
    gap: float


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Equal shares of isotropic normal distributions, one a centre.

    Attributes:
        centres: float64 [M, F].
        log_variances: float64 [M].
    """

    centres: Tensor
    log_variances: Tensor

    def log_likelihood(self, points: Tensor) -> Tensor:
        """Return the log density of points [N, F], float64 [N]."""
        width = points.shape[1]
        parts = (_squared_distances(rows, self.centres) for rows in points.split(_CHUNK))
        return torch.cat([_log_density(part, self.log_variances, width) for part in parts])


@dataclass(frozen=True, slots=True, eq=False)
class LikelihoodReference:
    """Training and held-out tiles, standardised, and what any generated set is compared with.

    Attributes:
        train: float64 [N, F], standardised.
        test: float64 [M, F], standardised by its own mean and deviation.
        shift: Mean of the held-out tiles, float64 [F].
        spread: Their standard deviation, float64 [F].
        baseline: Mean log density of `test` when half of `train` stands for generated tiles.
        seed: Seed of all draws.
    """

    train: Tensor
    test: Tensor
    shift: Tensor
    spread: Tensor
    baseline: float
    seed: int

    def score(self, generated: Tensor) -> FeatureLikelihood:
        """Return divergence and gap of generated tiles, features [K, F]."""
        centres = (_subset(generated, self.seed) - self.shift) / self.spread
        mixture = fit_mixture(centres, self.train)
        of_test, of_train = (
            float(mixture.log_likelihood(x).mean()) for x in (self.test, self.train)
        )
        scale = 100 / self.test.shape[1]
        return FeatureLikelihood(scale * (self.baseline - of_test), scale * (of_test - of_train))


def likelihood_reference(train: Tensor, test: Tensor, *, seed: int = 0) -> LikelihoodReference:
    """Return what `LikelihoodReference.score` needs of the real tiles, once for all sets.

    Args:
        train: [N, F] features of training tiles; at most MAX_TILES random ones are used.
        test: [M, F] features of tiles of patients that are not in `train`; likewise.
        seed: Seed of the subsets and of the halves of `train`.

    Raises:
        ValueError: See `training.evaluation.metrics.checked`, or fewer than 4 training tiles.
    """
    if len(train) < 4:
        raise ValueError(f"got {len(train)} training tiles, expected at least 4; give more")
    held_out = _subset(test, seed)
    shift, spread = held_out.mean(0), spreads(held_out)
    x_train, x_test = (_subset(train, seed) - shift) / spread, (held_out - shift) / spread
    # The subset is in random order, so its halves are random too.
    half = len(x_train) // 2
    stand_in = fit_mixture(x_train[:half], x_train[half:])
    baseline = float(stand_in.log_likelihood(x_test).mean())
    return LikelihoodReference(x_train, x_test, shift, spread, baseline, seed)


def fit_mixture(centres: Tensor, points: Tensor, num_steps: int = NUM_STEPS) -> Mixture:
    """Return the mixture over `centres` [M, F] and the origin whose variances suit `points`.

    The origin is one more centre, so that no point is infinitely unlikely. Variances start at the
    squared distance to the nearest point, a feature, and follow Adam on the log-likelihood.

    Args:
        centres: float64 [M, F], standardised.
        points: float64 [N, F], standardised.
        num_steps: Steps of Adam.
    """
    width = points.shape[1]
    centres = torch.cat([centres, torch.zeros(1, width, dtype=centres.dtype)])
    # Exact in float64; float32 then keeps the ratios that matter, at half the memory.
    squared = torch.cat(
        [_squared_distances(rows, centres).float() for rows in points.split(_CHUNK)]
    )
    limit = _LOG_VARIANCE_LIMIT
    start = (squared.amin(0) / width).log().clamp(-limit, limit)
    log_variances = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([log_variances], lr=LEARNING_RATE)
    best, best_loss = start, math.inf
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss = 0.0
        for rows in squared.split(_CHUNK):
            part = -_log_density(rows, log_variances, width).sum() / len(points)
            part.backward()
            loss += part.item()
        if loss < best_loss:
            best, best_loss = log_variances.detach().clone(), loss
        optimiser.step()
        with torch.no_grad():
            log_variances.clamp_(-limit, limit)
    return Mixture(centres, best.double())


def _log_density(squared: Tensor, log_variances: Tensor, width: int) -> Tensor:
    """Return log densities [N] from squared distances [N, M] to the centres."""
    scaled = squared * torch.exp(-log_variances)
    each = -0.5 * (scaled + width * (log_variances + math.log(2 * math.pi)))
    return each.logsumexp(1) - math.log(squared.shape[1])


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    # From differences: products would lose the distance of near-duplicates.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def _subset(features: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return checked(features)[order[:MAX_TILES]]
