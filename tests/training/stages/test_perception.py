"""Our VGG and AlexNet against the code of the wheel that their weights come from."""

import importlib
import sys
import types

import pytest
import torch

from training.stages.perception import PerceptualNetwork, texture_distance


@pytest.fixture
def wheel(monkeypatch):
    # The wheel imports these for debugging only, and does not depend on them.
    for name, function in (("IPython", "embed"), ("torchsummary", "summary")):
        stub = types.ModuleType(name)
        setattr(stub, function, lambda: None)
        monkeypatch.setitem(sys.modules, name, stub)
    return importlib.import_module("stlpips_pytorch.stlpips")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg", "alex"])
def test_distances_are_the_wheels(wheel, name):
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    theirs = wheel.LPIPS(net=name, variant="shift_tolerant", verbose=False)
    got = PerceptualNetwork(name).distance(a, b)
    with torch.no_grad():
        torch.testing.assert_close(got, theirs(a, b).flatten(), rtol=1e-4, atol=1e-5)


def test_a_tile_is_at_distance_zero_from_itself():
    x = torch.rand(1, 3, 64, 64)
    assert PerceptualNetwork("alex").distance(x, x).item() == 0


def test_texture_distance_ignores_where_texture_lies():
    torch.manual_seed(0)
    map_ = torch.rand(2, 5, 8, 8)
    shuffled = map_.flatten(2)[:, :, torch.randperm(64)].unflatten(2, (8, 8))
    torch.testing.assert_close(texture_distance([map_], [shuffled]), torch.zeros(2))


def test_texture_distance_of_half_the_texture_is_one_fifth():
    map_ = torch.rand(2, 5, 8, 8) + 1
    # 1 - 2 x (x / 2) / (x^2 + x^2 / 4) = 1 / 5, whatever x is.
    torch.testing.assert_close(texture_distance([map_], [map_ / 2]), torch.full((2,), 0.2))
