"""Bad items cost themselves: each is named in the manifest, and nothing stands in for it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from cytosyn_aug import offline
from cytosyn_aug.cli.main import main
from cytosyn_aug.runs.recipes import Work
from tests.io.test_image_files import DEEP, png
from tests.support.synthetic import SIZE, save_tile, synthetic_tiles

QUIET = Work(progress=False)
GOOD = Image.fromarray(synthetic_tiles(1)[0].permute(1, 2, 0).contiguous().numpy())
TURNED = GOOD.rotate(90)


def stored(image, format="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(GOOD, exif=exif)


def tagged():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return stored(GOOD, icc_profile=profile)


BAD = {
    "cmyk.jpg": (stored(GOOD.convert("CMYK"), "JPEG"), "mode CMYK"),
    "deep.png": (DEEP, "more than 8 bits"),
    "grey.png": (stored(GOOD.convert("L")), "mode L"),
    "cut.png": (stored(GOOD)[:-2000], "damaged"),
    "empty.png": (b"", "no image this reads: its first bytes are of no known format"),
    "animated.webp": (stored(GOOD, "WEBP", save_all=True, append_images=[TURNED]), "holds 2"),
    "bomb.png": (png(60_000, 60_000, 8, 2), "damaged or no image this reads: Image size"),
    "huge.png": (png(5_000, 5_000, 8, 2), "is 5000x5000 px"),
    "small.png": (stored(GOOD.resize((64, 64))), "is 64x64 px"),
    "good.jpg": (stored(GOOD, "JPEG"), ""),
    "good.png": (stored(GOOD), "same name as good.jpg"),
}
FINE = {
    "turned.png": (turned(), "turned by EXIF orientation 6"),
    "tagged.png": (tagged(), "colour profile not applied"),
    "a b.png": (stored(GOOD), ""),
    "line\nbreak.png": (stored(GOOD), ""),
    "Gewebe_\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{SNOWMAN}.png": (stored(GOOD), ""),
}


@pytest.mark.parametrize("format", ["png", "tar", "latents"])
def test_every_bad_image_is_named_and_every_good_one_is_there(
    tmp_path, small, laboratories, format
):
    tree, out = tmp_path / "in", tmp_path / "out"
    tree.mkdir()
    for name, (content, _) in (BAD | FINE).items():
        (tree / name).write_bytes(content)
    summary = offline.augment(
        tree, out, small, references=laboratories, format=format, unit_tiles=5, work=QUIET
    )
    found = {r["source"]: r for r in pq.read_table(out / "manifest.parquet").to_pylist()}
    assert set(found) == set(BAD | FINE)
    for name, (_, reason) in BAD.items():
        assert found[name]["status"] == ("failed" if reason else "edited"), name
        assert reason in found[name]["reason"]
        assert not (reason and found[name]["output"])
    for name, (_, note) in FINE.items():
        assert (found[name]["status"], found[name]["reason"]) == ("edited", note)
    assert summary.counts == {"edited": 6, "failed": 10}
    if format == "png":
        assert len(list(out.rglob("*.png"))) == 6
        assert (out / "line\nbreak_v0.png").is_file()
        image = Image.open(out / "turned_v0.png")
        assert image.getexif().get(0x0112) is None
        upright = np.asarray(image).astype(float)
        other = np.rot90(np.asarray(Image.open(out / "a b_v0.png")).astype(float), -1)
        assert np.corrcoef(upright.ravel(), other.ravel())[0, 1] > 0.9


def test_slides_give_tiles_rejections_and_failures(tmp_path, synthetic_slide, small, laboratories):
    side = 2 * SIZE  # a tile at 0.25 microns/pixel
    slide = synthetic_slide("a.svs", grid="##.\n#b.", side=side)
    (slide.parent / "broken.svs").write_bytes(slide.read_bytes()[:3000])
    out = tmp_path / "out"
    summary = offline.augment(slide.parent, out, small, references=laboratories, work=QUIET)
    found = pq.read_table(out / "manifest.parquet").to_pylist()
    named = {(r["x"], r["y"]): (r["status"], r["reason"]) for r in found if r["slide"] == "a"}
    assert named == {
        (0, 0): ("edited", ""),
        (side, 0): ("edited", ""),
        (0, side): ("edited", ""),
        (side, side): ("rejected", "blurred"),
    }
    assert (out / "a" / f"{side}_0_v0.png").is_file()
    assert summary.counts == {"edited": 3, "failed": 1, "rejected": 1}
    assert "truncated or damaged" in summary.failed[0][1]


def test_a_table_carries_masks_from_anywhere(tmp_path, small, laboratories):
    save_tile(tmp_path / "tiles" / "1.png", synthetic_tiles(1)[0])
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "one.npy", np.eye(SIZE, dtype=np.uint8))
    file = tmp_path / "table.csv"
    file.write_text("path,mask,label\ntiles/1.png,labels/one.npy,007\ntiles/2.png,,\n")
    out = tmp_path / "out"
    offline.augment(file, out, small, references=laboratories, format="webp", work=QUIET)
    first, second = pq.read_table(out / "manifest.parquet").to_pylist()
    assert (first["output"], first["mask"]) == ("tiles/1_v0.webp", "tiles/1_v0_mask.npy")
    assert first["label"] == "007"
    source = tmp_path / "labels" / "one.npy"
    assert (out / first["mask"]).read_bytes() == source.read_bytes()
    assert (second["status"], second["reason"]) == (
        "failed",
        "cannot be opened: No such file or directory",
    )


@pytest.mark.parametrize("name", ["cut.png", "deep.png", "cmyk.jpg"])
@pytest.mark.parametrize("method", ["cytosyn", "macenko"])
def test_a_bad_image_in_a_folder_of_references_ends_a_command_by_name(
    tmp_path, tree, model_folder, capsys, name, method
):
    content, reason = BAD[name]
    laboratory, out = tmp_path / "laboratory", tmp_path / "out"
    for k, tile in enumerate(synthetic_tiles(2)):
        save_tile(laboratory / f"{k}.png", tile)
    (laboratory / name).write_bytes(content)
    common = [str(tree), str(out), "--model", str(model_folder)]
    commands = [["normalize", *common, "--method", method, "--reference", str(laboratory)]]
    if method == "cytosyn":
        commands.append(["augment", *common, "--references", str(laboratory)])
    for words in commands:
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()  # the first may be the model's licence
        (said,) = (line for line in lines if line.startswith(f"cytosyn-aug {words[0]}: "))
        assert lines[-1] == said
        assert str(laboratory / name) in said
        assert reason in said
        assert "take it out of the folder" in said
        assert not out.exists()
