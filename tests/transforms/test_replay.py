"""ReplayBank: variants are made when they must be, used as often as said, and cost as said."""

import errno
import itertools
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosyn_aug import (
    ConditionedResample,
    MacenkoNormalize,
    MacenkoReference,
    StainReference,
    StainTransfer,
    StainViews,
)
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.transforms.replay import ReplayBank, ReplayCounts
from cytosyn_aug.transforms.schedules import Ramp
from cytosyn_aug.transforms.variants import run_edit


@pytest.fixture(scope="module")
def generator(model_folder):
    return TileGenerator.from_pretrained(model_folder)


class Edits:
    """Latents that say which call and row made them."""

    def __init__(self, generator):
        self.shape, self.sizes = generator.latent_shape, []

    def __call__(self, images, seeds):
        assert len(images) == len(seeds)
        self.sizes.append(len(images))
        return torch.full((len(images), *self.shape), float(len(self.sizes)))


def bank_of(generator, num_tiles=4, **settings):
    edits = Edits(generator)
    settings = {"p": 1.0} | settings
    return ReplayBank(generator, edits, num_tiles=num_tiles, **settings), edits


def test_a_variant_is_used_reuse_times_and_then_made_anew(generator, tiles):
    bank, edits = bank_of(generator, reuse=3)
    seen = [bank(tiles[:2], torch.tensor([0, 1])) for _ in range(7)]
    assert edits.sizes == [2, 2, 2]  # in calls 1, 4 and 7
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[5])
    assert bank.counts == ReplayCounts(num_made=6, num_reused=8, num_kept=0, num_failed=0)


def test_what_is_reused_is_what_was_made(generator, tiles):
    """Up to the float16 that slots hold, whatever the place in the batch."""
    latents = torch.randn(4, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    bank = ReplayBank(generator, lambda x, seeds: latents, num_tiles=9, p=1.0, reuse=9)
    bank(tiles[:4], torch.tensor([3, 1, 8, 0]))
    again = bank(tiles[:4], torch.tensor([0, 8, 1, 3]))
    expected = generator.decode(latents.half().float()[[3, 2, 1, 0]], is_few_step=True)
    assert torch.equal(again, expected)


def test_old_variants_are_made_anew(generator, tiles):
    bank, edits = bank_of(generator, reuse=100, max_age=2)
    for _ in range(7):
        bank(tiles[:1], torch.tensor([0]))
    assert edits.sizes == [1, 1, 1]  # in calls 1, 4 and 7


def test_a_tile_twice_in_a_batch_is_made_once_and_used_twice(generator, tiles):
    bank, edits = bank_of(generator, reuse=2)
    images = bank(tiles[:1].repeat(2, 1, 1, 1), torch.tensor([2, 2]))
    assert edits.sizes == [1]
    assert (images[0].int() - images[1].int()).abs().max() <= 1
    bank(tiles[:1], torch.tensor([2]))
    assert edits.sizes == [1, 1]


def test_no_variant_is_used_more_often_than_said_within_a_batch_either(generator, tiles):
    bank, edits = bank_of(generator, reuse=2)
    images = bank(tiles[:1].repeat(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64))
    assert edits.sizes == [1, 1, 1]
    # Equal latents in other rows of a batch may round to other pixels by one grey level.
    apart = [int((a.int() - b.int()).abs().max()) for a, b in itertools.pairwise(images)]
    assert [step > 1 for step in apart] == [False, True, False, True]
    bank(tiles[:1].repeat(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64))
    assert edits.sizes == [1, 1, 1, 1]  # one use of the third was left
    assert bank.counts == ReplayCounts(num_made=4, num_reused=3, num_kept=0, num_failed=0)


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**31))
def test_tiles_that_are_not_drawn_come_back_and_the_counts_add_up(reuse, p, seed):
    from tests.support.synthetic import random_parts, synthetic_tiles

    generator = TileGenerator(random_parts())
    bank, edits = bank_of(generator, num_tiles=3, p=p, reuse=reuse)
    tiles = synthetic_tiles(3, seed=0)
    torch.manual_seed(seed)
    num_drawn = 0
    for _ in range(4):
        images = bank(tiles, torch.arange(3))
        num_drawn += int((images != tiles).flatten(1).any(1).sum())
    counts = bank.counts
    assert counts.num_made == sum(edits.sizes)
    assert counts.num_made + counts.num_reused == num_drawn
    assert num_drawn <= reuse * counts.num_made


