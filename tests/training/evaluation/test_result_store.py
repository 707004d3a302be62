"""Results on disk: found by what they were made from, made anew when damaged."""

import pytest
import torch

from training.evaluation.extractors import load_extractor
from training.evaluation.result_store import ResultStore, images_digest


def forbidden():
    raise AssertionError("made again")


def test_a_result_is_made_once_and_found_by_all_it_was_made_from(tmp_path):
    kept, result = ResultStore(tmp_path / "kept"), torch.arange(6.0).view(2, 3).T
    first = kept.get("numbers", {"seed": 1, "scale": 2.0}, lambda: result)
    again = kept.get("numbers", {"scale": 2.0, "seed": 1}, forbidden)
    assert torch.equal(first, result)
    assert torch.equal(again, result)
    other = kept.get("numbers", {"seed": 2, "scale": 2.0}, lambda: result + 1)
    assert torch.equal(other, result + 1)
    assert len(list(kept.folder.iterdir())) == 2


def test_a_damaged_result_is_made_again(tmp_path):
    kept, result = ResultStore(tmp_path), torch.ones(100)
    kept.get("ones", {}, lambda: result)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert torch.equal(kept.get("ones", {}, lambda: result), result)
    assert torch.equal(kept.get("ones", {}, forbidden), result)


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        ResultStore(tmp_path / "kept").get("none", {}, forbidden)
    assert not (tmp_path / "kept").exists()


def test_images_are_known_by_shape_and_bytes():
    images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    changed = images.clone()
    changed[0, 2, 3, 3] += 1
    digests = {images_digest(i) for i in (images, changed, images.view(1, 3, 2, 8), images.mT)}
    assert len(digests) == 4
    assert images_digest(images.mT.contiguous().mT) == images_digest(images)


@pytest.mark.slow
def test_kept_features_are_those_of_the_network(tmp_path, monkeypatch):
    """Split among files without a change, and found without the network the second time."""
    monkeypatch.setattr("training.evaluation.extractors.TILES_PER_FILE", 16)
    images = torch.randint(256, (19, 3, 224, 224), dtype=torch.uint8)
    kept = load_extractor("tiny", kept=ResultStore(tmp_path))
    assert torch.equal(kept.features(images), load_extractor("tiny").features(images))
    assert len(list(tmp_path.iterdir())) == 2
    times = [f.stat().st_mtime_ns for f in sorted(tmp_path.iterdir())]
    kept.features(images)
    assert times == [f.stat().st_mtime_ns for f in sorted(tmp_path.iterdir())]
