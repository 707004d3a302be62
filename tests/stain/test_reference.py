import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from cytosyn_aug import MacenkoReference, StainNormalize, StainReference, StainTransfer, StainViews
from cytosyn_aug.stain.reference import list_references
from tests.support.synthetic import SIZE, synthetic_tiles


@pytest.fixture
def reference(generator):
    return StainReference.fit(generator, synthetic_tiles(5))


def test_it_survives_disk(reference, tmp_path):
    reference.save(tmp_path / "lab.json")
    back = StainReference.load(tmp_path / "lab.json")
    assert torch.equal(back.cls, reference.cls)
    assert all(torch.equal(a, b) for a, b in zip(back.moments, reference.moments, strict=True))
    assert (back.model_digest, back.tile) == (reference.model_digest, reference.tile)


def test_a_folder_gives_what_its_tiles_give(generator, reference, tmp_path):
    for k, tile in enumerate(synthetic_tiles(5)):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    torch.testing.assert_close(StainReference.fit(generator, tmp_path).cls, reference.cls)


def test_a_slide_is_fitted_to_its_tissue(generator, synthetic_slide):
    pytest.importorskip("tifffile", reason="fitting to slides is not tested")
    slide = synthetic_slide(grid="#..#\n.##.\n####", side=256, mpp="0.5", power="20")
    # Eight squares of 2.3 x 2.3 tiles.
    assert 25 < len(StainReference.fit(generator, slide).cls) < 42
    assert len(StainReference.fit(generator, slide, max_tiles=5).cls) == 5


def test_several_folders_and_slides_have_equal_parts(generator, synthetic_slide, tmp_path):
    pytest.importorskip("tifffile", reason="fitting to slides is not tested")
    slide = synthetic_slide(grid="####\n####", side=256, mpp="0.5", power="20")
    (tmp_path / "tiles").mkdir()
    for k, tile in enumerate(synthetic_tiles(5)):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(tmp_path / "tiles" / f"{k}.png")
    both = StainReference.fit(generator, [tmp_path / "tiles", slide], max_tiles=6)
    alone = [StainReference.fit(generator, x, max_tiles=3) for x in (tmp_path / "tiles", slide)]
    torch.testing.assert_close(both.cls, torch.cat([x.cls for x in alone]))
    with pytest.raises(ValueError, match="no folders and no slides"):
        StainReference.fit(generator, [])


def test_the_laboratory_travels_along(generator, tmp_path):
    reference = StainReference.fit(generator, synthetic_tiles(2), laboratory="Utrecht")
    reference.save(tmp_path / "lab.json")
    assert StainReference.load(tmp_path / "lab.json").laboratory == "Utrecht"


def test_it_survives_json(reference):
    back = StainReference.from_dict(json.loads(json.dumps(reference.to_dict())))
    assert torch.equal(back.cls, reference.cls)
    assert all(torch.equal(a, b) for a, b in zip(back.moments, reference.moments, strict=True))
    assert (back.model_digest, back.tile) == (reference.model_digest, reference.tile)
    with pytest.raises(ValueError, match="the dictionary holds something, expected cytosyn_aug"):
        StainReference.from_dict({"kind": "something"})


def test_features_that_are_not_finite_are_refused(generator, monkeypatch):
    monkeypatch.setattr(generator, "cls_features", lambda images: torch.full((2, 24), torch.nan))
    with pytest.raises(ValueError, match="are not finite in"):
        StainReference.fit(generator, synthetic_tiles(2))


def test_blank_tiles_are_left_out(generator, reference):
    blank = torch.full((2, 3, SIZE, SIZE), 245, dtype=torch.uint8)
    fitted = StainReference.fit(generator, torch.cat([synthetic_tiles(5), blank]))
    assert len(fitted.cls) == 5


def test_only_blank_tiles_are_refused(generator):
    with pytest.raises(ValueError, match="none of the 2 tiles holds tissue"):
        StainReference.fit(generator, torch.full((2, 3, SIZE, SIZE), 245, dtype=torch.uint8))


def test_tiles_of_another_size_are_refused(generator):
    with pytest.raises(ValueError, match="tile is 64x64 px, the model expects 112 px"):
        StainReference.fit(generator, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_folders_that_cannot_serve_are_refused(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        StainReference.fit(generator, tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tiles"):
        StainReference.fit(generator, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h | {"format_version": 9}, "format_version 9"),
        (lambda h: h | {"kind": "something"}, "expected cytosyn_aug.StainReference"),
    ],
)
def test_foreign_files_are_refused(reference, tmp_path, change, message):
    file = tmp_path / "lab.json"
    reference.save(file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        StainReference.load(file)


def test_damaged_files_are_named(reference, tmp_path):
    file = tmp_path / "lab.json"
    reference.save(file)
    weights = file.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="is corrupt"):
        StainReference.load(file)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="copy it together"):
        StainReference.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        StainReference.load(file)


def test_the_name_must_end_in_json(reference, tmp_path):
    with pytest.raises(ValueError, match="is saved as"):
        reference.save(tmp_path / "lab.pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda r: r, r"single StainReference.*pass references=\[reference\]"),
        (lambda r: {"a": r}, r"is a dict.*pass list\(references\.values\(\)\)"),
        (lambda r: "lab.json", r"is a str.*StainReference\.load"),
        (lambda r: Path("lab.json"), r"is a \w*Path.*StainReference\.load"),
        (lambda r: None, "is a NoneType"),
        (lambda r: [[r]], r"references\[0\] is a list, expected a StainReference"),
        (lambda r: [r, "lab.json"], r"references\[1\] is a str.*StainReference\.load"),
        (lambda r: [MacenkoReference.fit(synthetic_tiles(1))], r"\[0\] is a MacenkoReference"),
    ],
)
def test_what_is_no_list_of_references_is_named(generator, reference, given, message):
    transforms = [partial(kind, generator) for kind in (StainTransfer, StainViews)]
    for make in (list_references, *transforms):
        with pytest.raises(TypeError, match=message):
            make(given(reference))


def test_source_and_reference_are_of_the_models_kind(generator, reference):
    other = MacenkoReference.fit(synthetic_tiles(1))
    with pytest.raises(TypeError, match="source is a MacenkoReference, expected a StainReference"):
        StainTransfer(generator, [reference], source=other)
    for wrong in ([reference], "lab.json", other, None):
        with pytest.raises(TypeError, match=r"^reference is a .*, expected a StainReference"):
            StainNormalize(generator, wrong)