def test_a_ramp_replaces_more_tiles_by_epoch(generator, tiles):
    bank, edits = bank_of(generator, p=Ramp(0.0, 1.0, 3), reuse=1)
    for epoch, num_made in ((0, 0), (2, 4)):
        bank.set_epoch(epoch)
        bank(tiles, torch.arange(4))
        assert sum(edits.sizes) == num_made
        assert bank.seconds_per_step(4, make=1.0, decode=0.0) == num_made


def test_draws_repeat_under_a_seed(generator, tiles):
    seen = []
    for _ in range(2):
        bank, _ = bank_of(generator, num_tiles=8, p=0.5, reuse=1)
        torch.manual_seed(4)
        seen.append(bank(tiles[:4], torch.arange(4)))
    assert torch.equal(*seen)


def test_tiles_that_the_edit_left_alone_keep_their_bits(generator, tiles):
    def invert_the_first(images, seeds):
        return torch.cat([255 - images[:1], images[1:]])

    bank = ReplayBank(generator, invert_the_first, num_tiles=4, p=1.0, reuse=5)
    images = bank(tiles[:3], torch.arange(3))
    assert not torch.equal(images[0], tiles[0])
    assert torch.equal(images[1:], tiles[1:3])
    assert bank.counts == ReplayCounts(num_made=3, num_reused=0, num_kept=2, num_failed=0)
    moved = generator.whiten(generator.encode(255 - tiles[:1]).mean).half().float()
    assert torch.equal(images[:1], generator.decode(moved, is_few_step=True))


