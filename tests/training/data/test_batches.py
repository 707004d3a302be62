import numpy as np
import pytest
import torch
from PIL import Image

from training.data.batches import (
    Batches,
    change_stain,
    crop_and_turn,
    draw_views,
    evenly_spaced,
    load_tiles,
    stain_maps,
    step_generator,
)


def write_tile(file, size=16, value=100):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file)


def test_tiles_are_read_by_slide_in_sorted_order(tmp_path):
    for name, value in (("b/2.png", 3), ("a/9.png", 1), ("b/1.png", 2)):
        write_tile(tmp_path / name, value=value)
    tiles = load_tiles(tmp_path, 16)
    assert tiles.slides == ("a", "b")
    assert tiles.slide_index.tolist() == [0, 1, 1]
    assert tiles.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    split = tmp_path.name
    assert [tiles.name(k) for k in range(3)] == [
        f"{split}/{n}" for n in ("a/9.png", "b/1.png", "b/2.png")
    ]


def test_a_tile_of_another_size_is_named(tmp_path):
    write_tile(tmp_path / "a/1.png", size=20)
    with pytest.raises(ValueError, match=r"1\.png is 20x20 px, expected 16"):
        load_tiles(tmp_path, 16)


def test_some_tiles_are_taken_evenly_and_the_others_are_not_read(tmp_path):
    for number in range(10):
        write_tile(tmp_path / f"{'ab'[number // 5]}/{number}.png", value=number)
    for unread in (1, 8):
        (tmp_path / f"{'ab'[unread // 5]}/{unread}.png").write_bytes(b"damaged")
    few = load_tiles(tmp_path, 16, number=4)
    assert few.images[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert few.slide_index.tolist() == [0, 0, 1, 1]
    assert few.slides == ("a", "b")
    assert few.name(2) == f"{tmp_path.name}/b/6.png"


def test_positions_are_evenly_spaced_among_forty_million():
    places = evenly_spaced(40_000_001, 5)
    assert places.tolist() == [0, 10_000_000, 20_000_000, 30_000_000, 40_000_000]
    assert evenly_spaced(40_000_003, 2).tolist() == [0, 40_000_002]  # float32 has no such number
    assert evenly_spaced(3, 8).tolist() == [0, 1, 2]


def test_a_damaged_tile_is_named(tmp_path):
    write_tile(tmp_path / "a/1.png", size=64)
    whole = (tmp_path / "a/1.png").read_bytes()
    (tmp_path / "a/1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        load_tiles(tmp_path, 64)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tiles under"):
        load_tiles(tmp_path)


def test_an_epoch_shows_every_tile_once_and_the_next_in_another_order():
    epochs = [
        torch.cat([Batches(12, 4, seed=3).index(s) for s in steps])
        for steps in (range(3), range(3, 6))
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(*epochs)


def test_a_batch_depends_on_seed_and_step_only():
    assert torch.equal(Batches(50, 8, 1).index(17), Batches(50, 8, 1).index(17))
    assert not torch.equal(Batches(50, 8, 1).index(17), Batches(50, 8, 2).index(17))


def test_a_batch_tells_what_its_items_are_called():
    batches = Batches(5, 2, seed=0, name="abcde".__getitem__)
    assert batches.names(1) == ["abcde"[k] for k in batches.index(1)]


def test_too_few_tiles_are_refused():
    with pytest.raises(ValueError, match="3 tiles cannot fill a batch of 8"):
        Batches(3, 8, 0)


def test_generators_of_other_streams_differ():
    draws = [torch.rand(4, generator=step_generator(1, 2, stream=s)) for s in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_identity_maps_change_nothing_and_no_map_changes_glass():
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(change_stain(image, torch.eye(3).expand(2, 3, 3)), image)
    white = torch.full((5, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(change_stain(white, stain_maps(5, step_generator(0, 0), share=1.0)), white)


def test_the_share_of_restained_tiles_is_as_asked():
    maps = stain_maps(2000, step_generator(0, 0), share=0.75)
    same = (maps == torch.eye(3)).flatten(1).all(1).double().mean()
    assert same.item() == pytest.approx(0.25, abs=0.04)


def test_crops_are_turned_pieces_of_the_tile():
    image = torch.arange(3 * 6 * 6, dtype=torch.uint8).view(1, 3, 6, 6)
    crop = crop_and_turn(image, draw_views(1, 6, 4, step_generator(0, 1)), 4)
    assert crop.shape == (1, 3, 4, 4)
    assert set(crop.flatten().tolist()) < set(image.flatten().tolist())
    whole = crop_and_turn(image, draw_views(1, 6, 6, step_generator(0, 2)), 6)
    assert sorted(whole.flatten().tolist()) == sorted(image.flatten().tolist())


def test_rows_of_a_batch_are_turned_alike_whoever_computes_them():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    views = draw_views(6, 8, 4, step_generator(0, 3))
    assert len({tuple(v) for v in views.tolist()}) > 1
    together = crop_and_turn(images, views, 4)
    assert torch.equal(together[2:5], crop_and_turn(images[2:5], views[2:5], 4))
