"""Weights of runs: means of several, and one as it is."""

import torch

from training.weights import mean_weights


def test_the_mean_of_several_runs_lies_between_them():
    one, other = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, -4.0])}
    assert mean_weights([one, other])["w"].tolist() == [0.5, -1.0]


def test_one_run_is_its_own_mean_to_the_bit():
    weights = torch.tensor([-0.0, 1e-8, 3.0], dtype=torch.float16)
    (found,) = mean_weights([{"w": weights}]).values()
    assert found.dtype == weights.dtype
    assert torch.equal(found.view(torch.int16), weights.view(torch.int16))