def test_a_tile_that_fails_comes_back_counted_named_once_and_is_tried_again(generator, tiles):
    calls = []

    def fail_on_the_second(images, seeds):
        latents = torch.zeros(len(images), *generator.latent_shape)
        latents[1:2] = (float("nan"), 1e6)[len(calls) % 2]  # 1e6 is no float16
        calls.append(len(images))
        return latents

    bank = ReplayBank(generator, fail_on_the_second, num_tiles=4, p=1.0, reuse=2)
    with pytest.warns(RuntimeWarning, match="tile 1 of the data set is not finite"):
        images = bank(tiles[:3], torch.arange(3))
    assert torch.equal(images[1], tiles[1])
    assert (images[::2] != tiles[:3:2]).flatten(1).any(1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank(tiles[:3], torch.arange(3))
    assert calls == [3, 1]
    # Alone in the second call, it is the first of its batch and does not fail.
    assert bank.counts == ReplayCounts(num_made=4, num_reused=2, num_kept=0, num_failed=1)


def test_a_variant_that_cannot_be_decoded_empties_its_slot(model_folder, tiles, monkeypatch):
    generator = TileGenerator.from_pretrained(model_folder, batch_size=3)
    bank, edits = bank_of(generator, reuse=9)
    bank(tiles[:2], torch.arange(2))
    decode = generator.decode_pixels

    def broken(latents, **options):
        pixels = decode(latents, **options)
        pixels[1] = float("inf")
        return pixels

    monkeypatch.setattr(generator, "decode_pixels", broken)
    with pytest.warns(RuntimeWarning, match="tile 1 of"):
        images = bank(tiles[:2], torch.arange(2))
    assert torch.equal(images[1], tiles[1])
    assert not torch.equal(images[0], tiles[0])
    monkeypatch.undo()
    bank(tiles[:2], torch.arange(2))
    assert edits.sizes == [2, 1]
    assert bank.counts == ReplayCounts(num_made=3, num_reused=2, num_kept=0, num_failed=1)


def test_blank_tiles_are_kept_and_never_given_to_the_edit(generator, tiles):
    mixed = tiles.clone()
    mixed[[0, 2]] = 243
    bank, edits = bank_of(generator, reuse=2)
    for _ in range(2):
        images = bank(mixed, torch.arange(4))
        assert torch.equal(images[::2], mixed[::2])
        assert (images[1::2] != mixed[1::2]).flatten(1).any(1).all()
    assert edits.sizes == [2]
    assert bank.counts == ReplayCounts(num_made=2, num_reused=2, num_kept=4, num_failed=0)


def test_latents_in_a_file_are_those_in_memory(generator, tiles, tmp_path):
    seen = []
    for folder in (None, tmp_path / "bank"):
        bank, _ = bank_of(generator, folder=folder)
        seen.append([bank(tiles[:2], torch.tensor([0, 3])) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_banks_of_one_folder_do_not_touch_each_other_and_leave_nothing(
    generator, tiles, tmp_path, monkeypatch
):
    reserved = []
    fallocate = os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *given: reserved.append(given[1:]) or fallocate(*given)
    )
    banks = [bank_of(generator, folder=tmp_path)[0] for _ in range(2)]
    assert reserved == 2 * [(0, 4 * 2 * torch.Size(generator.latent_shape).numel())]
    first = banks[0](tiles[:1], torch.tensor([0]))
    banks[1].edit = lambda images, seeds: torch.full((1, *generator.latent_shape), -2.0)
    assert not torch.equal(banks[1](tiles[:1], torch.tensor([0])), first)
    assert torch.equal(banks[0](tiles[:1], torch.tensor([0])), first)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_at_once(generator, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for the latents of 4 tiles \(.* bytes\)"):
        bank_of(generator, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cost_of_a_step_is_what_was_counted(generator, tiles):
    """Makes and decodes a step, once every tile has been seen, are those of the formula."""
    bank, edits = bank_of(generator, num_tiles=4, p=1.0, reuse=4)
    for _ in range(8):
        bank(tiles[:4], torch.arange(4))
    made, decoded = sum(edits.sizes) / 8, 4
    assert bank.seconds_per_step(4, make=1.0, decode=0.0) == made
    assert bank.seconds_per_step(4, make=0.0, decode=1.0) == decoded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "reuse", "max_age", "within"),
    [(1.0, 4, 2, 0), (1.0, 4, 10, 0), (1.0, 9, 11, 0), (0.5, 4, None, 0.15), (0.5, 8, 12, 0.15)],
)
def test_age_makes_a_step_dearer_as_the_formula_says(generator, tiles, p, reuse, max_age, within):
    """A tile comes every 4 steps, so a variant of age 10 has seen two chances of being reused."""
    bank, edits = bank_of(generator, num_tiles=8, p=p, reuse=reuse, max_age=max_age)
    torch.manual_seed(0)
    num_steps = 0
    for _ in range(36):
        for step in range(4):
            bank(tiles[:2], torch.tensor([2 * step, 2 * step + 1]))
            num_steps += 1
    expected = bank.seconds_per_step(2, make=1.0, decode=0.0)
    assert sum(edits.sizes) / num_steps == pytest.approx(expected, rel=within + 1e-6)
    assert bank.seconds_per_step(2, make=0.0, decode=1.0) == p * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"p": 1.5}, "p is 1.5"), ({"reuse": 0}, "reuse 0"), ({"max_age": -1}, "max_age -1")],
)
def test_numbers_out_of_range_are_named(generator, changes, message):
    with pytest.raises(ValueError, match=message):
        bank_of(generator, **changes)


