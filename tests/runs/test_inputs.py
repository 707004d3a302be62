"""What IN may be: each kind, and what each does with bad items."""

import io
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.runs.inputs import find_kind, list_inputs, list_whole_slides
from cytosyn_aug.runs.reading import Reader
from tests.support.synthetic import damage_tile

TILE = TileSpec(size_px=64)
RNG = np.random.default_rng(0)


def image(side=64):
    return Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(side=64):
    stream = io.BytesIO()
    image(side).save(stream, "PNG")
    return stream.getvalue()


def write(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png() if file.suffix in (".png", ".tif") else b"text")
    return folder


def items(source, **settings):
    listing = list_inputs(source, TILE, **settings)
    return listing.items(0, len(listing))


def errors(source, **settings):
    return {i.name: i.error for i in items(source, **settings) if i.error}


def test_a_tree_gives_labels_corners_and_masks(tmp_path):
    write(
        tmp_path, "b/s_1_2.png", "a/x y.png", "a/x y_mask.png", "c/7_8.png", "notes.txt", ".h/i.png"
    )
    listing = list_inputs(tmp_path, TILE)
    found = {i.name: (i.label, i.slide, i.x, i.y, i.mask) for i in listing.items(0, len(listing))}
    assert found == {
        "a/x y.png": ("a", "", None, None, "a/x y_mask.png"),
        "b/s_1_2.png": ("b", "s", 1, 2, ""),
        "c/7_8.png": ("c", "c", 7, 8, ""),
    }
    assert listing.notes == ("left out files that are no tiles: 1 .txt",)


def test_masks_in_a_tree_are_known_by_either_end(tmp_path):
    write(
        tmp_path, "a.png", "a.mask.png", "b.png", "b_MASK.tif", "c.png", "c_mask.png", "c.mask.tif"
    )
    assert {i.name: i.mask for i in items(tmp_path)} == {
        "a.png": "a.mask.png",
        "b.png": "b_MASK.tif",
        "c.png": "",
    }
    assert errors(tmp_path) == {"c.png": "has 2 masks, expected one: c.mask.tif, c_mask.png"}


def test_a_folder_that_names_a_split_is_no_label(tmp_path):
    write(tmp_path, "train/tumour/1.png", "Val/tumour/a/1.png", "tumour/test/1.png", "test/1.png")
    labels = {i.name: i.label for i in items(tmp_path)}
    assert labels == {
        "Val/tumour/a/1.png": "tumour",
        "test/1.png": "",
        "train/tumour/1.png": "tumour",
        "tumour/test/1.png": "tumour",
    }
    write(tmp_path / "slides", "train/lab/1.svs")
    assert [i.label for i in slides(tmp_path / "slides")] == ["lab"]


