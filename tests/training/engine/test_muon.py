import torch
from torch import nn

from training.engine.muon import Muon, orthogonalise, split_parameters


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    for shape in ((32, 32), (64, 24), (24, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        # The published quintic ends between about 0.7 and 1.2; random square matrices have a few
        # singular values so close to zero that five steps do not lift them all the way.
        assert values.max() < 1.25
        assert values.median() > 0.65


def test_the_singular_vectors_stay():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(20, 20))
    spread = torch.linspace(0.5, 2.0, 20)
    found = orthogonalise((u * spread) @ v)
    off_diagonal = u.T @ found @ v.T
    off_diagonal.fill_diagonal_(0)
    assert off_diagonal.abs().max() < 1e-4


def test_a_step_has_the_size_of_the_rate_whatever_the_gradient():
    sizes = []
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.zeros(16, 16))
        weight.grad = scale * torch.linalg.qr(torch.randn(16, 16)).Q
        Muon([weight], lr=0.1).step()
        sizes.append(torch.linalg.matrix_norm(weight.detach(), 2).item())
    assert all(0.06 < s < 0.13 for s in sizes)


def test_convolutions_keep_their_shape_and_learn():
    torch.manual_seed(0)
    layer, target = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    optimiser = Muon([layer.weight], lr=0.02)
    x = torch.randn(8, 16, 8, 8)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x).detach()).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


def test_the_layers_at_pixels_and_all_vectors_stay_with_adam():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 3, 3)
    )
    hidden, rest = split_parameters(network)
    assert [id(p) for p in hidden] == [id(network[2].weight)]
    assert len(rest) == 7


def test_frozen_weights_are_in_neither_group():
    layer = nn.Linear(32, 32)
    layer.weight.requires_grad_(False)
    assert split_parameters(layer) == ([], [layer.bias])
