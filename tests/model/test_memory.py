"""Memory is counted as written down by hand, grows with the batch, and tells what fits."""

import pytest
import torch
from torch import Tensor

from cytosyn_aug import ConditionedResample, StainReference, StainTransfer, StainViews
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.memory import MemoryPlan, _shadow_of, peak_bytes, plan_memory

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


TRANSFORMS = {
    "colour": lambda g, r: StainTransfer(g, r, p=1.0),
    "farthest": lambda g, r: StainTransfer(g, r, p=1.0, sampling="farthest"),
    "redraw": lambda g, r: StainTransfer(g, r, p=1.0, preserve="none"),
    "resample": lambda g, r: ConditionedResample(g, p=1.0, guidance_scale=2.0),
    "views": lambda g, r: StainViews(g, r),
}


@pytest.mark.slow
@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x / 255], ids=["uint8", "float32"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("num_parts", [1, 8])
def test_transforms_stay_within_the_plan(student_folder, tiles, name, num_parts, convert):
    generator = TileGenerator.from_pretrained(student_folder, batch_size=2)
    references = [StainReference.fit(generator, x) for x in (tiles[:2], tiles[2:])]
    batch = convert(tiles[:2]).repeat(num_parts, 1, 1, 1)
    parts = ("vae", "transformer", "encoder", "stain_probe", "student")
    known = [
        x for part in parts for m in [getattr(generator, part)]
        for x in (*m.parameters(), *m.buffers())
    ]  # fmt: skip
    plan = plan_memory(generator)
    transform = TRANSFORMS[name](generator, references)
    held = 10 if batch.dtype == torch.uint8 else 16
    held += held // 2 * getattr(transform, "views", 0)
    peak = peak_bytes(transform, known, batch)
    assert peak <= plan.total(2) - plan.weights + held * batch.numel()


def test_a_plan_copies_no_weights(generator):
    weights = [*generator.transformer.parameters()]
    shadows = _shadow_of(generator.transformer)
    assert {x.device.type for x in (*shadows.parameters(), *shadows.buffers())} == {"meta"}
    assert {x.device.type for x in weights} == {"cpu"}


@pytest.mark.parametrize("name", ["colour", "views"])
def test_a_change_of_colour_is_the_same_however_the_batch_is_cut(model_folder, tiles, name):
    results = []
    for batch_size in (1, 3, 16):
        generator = TileGenerator.from_pretrained(model_folder, batch_size=batch_size)
        references = [StainReference.fit(generator, x) for x in (tiles[:2], tiles[2:])]
        torch.manual_seed(0)
        made = TRANSFORMS[name](generator, references)(tiles)
        results.append(made if isinstance(made, Tensor) else torch.cat(made))
    assert all((x.int() - results[0].int()).abs().max() <= 1 for x in results)


def test_a_plan_tells_what_fits():
    plan = MemoryPlan(weights=80, per_tile=30, modulation=20)
    assert plan.total(2) == 160
    assert plan.largest_batch(160) == 2
    assert plan.largest_batch(159) == 1
    assert plan.largest_batch(50) == 0