def test_names_that_cannot_be_kept_apart_or_written_are_errors(tmp_path):
    long = "n" * 240
    write(tmp_path, "t.png", "t.tif", f"{long}.png", "lonely_mask.png", "m.png", "m_mask.png")
    (tmp_path / "m_mask.npy").write_bytes(b"")
    (tmp_path / "new\nline é.png").write_bytes(png())
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(png())
    found = errors(tmp_path)
    assert set(found) == {"t.tif", f"{long}.png", "lonely_mask.png", "latin\\xe9.png", "m.png"}
    assert found["t.tif"] == "would be written under the same name as t.png; rename one"
    assert "more than 230 bytes" in found[f"{long}.png"]
    assert "mask of a tile that is not there" in found["lonely_mask.png"]
    assert "not UTF-8" in found["latin\\xe9.png"]
    assert "has 2 masks" in found["m.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, "in/a/1.png", "elsewhere/2.png")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a" / "gone.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "in" / "a" / "self.png").symlink_to(tmp_path / "in" / "a" / "self.png")
    os.mkfifo(tmp_path / "in" / "a" / "pipe.png")
    names = [i.name for i in items(tmp_path / "in")]
    assert "b/2.png" in names
    assert {"a/gone.png", "a/self.png"} < set(names)  # reading them fails and names them
    assert "a/pipe.png" not in names
    assert len(names) < 10


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_keeps_its_order_and_its_texts(tmp_path, suffix):
    write(tmp_path, "z/1.png", "a/2.png", "masks/1.png")
    columns = {
        "path": ["z/1.png", "a/2.png", "absent.png", "z/1.png", "../out of.png"],
        "label": ["01", "1", "", "x", "y"],
        "mask": ["masks/1.png", "", "", "", ""],
        "x": [5, 6, 7, 8, 9],
        "y": [1, 2, 3, 4, 5],
    }
    file = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        lines = zip(*columns.values(), strict=True)
        text = "\n".join([",".join(columns), *(",".join(map(str, line)) for line in lines)])
        file.write_text("\ufeff" + text)
    else:
        pq.write_table(pa.table(columns), file)
    found = items(file)
    assert [i.label for i in found[:2]] == ["01", "1"]
    assert [(i.x, i.y) for i in found] == list(zip(columns["x"], columns["y"], strict=True))
    assert found[0].mask == "masks/1.png"
    assert [bool(i.error) for i in found] == [False, False, True, True, True]
    assert found[2].error == "cannot be opened: No such file or directory"
    assert found[3].error == "is listed twice"
    assert found[4].stem == "out of"  # inside of OUT, whatever the path


def test_no_tile_is_written_over_the_mask_of_another(tmp_path):
    write(tmp_path, "a.png", "b.png", "a_mask.png", "b_mask.png")
    file = tmp_path / "table.csv"
    file.write_text("path,mask\na.png,b_mask.png\na_mask.png,\nb_mask.png,\nb.png,a_mask.png\n")
    assert errors(file) == {
        "a_mask.png": "would be written under the same name as the mask of a.png; rename one",
        "b.png": "would be written under the same name as b_mask.png; rename one",
    }


def test_names_that_are_one_in_tar_shards_are_kept_apart(tmp_path):
    write(tmp_path, "a%2Eb.png", "a.b.png")
    assert errors(tmp_path) == {
        "a.b.png": "would be written under the same name as a%2Eb.png; rename one"
    }


def test_absolute_paths_go_by_what_follows_their_common_folder(tmp_path):
    write(tmp_path, "data/a/1.png", "data/b/2.png")
    file = tmp_path / "lists" / "table.csv"
    file.parent.mkdir()
    names = [str(tmp_path / "data" / name) for name in ("a/1.png", "b/2.png")]
    file.write_text("\n".join(["path", *names]))
    assert [i.stem for i in items(file)] == ["a/1", "b/2"]
    assert not errors(file)


def test_a_table_without_paths_or_with_damage_is_refused(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("name,label\na,b\n")
    with pytest.raises(ValueError, match="has columns name, label, expected one of path"):
        items(file)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        items(tmp_path / "bad.parquet")
    file.write_text("path,label,path\na.png,x,b.png\n")
    with pytest.raises(ValueError, match="has several columns path"):
        items(file)
    for cell in ("left", "1.5"):
        file.write_text(f"path,x,y\na.png,{cell},1\n")
        with pytest.raises(ValueError, match=f"has a bad cell in column x.*{cell}"):
            items(file)
    for row, reason in (
        ("", "is a folder, or its row has no path"),
        ("b\\a.png", "write / for its"),
    ):
        file.write_text(f"path,x\n{row},1\n")
        assert reason in errors(file)[row]


def test_an_empty_cell_says_nothing(tmp_path):
    write(tmp_path, "s_1_2.png")
    file = tmp_path / "table.csv"
    for missing in ("", "NA", " nan", "null"):
        file.write_text(f"path,label,slide,x,y\ns_1_2.png,NA,,{missing},{missing}\n")
        assert [(i.label, i.slide, i.x, i.y) for i in items(file)] == [("NA", "s", 1, 2)]


@pytest.mark.parametrize(
    "text",
    ["Path; LABEL ;x;id\na.png;ab;5.0;7\n", "path\tlabel\tX\tid\na.png\tab\t5\t7\n"],
)
def test_tables_of_other_programs_are_read(tmp_path, text):
    write(tmp_path, "a.png")
    file = tmp_path / "table.tsv"
    file.write_text(text)
    assert [(i.name, i.label, i.x) for i in items(file)] == [("a.png", "ab", 5)]
    notes = list_inputs(file, TILE).notes
    assert notes == ("left out columns that have no meaning here: id",)


def test_parquet_columns_of_other_types_are_read(tmp_path):
    write(tmp_path, "a.png", "b.png")
    columns = {
        "path": pa.array(["a.png", "b.png"]).dictionary_encode(),
        "label": pa.array(["x", None]).dictionary_encode(),
        "x": [1.0, float("nan")],
        "y": ["3", ""],
        "mpp": pa.nulls(2),
        "features": [[0.5] * 8] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    found = items(tmp_path / "table.parquet")
    assert [(i.label, i.x, i.y, i.mpp) for i in found] == [
        ("x", 1, 3, None),
        ("", None, None, None),
    ]
    assert "features" in list_inputs(tmp_path / "table.parquet", TILE).notes[0]


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard(file, *names, **contents):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name in names:
            add(tar, name, png() if name.endswith("png") else contents.get(name[-3:], b"text"))
    return file


def test_shards_are_read_as_webdataset_reads_them(tmp_path):
    first, second = png(), png()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "./s/1_2.png", first)
        add(tar, "./s/1_2.cls", b"tumour\n")
        add(tar, "./s/1_2.mask.TIF", b"mask")
        add(tar, "./s/._1_2.png", b"what macOS adds")
        add(tar, "dotted.name.png", second)
        add(tar, "s/1_2.json", b"{}")
        add(tar, "s/1_2.txt", b"text")
        link = tarfile.TarInfo("linked.png")
        link.type, link.linkname = tarfile.LNKTYPE, "dotted.name.png"
        tar.addfile(link)
    listing = list_inputs(tmp_path, TILE)
    found = listing.items(0, len(listing))
    assert [(i.name, i.stem, i.label, i.slide) for i in found] == [
        ("0.tar/./s/1_2.png", "0/s/1_2", "tumour", "s"),
        ("0.tar/dotted.name.png", "0/dotted.name", "", ""),
        ("0.tar/linked.png", "0/linked", "", ""),
    ]
    assert [note.partition(";")[0] for note in listing.notes] == [
        "left out files that are no tiles: 1 .txt",
        "1 .json beside tiles go along with --format tar only",
        "took 1 images with dots in their names for tiles, such as 0.tar/dotted.name",
    ]
    reader = Reader(listing, TILE, lambda height, width: None)
    loaded = reader.read(found[0])
    assert (loaded.mask, loaded.json) == (b"mask", b"{}")
    assert np.array_equal(loaded.pixels, np.asarray(Image.open(io.BytesIO(first))))
    for item in found[1:]:
        assert np.array_equal(reader.read(item).pixels, np.asarray(Image.open(io.BytesIO(second))))
    assert [i.stem for i in items(tmp_path / "0.tar")] == ["s/1_2", "dotted.name", "linked"]


def test_keys_need_be_unique_in_their_shard_only(tmp_path):
    for name in ("train/0.tar", "train/1.tar", "test/0.tar"):
        shard(tmp_path / name, "000.png", "001.png")
    found = items(tmp_path)
    assert [i.stem for i in found[:3]] == ["test/0/000", "test/0/001", "train/0/000"]
    assert len({i.stem for i in found}) == 6
    assert not errors(tmp_path)
    shard(tmp_path / "train" / "0.tar", "000.png", "000.png")  # as `tar -r` writes an update
    assert errors(tmp_path) == {"train/0.tar/000.png": "has 2 images under one key, expected one"}


def test_an_image_of_another_kind_is_no_tile(tmp_path):
    file = shard(tmp_path / "0.tar", "x.png", "x.seg.png", "a.b.png", "a.c.png", "y.txt", "z")
    assert [i.stem for i in items(file)] == ["x", "a.b", "a.c"]
    notes = list_inputs(file, TILE).notes
    assert notes[0] == "left out files that are no tiles: 1 without suffix, 1 .seg.png, 1 .txt"
    assert notes[1].startswith(
        "took 2 images with dots in their names for tiles, such as 0.tar/a.b"
    )


def test_masks_of_shards_belong_to_one_tile(tmp_path):
    file = shard(tmp_path / "0.tar", "a.b.png", "a.b.mask.npy", "m.mask.png", "n.png", "n.mask.png")
    with tarfile.open(file, "a") as tar:
        add(tar, "n.mask.tif", b"mask")
    assert [i.mask for i in items(file)] == ["a.b.mask.npy", "", ""]
    assert errors(file) == {
        "0.tar/m.mask.png": "is named as the mask of a tile that is not there",
        "0.tar/n.png": "has 2 masks under one key, expected one",
    }


@pytest.mark.parametrize("label", [b"3", b"03\n", "Gewebe \u00fc".encode(), b" two words\r\n", b""])
def test_labels_of_shards_stay_as_they_stand(tmp_path, label):
    assert items(shard(tmp_path / "0.tar", "x.png", "x.cls", cls=label))[0].label == (
        label.decode().strip()
    )


@pytest.mark.parametrize("label", [b"\xff", b"x" * 5000])
def test_a_label_that_cannot_be_kept_is_an_error(tmp_path, label):
    file = shard(tmp_path / "0.tar", "x.png", "x.cls", cls=label)
    assert "has a label that is no short UTF-8 text" in errors(file)["0.tar/x.png"]


def test_a_truncated_shard_gives_what_it_has_and_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(3):
            add(tar, f"{k}.png", png())
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(png()) * 2])
    found = errors(tmp_path)
    assert list(found) == ["0.tar"]
    assert "ends inside" in found["0.tar"]
    assert [i.name for i in items(tmp_path) if not i.error] == ["0.tar/0.png"]
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    assert "is not an uncompressed tar file" in errors(tmp_path)["0.tar"]


