"""Precomputed features: widths, files, scales."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cytosyn_aug.model.conditions import FeatureTable, read_conditions
from tests.support.synthetic import synthetic_tiles

RAW = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["tensor", "array", "npy", "safetensors"])
def test_every_form_gives_the_same(tmp_path, form):
    np.save(tmp_path / "f.npy", RAW.numpy())
    save_file({"cls": RAW, "coords": torch.zeros(5, 2)}, tmp_path / "f.safetensors")
    forms = {
        "tensor": RAW,
        "array": RAW.numpy().astype(np.float64),
        "npy": tmp_path / "f.npy",
        "safetensors": str(tmp_path / "f.safetensors"),
    }
    assert torch.equal(read_conditions(forms[form], 8), RAW)


def test_of_cls_and_mean_the_cls_half_is_kept():
    both = torch.cat([RAW, 7 * torch.ones(5, 8)], 1)
    assert torch.equal(read_conditions(both, 8), RAW)


def test_the_null_condition_passes():
    assert not read_conditions(torch.zeros(2, 8), 8).any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (RAW[:, :7], r"shape \[5, 7\], expected \[N, 8\]"),
        (RAW[0], "shape"),
        (RAW[:0], "shape"),
        (RAW * float("nan"), "not finite"),
        (torch.nn.functional.normalize(RAW), "L2-normalised"),
        (RAW * 1e4, "root mean square"),
        (RAW * 1e-4, "root mean square"),
    ],
)
def test_unfit_conditions_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        read_conditions(bad, 8)


def test_a_tile_that_the_encoder_failed_on_costs_no_other():
    given = RAW.clone()
    given[1, 3] = float("nan")
    found = read_conditions(given, 8, len(given))
    assert found.isfinite().all(1).tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match="not finite"):
        FeatureTable(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), given, width=8)


def test_unfit_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_conditions(tmp_path / "none.npy", 8)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not an array of numbers"):
        read_conditions(tmp_path / "objects.npy", 8)
    save_file({"a": RAW, "b": RAW.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\]"):
        read_conditions(tmp_path / "two.safetensors", 8)
    (tmp_path / "f.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"neither .npy nor .safetensors"):
        read_conditions(tmp_path / "f.csv", 8)


def test_a_table_finds_features_by_pixels_in_any_order():
    tiles = synthetic_tiles(5)
    table = FeatureTable(tiles, RAW, width=8)
    order = [3, 0, 3, 4]
    assert torch.equal(table(tiles[order]), RAW[order])


@pytest.mark.parametrize(
    "given",
    [RAW[:, None].expand(5, 257, 8).clone()[:, 0], torch.cat([RAW, RAW], 1), RAW.clone()],
    ids=["first of all tokens", "CLS and mean", "CLS"],
)
def test_a_table_holds_its_vectors_and_nothing_they_are_views_of(given):
    table = FeatureTable(synthetic_tiles(5), given, width=8)
    assert torch.equal(table.cls, RAW)
    assert table.cls.untyped_storage().nbytes() == RAW.numel() * 4
    assert len(pickle.dumps(table)) < 5 * (8 * 4 + 64 + 8) + 1000  # vectors, keys, rows
    given.zero_()
    assert torch.equal(table.cls, RAW)


def test_a_table_names_the_tiles_it_does_not_know():
    tiles = synthetic_tiles(5)
    table = FeatureTable(tiles, RAW, width=8)
    changed = tiles.clone()
    changed[1, 0, 0, 0] ^= 1
    changed[4] = tiles[4].flip(2)
    with pytest.raises(ValueError, match=r"tiles \[1, 4\] of 5 are not among the 5 .*flipped"):
        table(changed)


def test_a_table_needs_as_many_rows_as_tiles():
    with pytest.raises(ValueError, match="5 rows of features for 4 tiles"):
        FeatureTable(synthetic_tiles(4), RAW, width=8)


def test_a_double_vector_of_unit_length_is_refused_before_it_is_cut():
    both = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(both, dim=1)
    with pytest.raises(ValueError, match="L2-normalised"):
        read_conditions(unit, 8)
