"""Losses, one citation each. Pure functions of tensors; networks are passed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(N(mean, std^2) || N(0, 1)), summed over a sample, averaged over the batch.

    Source: Kingma and Welling (2014), appendix B; the summation is REPA-E's.
    """
    per_element = 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log())
    return per_element.flatten(1).sum(1).mean()


def pooled_colour(pixels: Tensor, target: Tensor, size_px: int = 8) -> Tensor:
    """Return the mean absolute error after averaging over size_px x size_px squares.

    Stain is low-frequency colour; plain L1 lets a small VAE trade it for texture.
    """
    return (F.avg_pool2d(pixels, size_px) - F.avg_pool2d(target, size_px)).abs().mean()


def alignment(projected: Tensor, target: Tensor) -> Tensor:
    """Return minus the mean cosine similarity of tokens [B, N, D].

    Computed in float32: normalising in half precision gives NaN.

    Source: Yu et al. (2025), REPA, eq. 8.
    """
    similarity = F.cosine_similarity(projected.float(), target.float(), dim=-1)
    return -similarity.mean()


def velocity_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a velocity. Source: Ma et al. (2024), SiT, eq. 10."""
    return (predicted.float() - target.float()).square().mean()


def standardised_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of predicted statistics, already scaled to unit variance."""
    return torch.mean((predicted.float() - target.float()).square())


def cauchy_error(predicted: Tensor, target: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean over a batch of log(1 + e / s) + log(s) / 2, e the squared error of a row.

    The likelihood of a Cauchy distribution: a row weighs 1 / (e + s) in the gradient, so that the
    few rows of a bootstrapped target that are far off do not rule the batch. A trained s settles
    near the median of e and evens out times that are easy and hard.

    Args:
        predicted: [B, ...].
        target: Shape of `predicted`.
        log_scale: log s [B].

    Source: Lee et al. (2025), Decoupled MeanFlow, whose log(e / s + 0.01) + log(s) falls without
    end in s when trained: here log(s) has the weight of the distribution's normalisation.
    """
    error = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return (torch.log1p(error * torch.exp(-log_scale)) + log_scale / 2).mean()