def test_slides_are_cut_where_training_finds_tissue(tmp_path, synthetic_slide):
    file = synthetic_slide(grid="##..\n##..", side=256)
    (file.parent / "broken.svs").write_bytes(b"II*\0" + bytes(50))
    synthetic_slide("silent.tif", mpp=None, power=None)
    listing = list_inputs(file.parent, TILE)
    found = listing.items(0, len(listing))
    bad = {i.name: i.error for i in found if i.error}
    assert set(bad) == {"broken.svs", "silent.tif"}
    assert "truncated or damaged" in bad["broken.svs"]
    assert "states neither microns/pixel" in bad["silent.tif"]
    good = [i for i in found if not i.error]
    assert {(i.x, i.y) for i in good} == {
        (x, y) for x in range(0, 512, 128) for y in range(0, 512, 128)
    }
    assert good[0].stem == "slide/0_0"
    reader = Reader(listing, TILE, lambda height, width: None)
    assert reader.read(good[0]).pixels.shape == (64, 64, 3)
    damage_tile(file, 0)
    reader = Reader(listing, TILE, lambda height, width: None)  # what is open has it in memory
    with pytest.raises(ItemError, match="cannot be decoded"):
        reader.read(good[0])
    assert not errors(file.parent / "silent.tif", mpp=0.25)