def test_transforms_serve_as_edits(generator, tiles):
    """As in `fill_variants`: every tile is edited, whatever p, by its own seed."""
    transfer = StainTransfer(generator, [StainReference.fit(generator, 255 - tiles // 2)], p=0.0)
    bank = ReplayBank(generator, transfer, num_tiles=4, p=1.0)
    state = torch.get_rng_state()
    images = bank(tiles, torch.arange(4))
    assert (images != tiles).flatten(1).any(1).all()
    assert bank.counts == ReplayCounts(num_made=4, num_reused=0, num_kept=0, num_failed=0)
    torch.set_rng_state(state)
    made = ReplayBank(
        generator, lambda x, seeds: run_edit(transfer, x, seeds).results, num_tiles=4, p=1.0
    )
    assert torch.equal(made(tiles, torch.arange(4)), images)


def test_the_epoch_of_a_bank_is_that_of_its_edit(generator, tiles):
    edit = MacenkoNormalize(MacenkoReference.fit(255 - tiles // 2), strength=Ramp(0.0, 1.0, 2))
    bank = ReplayBank(generator, edit, num_tiles=4, p=1.0)
    for epoch, num_kept in ((0, 4), (1, 4)):
        bank.set_epoch(epoch)
        bank(tiles, torch.arange(4))
        assert bank.counts.num_kept == num_kept


def test_tiles_that_a_transform_failed_on_count_as_failed_and_refused_ones_as_kept(
    model_folder, tiles, monkeypatch
):
    generator = TileGenerator.from_pretrained(model_folder)
    transform = ConditionedResample(generator, steps=2)
    draw = generator.draw

    def broken(*arguments, **options):
        latents = draw(*arguments, **options)
        latents[0] = torch.nan
        return latents

    monkeypatch.setattr(generator, "draw", broken)
    bank = ReplayBank(generator, transform, num_tiles=4, p=1.0)
    with pytest.warns(RuntimeWarning, match="tile 0 of the data set is not finite"):
        images = bank(tiles[:2], torch.arange(2))
    assert torch.equal(images[0], tiles[0])
    assert bank.counts == ReplayCounts(num_made=2, num_reused=0, num_kept=0, num_failed=1)
    monkeypatch.undo()
    refusing = ConditionedResample(generator, steps=2, min_similarity=0.9999)
    bank = ReplayBank(generator, refusing, num_tiles=4, p=1.0)
    bank(tiles[:2], torch.arange(2))
    assert bank.counts == ReplayCounts(num_made=2, num_reused=0, num_kept=2, num_failed=0)


def test_edits_that_no_bank_can_run_are_refused_at_once(generator, tiles):
    reference = StainReference.fit(generator, tiles, laboratory="a")
    for drawn in ({"mode": "slide"}, {"sampling": "own_excluded"}):
        transfer = StainTransfer(generator, [reference], **drawn)
        with pytest.raises(ValueError, match="the edit, a StainTransfer, draws by slide or lab"):
            ReplayBank(generator, transfer, num_tiles=4)
    for wrong in ([StainTransfer(generator, [reference])], reference):
        with pytest.raises(TypeError, match=f"edit is a {type(wrong).__name__}, expected a trans"):
            ReplayBank(generator, wrong, num_tiles=4)
    views = StainViews(generator, [reference], has_original=True)
    for wrong in (views, lambda x, seeds: (x, x)):
        bank = ReplayBank(generator, wrong, num_tiles=4, p=1.0)
        with pytest.raises(TypeError, match="gives tuple for a batch, expected a tensor"):
            bank(tiles, torch.arange(4))


@pytest.mark.parametrize(
    "index", [[2, 3], (2, 3), range(2, 4), np.array([2, 3], np.int32), [np.int64(2), 3]]
)
def test_positions_are_whole_numbers_of_any_kind(generator, tiles, index):
    bank, edits = bank_of(generator)
    first = bank(tiles[:2], index)
    assert torch.equal(bank(tiles[:2], torch.tensor([2, 3], dtype=torch.int32)), first)
    assert edits.sizes == [2]


@pytest.mark.parametrize(
    "index", [torch.tensor([0.0, 1.0]), [0.0, 1.0], [True, False], ["a", "b"], [[0], [1]], 1, None]
)
def test_positions_of_another_kind_are_refused(generator, tiles, index):
    bank, _ = bank_of(generator)
    with pytest.raises(TypeError, match="expected 2 positions from 0 to 3, whole numbers"):
        bank(tiles[:2], index)


def test_positions_and_edits_that_do_not_fit_are_named(generator, tiles):
    bank, _ = bank_of(generator)
    with pytest.raises(ValueError, match=r"index is \[0, 4\], expected 2 positions from 0 to 3"):
        bank(tiles[:2], torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="expected 2 positions"):
        bank(tiles[:2], torch.tensor([0]))
    wrong = ReplayBank(generator, lambda x, seeds: x[:, :, :8], num_tiles=2, p=1.0)
    with pytest.raises(ValueError, match=r"expected the same"):
        wrong(tiles[:1], torch.tensor([0]))
    wrong = ReplayBank(generator, lambda x, seeds: torch.zeros(1, 2), num_tiles=2, p=1.0)
    with pytest.raises(ValueError, match=r"the edit gave latents \[1, 2\]"):
        wrong(tiles[:1], torch.tensor([0]))
