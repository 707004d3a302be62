"""Our VGG and AlexNet against the code of the wheel that their weights come from."""

import importlib
import sys
import types

import pytest
import torch

from training.perception import PerceptualNetwork


@pytest.fixture
def wheel(monkeypatch):
    # The wheel imports these for debugging only, and does not depend on them.
    for name, function in (("IPython", "embed"), ("torchsummary", "summary")):
        stub = types.ModuleType(name)
        setattr(stub, function, lambda: None)
        monkeypatch.setitem(sys.modules, name, stub)
    return importlib.import_module("stlpips_pytorch.stlpips")


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
