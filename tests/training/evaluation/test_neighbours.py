"""Neighbours on hand-made sets, and against the packages of the metrics' authors."""

import pytest
import torch

from tests.training.evaluation.test_metrics import reference_sets
from training.evaluation import neighbours
from training.evaluation.neighbours import (
    manifold_scores,
    nearest_neighbours,
    nearness,
    neighbour_radii,
)

F64 = torch.float64


def line(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def test_radii_are_distances_to_the_kth_other_tile():
    x = line(0, 1, 3, 7)
    assert neighbour_radii(x, 1).tolist() == [1, 1, 2, 4]
    assert neighbour_radii(x, 2).tolist() == [3, 2, 3, 6]


def test_manifold_scores_of_a_set_worked_out_by_hand():
    """One neighbour: real balls (-1, 1), (0, 2), (8, 12) and (8, 12); fake (-2.5, 3.5) twice ..."""
    real = line(0, 1, 10, 12)  # radii 1, 1, 2, 2
    fake = line(0.5, 3.5, 20)  # radii 3, 3, 16.5
    scores = manifold_scores(real, fake, num_neighbours=1)
    assert scores.precision == pytest.approx(1 / 3)  # only 0.5 lies in a real ball
    # 0 and 1 are within 3 of 0.5; 10 and 12 within 16.5 of 20.
    assert scores.recall == 1
    assert scores.density == pytest.approx(2 / 3)  # 0.5 lies in two balls
    assert scores.coverage == pytest.approx(2 / 4)  # the balls of 0 and 1


def test_identical_sets_score_one():
    x = torch.randn(60, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    scores = manifold_scores(x, x)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    # Each ball holds its centre and the four that are nearer than the fifth.
    assert scores.density == pytest.approx(1)


def test_disjoint_sets_score_zero():
    x = torch.randn(60, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert tuple(manifold_scores(x, x + 100)) == (0, 0, 0, 0)


def test_a_lost_mode_lowers_recall_and_coverage_but_not_precision():
    draws = torch.Generator().manual_seed(0)
    modes = torch.tensor([0.0, 50.0], dtype=F64).repeat(100)[:, None]

    def noise():
        return torch.randn(200, 3, dtype=F64, generator=draws)

    real = noise() + modes
    both = manifold_scores(real, noise() + modes)
    one = manifold_scores(real, noise())
    assert both.recall > 0.9
    assert both.coverage > 0.9
    assert one.recall == pytest.approx(0.5, abs=0.06)
    assert one.coverage == pytest.approx(0.5, abs=0.06)
    assert one.precision >= both.precision - 0.05


def test_scores_do_not_depend_on_the_chunk(monkeypatch):
    x, y = reference_sets()
    whole = manifold_scores(x, y)
    found = nearest_neighbours(x, y)
    monkeypatch.setattr(neighbours, "_CHUNK", 37)
    assert manifold_scores(x, y) == whole
    torch.testing.assert_close(nearest_neighbours(x, y), found, rtol=0, atol=0)


def test_scores_are_those_recorded_from_prdc():
    """Of prdc 0.2 with nearest_k=5."""
    scores = manifold_scores(*reference_sets())
    assert scores.precision == pytest.approx(0.6384615384615384)
    assert scores.recall == pytest.approx(0.9833333333333333)
    assert scores.density == pytest.approx(0.43153846153846154)
    assert scores.coverage == pytest.approx(0.7833333333333333)


@pytest.mark.parametrize("num_neighbours", [1, 3, 10])
def test_scores_are_prdcs(num_neighbours):
    prdc = pytest.importorskip("prdc", reason="prdc is absent: only recorded numbers were compared")
    x, y = reference_sets()
    theirs = prdc.compute_prdc(x.numpy(), y.numpy(), num_neighbours)
    ours = manifold_scores(x, y, num_neighbours=num_neighbours)
    assert ours._asdict() == pytest.approx({k: float(v) for k, v in theirs.items()})


def test_precision_and_recall_are_torch_fidelitys():
    prc = pytest.importorskip(
        "torch_fidelity.metric_prc", reason="torch-fidelity is absent: only prdc was compared"
    )
    x, y = reference_sets()
    theirs = prc.prc_features_to_metric(y, x, prc_neighborhood=3, verbose=False)
    ours = manifold_scores(x, y, num_neighbours=3)
    assert ours.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], rel=1e-6)


def test_near_duplicates_far_from_the_origin_keep_their_distance():
    """Distances from products round this one to zero."""
    bank = 1e4 + torch.randn(50, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    step = 1e-7 * bank.std(0) * 8**0.5
    distance, index = nearest_neighbours(bank[[3]] + step / 8**0.5, bank)
    assert index.item() == 3
    assert distance.item() == pytest.approx(1e-7, rel=1e-3)


def test_copies_of_training_tiles_are_nearer_than_held_out_tiles():
    draws = torch.Generator().manual_seed(0)
    train, held_out, fresh = (torch.randn(300, 6, dtype=F64, generator=draws) for _ in range(3))
    real = nearest_neighbours(held_out, train)[0]
    novel = nearness(nearest_neighbours(fresh, train)[0], real)
    copied = nearness(nearest_neighbours(train[:50] + 0.01, train)[0], real)
    assert novel.ratio == pytest.approx(1, abs=0.1)
    assert novel.closer_share < 0.05
    assert copied.ratio < 0.05
    assert copied.closer_share == 1


def test_a_channel_that_is_dead_in_training_tiles_does_not_outvote_the_rest():
    draws = torch.Generator().manual_seed(0)
    bank, query = (torch.randn(n, 100, dtype=F64, generator=draws) for n in (300, 20))
    whole = nearest_neighbours(query, bank)[0]
    bank[:, :60] = 0  # more than half, as in AlexNet
    bank[3, 7] = 1e-4
    dead = nearest_neighbours(query, bank)[0]
    assert (dead / whole).max() < 200  # deviations are at most 100-fold; else 1e5


def test_too_few_tiles_for_the_neighbours_are_refused():
    with pytest.raises(ValueError, match="got 5 tiles for 5 neighbours"):
        neighbour_radii(torch.randn(5, 2), 5)
