"""Micro-batches: the same rows whatever the cut, smaller parts when memory runs out."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosyn_aug.model.batching import MicroBatches
from cytosyn_aug.model.generator import TileGenerator

CPU = torch.device("cpu")


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.booleans())
def test_results_are_put_together_in_order_whatever_the_cut(num_rows, size, is_static):
    seen = []

    def function(x, y):
        seen.append(len(x))
        return x + y, x[:, 0]

    x, y = torch.arange(2 * num_rows).view(-1, 2), torch.ones(num_rows, 2)
    total, first = MicroBatches(CPU, size, is_static).map(function, x, y)
    assert torch.equal(total, x + 1)
    assert torch.equal(first, x[:, 0])
    assert all(n == size if is_static else n <= size for n in seen)


def test_when_memory_runs_out_rows_are_tried_again_in_halves():
    tried = []

    def function(x):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x * 2,)

    batches = MicroBatches(CPU, 8)
    with pytest.warns(UserWarning, match="ran out of memory with 8 tiles.*going on with 4"):
        found = batches.map(function, torch.arange(10))[0]
    assert torch.equal(found, torch.arange(10) * 2)
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert batches.size == 2


def test_what_did_not_fit_is_gone_before_memory_is_given_back(monkeypatch):
    activations = []

    def function(x):
        made = torch.zeros(1000)
        activations.append(weakref.ref(made))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x + made[: len(x)],)

    batches, shrink = MicroBatches(CPU, 4), MicroBatches._shrink

    def give_back(self):
        assert activations[-1]() is None
        shrink(self)

    monkeypatch.setattr(MicroBatches, "_shrink", give_back)
    with pytest.warns(UserWarning, match="ran out of memory"):
        batches.map(function, torch.arange(4))
    assert len(activations) == 3


def test_numbers_are_cut_beside_tensors_and_stay_on_the_host():
    seen = []

    def function(x, seeds):
        seen.append(seeds)
        return (x,)

    MicroBatches(CPU, 2).map(function, torch.arange(5), range(7, 12))
    MicroBatches(CPU, 2, is_static=True).map(function, torch.arange(3), [1, 2, 3])
    assert seen == [[7, 8], [9, 10], [11], [1, 2], [3, 3]]


def test_one_row_that_does_not_fit_is_an_error():
    def function(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches(CPU, 1).map(function, torch.zeros(2))


def test_a_model_that_runs_out_of_memory_gives_the_same_tiles(model_folder, monkeypatch):
    generator = TileGenerator.from_pretrained(model_folder, batch_size=4)
    expected = generator.sample(per_condition=9, steps=3, seed=1)
    forward = generator.transformer.forward_modulated

    def small(x, modulation):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, modulation)

    monkeypatch.setattr(generator.transformer, "forward_modulated", small)
    with pytest.warns(UserWarning, match="batch_size=2"):
        found = generator.sample(per_condition=9, steps=3, seed=1)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert generator.batch_size == 2