def test_a_table_may_name_places_on_slides(tmp_path, synthetic_slide):
    synthetic_slide(grid="##..\n##..", side=256)
    file = tmp_path / "places.csv"
    places = ["0,0", "512,256", "1000,0", "-1,0", ",3"]
    lines = [f"slides/slide.svs,{place}" for place in places]
    file.write_text("\n".join(["path,x,y", *lines, "slides/absent.svs,0,0"]))
    listing = list_inputs(file, TILE)
    found = listing.items(0, len(listing))
    assert [i.stem for i in found[:2]] == ["slides/slide/0_0", "slides/slide/512_256"]
    assert found[0].slide == "slides/slide"
    assert found[4].error.startswith("is a slide, and its row lacks x or y; give both, or --input")
    assert found[5].error == "cannot be opened: No such file or directory"
    reader = Reader(listing, TILE, lambda height, width: None)
    assert reader.read(found[0]).pixels.shape == (64, 64, 3)
    assert reader.read(found[1]).rejected == ""  # glass, but asked for
    for item in found[2:4]:
        with pytest.raises(ItemError, match="lies outside of the slide: 128 px from"):
            reader.read(item)


def test_a_table_of_slides_is_cut_with_what_it_says_of_each(tmp_path, synthetic_slide):
    synthetic_slide(grid="##..\n##..", side=256)
    synthetic_slide("silent.tif", grid="##..\n##..", side=256, mpp=None, power=None)
    file = tmp_path / "table.csv"
    file.write_text(
        "path,label,slide,mpp\nslides/slide.svs,a,A,\nslides/silent.tif,b,,0.5\nslides/slide.tif,,,\n"
    )
    found = items(file, kind="slides")
    assert {(i.label, i.slide, i.stem) for i in found if (i.x, i.y) == (128, 128)} == {
        ("a", "A", "slides/slide/128_128"),
        ("b", "slides/silent", "slides/silent/128_128"),
    }
    assert {i.x for i in found if i.label == "a"} == set(range(0, 512, 128))  # at its own 0.25
    assert {i.x for i in found if i.label == "b"} == set(range(0, 512, 64))
    assert errors(file, kind="slides") == {
        "slides/slide.tif": "cannot be opened: No such file or directory"
    }


