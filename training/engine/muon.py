"""Muon: momentum whose every matrix is orthogonalised before it becomes the step.

For weight matrices and convolutions (flattened to matrices) it reaches a given loss in several
times fewer steps than AdamW here (LOG.md, 2026-11-23), at a cost that does not show beside the
forward pass. Vectors, embeddings and the first and last layers stay with AdamW.

Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks";
Bernstein and Newhouse (2024) for the orthogonalisation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MIN_CHANNELS = 16


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for weights with at least two dimensions.

    Args:
        parameters: Weights; dimensions after the first are flattened.
        lr: Spectral size of a step for square matrices.
        momentum: Decay of the averaged gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                looked_ahead = weight.grad.lerp(average, group["momentum"])
                matrix = looked_ahead.reshape(len(weight), -1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                update = orthogonalise(matrix).reshape(weight.shape)
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the matrix with all singular values moved close to one.

    Five Newton-Schulz iterations with the quintic of Jordan et al., which leaves singular values
    between about 0.7 and 1.2: enough for a step, and matrix products only.

    Args:
        matrix: float [M, N].
        steps: Iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters as (for Muon, for AdamW).

    Muon takes the weights of linear layers and convolutions between at least MIN_CHANNELS
    channels on either side, which leaves out the layers that touch pixels and latents.
    """
    hidden = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and min(module.weight.shape[:2]) >= MIN_CHANNELS
    }
    trained = [p for p in network.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in hidden], [p for p in trained if id(p) not in hidden]
