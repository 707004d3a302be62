"""Memory is counted as written down by hand, grows with the batch, and tells what fits."""

import pytest
import torch

from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.memory import MemoryPlan, peak_bytes, plan_memory

KB = 1024


def numbers(count, device="meta"):
    return torch.zeros(count, device=device)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_chain_holds_two_links_at_a_time(device):
    def chain(x):
        for _ in range(5):
            x = x + 1
        return x

    x = numbers(KB, device)  # 4 kB, and held by the caller throughout
    assert peak_bytes(chain, [], x) == 3 * 4 * KB


def test_what_is_kept_counts_until_it_is_dropped():
    def keep(x):
        a = x + 1
        b = x + 2
        c = a + b
        del a, b
        return c.repeat(2)

    assert peak_bytes(keep, [], numbers(KB)) == 4 * 4 * KB


def test_views_and_known_tensors_cost_nothing():
    weight = torch.zeros(KB, KB, device="meta")
    assert peak_bytes(lambda x: weight.t()[:1].T, [weight], numbers(KB)) == 4 * KB


def test_an_operation_in_place_costs_nothing():
    assert peak_bytes(lambda x: x.add_(1), [], numbers(KB)) == 4 * KB


@pytest.fixture(scope="module")
def generator(model_folder):
    return TileGenerator.from_pretrained(model_folder)


def test_activations_grow_with_the_batch(generator):
    decoder = generator.vae.decoder.to("meta")
    known = list(decoder.parameters())
    one, four = (
        peak_bytes(decoder, known, torch.zeros(n, *generator.latent_shape, device="meta"))
        for n in (1, 4)
    )
    assert 3.9 * one < four <= 4.0 * one


def test_shorter_numbers_need_half_of_it(model_folder):
    whole, half = (
        plan_memory(TileGenerator.from_pretrained(model_folder, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.weights == whole.weights // 2
    assert half.per_tile < 0.75 * whole.per_tile


def test_a_plan_tells_what_fits():
    plan = MemoryPlan(weights=100, per_tile=30)
    assert plan.total(2) == 160
    assert plan.largest_batch(160) == 2
    assert plan.largest_batch(159) == 1
    assert plan.largest_batch(50) == 0