def test_a_tiff_with_a_place_is_a_slide_if_it_is_tiled(tmp_path, synthetic_slide):
    synthetic_slide("slide.tif", grid="##..\n##..", side=256)
    Image.new("RGB", (64, 64)).save(tmp_path / "tile.tif")
    file = tmp_path / "places.csv"
    file.write_text("path,x,y\nslides/slide.tif,0,0\nslides/slide.tif,512,256\ntile.tif,64,0\n")
    slide, other, tile = items(file)
    assert (slide.stem, other.stem) == ("slides/slide/0_0", "slides/slide/512_256")
    assert (tile.stem, tile.file, tile.x) == ("tile", "", 64)
    assert not errors(file)


def test_a_table_may_give_each_slide_its_scale(tmp_path, synthetic_slide):
    picture = {"grid": "####\n####", "side": 128, "mpp": None, "power": None}
    synthetic_slide("a.tif", **picture)
    synthetic_slide("b.tif", **picture)
    file = tmp_path / "places.csv"
    rows = ["a.tif,0,0,0.25", "a.tif,128,0,0.5", "b.tif,0,0,", "b.tif,128,0,0"]
    file.write_text("\n".join(["path,x,y,mpp", *(f"slides/{row}" for row in rows)]))
    listing = list_inputs(file, TILE)
    found = listing.items(0, len(listing))
    assert [i.mpp for i in found] == [0.25, 0.5, None, 0]
    reader = Reader(listing, TILE, lambda height, width: None)
    half = Image.open(tmp_path / "slides" / "a.tif").crop((0, 0, 128, 128))
    expected = np.asarray(half.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert abs(reader.read(found[0]).pixels - expected).max() <= 1
    whole = np.asarray(Image.open(tmp_path / "slides" / "a.tif"))[:64, 128:192]
    assert np.array_equal(reader.read(found[1]).pixels, whole)
    for item, reason in ((found[2], "states neither"), (found[3], "has the given mpp = 0")):
        with pytest.raises(ItemError, match=reason):
            reader.read(item)
    given = Reader(listing, TILE, lambda height, width: None, mpp=0.5)
    assert np.array_equal(given.read(found[1]).pixels, whole)  # the row's own
    assert given.read(found[2]).pixels.shape == (64, 64, 3)
    file.write_text(file.read_text().replace("0.25", "0.26"))
    assert list_inputs(file, TILE).identity() != listing.identity()
    assert list_inputs(file, TILE).digest(0, 1) != listing.digest(0, 1)


def test_a_tile_whose_row_states_another_scale_is_refused(tmp_path):
    write(tmp_path, "1.png", "2.png", "3.png", "4.png")
    file = tmp_path / "table.csv"
    file.write_text("path,mpp\n1.png,0.503\n2.png,0.25\n3.png,\n4.png,0\n")
    listing = list_inputs(file, TILE)
    found = listing.items(0, len(listing))

    def refused(mpp):
        reader = Reader(listing, TILE, lambda height, width: None, mpp)
        for item in found:
            try:
                reader.read(item)
            except ItemError as error:
                yield item.name, str(error).partition(" as all")[0]

    assert list(refused(None)) == [
        ("2.png", "has 0.25 microns/pixel by its row, expected 0.5"),
        ("4.png", "has 0 microns/pixel by its row, expected 0.5"),
    ]
    assert list(refused(0.25)) == [
        ("1.png", "has 0.503 microns/pixel by its row, expected 0.25"),
        ("4.png", "has 0 microns/pixel by its row, expected 0.25"),
    ]


def slides(source, **settings):
    listing = list_whole_slides(source, **settings)
    found = listing.items(0, len(listing))
    assert listing.kind == "slides"
    assert all((i.x, i.y, i.file) == (None, None, i.name) for i in found)
    return found


def test_whole_slides_are_listed_one_an_item(tmp_path):
    write(tmp_path, "lab/a.SVS", "lab/a.tif", "b.czi", "notes.txt", ".h/c.svs", ".d.svs")
    found = slides(tmp_path, mpp=0.25)
    assert [(i.name, i.stem, i.label, i.slide, i.mpp) for i in found] == [
        ("b.czi", "b", "", "b", 0.25),
        ("lab/a.SVS", "lab/a", "lab", "lab/a", 0.25),
        ("lab/a.tif", "", "lab", "lab/a", 0.25),  # no name of its own, so that it takes no other's
    ]
    assert [i.size for i in found] == [(tmp_path / i.name).stat().st_size for i in found]
    assert found[2].error == "would be written under the same name as lab/a.SVS; rename one"
    (one,) = slides(tmp_path / "lab" / "a.SVS")
    assert (one.name, one.stem, one.label, one.mpp, one.error) == ("a.SVS", "a", "", None, "")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no slides"):
        slides(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        slides(tmp_path / "absent")


def test_a_table_of_whole_slides_says_what_is_known_of_each(tmp_path):
    write(tmp_path, "1.svs", "2.svs", "3.png")
    file = tmp_path / "slides.csv"
    file.write_text("path,label,slide,mpp\n2.svs,x,B,0.5\n1.svs,,,\n3.png,,,\n4.svs,,,\n")
    found = slides(file, mpp=0.25)
    assert [(i.stem, i.label, i.slide, i.mpp) for i in found[:2]] == [
        ("2", "x", "B", 0.5),
        ("1", "", "1", 0.25),
    ]
    reasons = [i.error.partition(",")[0] for i in found]
    assert reasons == ["", "", "is no slide", "cannot be opened: No such file or directory"]
    file.write_text("path,x,y\n1.svs,0,0\n")
    with pytest.raises(ValueError, match="has x and y, expected whole slides"):
        slides(file)


def test_a_slide_s_mask_is_not_taken_for_that_of_its_tiles(tmp_path, synthetic_slide):
    synthetic_slide(grid="##..\n##..", side=256)
    file = tmp_path / "table.csv"
    file.write_text("path,mask\nslides/slide.svs,mask.png\n")
    for listing in (
        list_whole_slides(file),
        list_inputs(file, TileSpec(size_px=64), kind="slides"),
    ):
        assert len(listing) > 0
        assert listing.num_masks() == listing.num_errors() == 0
        assert listing.notes == ("left out columns that have no meaning here: mask",)


def test_the_kind_is_seen_or_must_be_said(tmp_path):
    assert find_kind(write(tmp_path / "tree", "a/1.png")) == "tree"
    assert find_kind(write(tmp_path / "slides", "1.svs")) == "slides"
    assert find_kind(write(tmp_path / "shards", "1.tar")) == "shards"
    with pytest.raises(ValueError, match="several kinds"):
        find_kind(write(tmp_path / "mixed", "1.svs", "1.png"))
    with pytest.raises(ValueError, match=r"holds no tiles, .*1 \.txt"):
        find_kind(write(tmp_path / "none", "1.txt"))
    with pytest.raises(ValueError, match="neither a table"):
        find_kind(tmp_path / "tree" / "a" / "1.png")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        items(tmp_path / "tree" / "a" / "1.png", kind="tree")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        items(tmp_path / "absent")


def test_a_folder_of_tiff_slides_is_not_taken_for_tiles(tmp_path, synthetic_slide):
    folder = synthetic_slide("1.tif", grid="#", side=300).parent  # tiled, and small
    Image.new("RGB", (64, 64)).save(folder / "2.tif")
    assert find_kind(folder) == "tree"
    glass = np.full((4096, 4112), 255, np.uint8)
    tifffile.imwrite(folder / "0.tiff", glass, tile=(256, 256), compression="adobe_deflate")
    with pytest.raises(ValueError, match=r"by its look \(0.tiff\); say --input slides .* tree"):
        find_kind(folder)
    write(folder, "b/1.svs")
    assert find_kind(folder) == "slides"


def test_a_listing_knows_its_names_and_its_units_their_files(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png")
    before = list_inputs(tmp_path, TILE)
    (tmp_path / "a" / "2.png").write_bytes(png(32))
    after = list_inputs(tmp_path, TILE)
    assert before.identity() == after.identity()
    assert before.digest(0, 1) == after.digest(0, 1)
    assert before.digest(1, 2) != after.digest(1, 2)
    write(tmp_path, "a/3.png")
    assert list_inputs(tmp_path, TILE).identity() != before.identity()
