import pytest

from training.data.sources import list_slide_sources
from training.data.tile_folders import list_tiles

DX, TS = "TCGA-3L-AA1B-01Z-00-DX1.UUID1.svs", "TCGA-CR-7395-01A-01-TS1.UUID2.svs"


def touch(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345")


def test_frozen_sections_are_refused_by_name_unless_asked_for(tmp_path):
    touch(tmp_path, DX, TS, "sub/other.tif", "notes.txt", "._hidden.svs")
    found = list_slide_sources(tmp_path)
    assert [s.slide for s in found.sources] == [DX[:-4], "other"]
    assert found.refused == ((TS, "is a frozen, top section (TS); wanted: DX"),)
    assert len(list_slide_sources(tmp_path, sections=("DX", "TS")).sources) == 3


def test_patient_and_site_come_from_the_barcode(tmp_path):
    touch(tmp_path, DX)
    (source,) = list_slide_sources(tmp_path).sources
    assert (source.patient, source.site, source.num_bytes) == ("TCGA-3L-AA1B", "3L", 5)


def test_a_broken_tcga_name_fails_by_name(tmp_path):
    touch(tmp_path, "a.svs", "TCGA-3L-AA1B.svs")
    (failed,) = list_slide_sources(tmp_path).failed
    assert failed.name == "TCGA-3L-AA1B.svs"
    assert "not the barcode of a slide" in failed.reason


def test_a_folder_without_slides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no slide to cut"):
        list_slide_sources(tmp_path)
    touch(tmp_path, TS)
    with pytest.raises(ValueError, match=r"refused 1, such as .*TS1"):
        list_slide_sources(tmp_path)


def test_what_a_manifest_lists_is_taken_refused_or_failed(tmp_path):
    touch(tmp_path, f"id1/{DX}", "b.svs")
    rows = [f"id1\t{DX}\tabc\t7", "id2\tb.svs\tx\t5", "id3\tc.svs\tx\t5", f"id4\t{TS}\tx\t5"]
    manifest = tmp_path / "manifest.txt"
    manifest.write_text("\n".join(["id\tfilename\tmd5\tsize", *rows]))
    found = list_slide_sources(tmp_path, manifest=manifest)
    assert [(s.slide, s.expected_bytes) for s in found.sources] == [
        (DX[:-4], 7),
        ("b", 5),
        ("c", 5),
    ]
    assert [name for name, _ in found.refused] == [TS]
    assert ["download it" in s.fault for s in found.sources] == [False, False, True]


def test_a_table_wins_over_names_and_says_what_it_does_not_match(tmp_path):
    touch(tmp_path / "s", DX, "b.svs")
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,patient,split,mpp,project\n{DX},p,val,0.3,X\nb,q,train,,\nz,,,,\n")
    found = list_slide_sources(tmp_path / "s", table=table)
    a, b = found.sources
    assert (a.patient, a.site, a.project, a.split, a.mpp) == ("p", "3L", "X", "val", 0.3)
    assert (b.patient, b.split, b.mpp) == ("q", "train", None)
    assert found.notes == ("1 rows of the table match no slide, such as z",)


def test_a_gdc_sample_sheet_is_a_table(tmp_path):
    touch(tmp_path / "s", DX)
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text(f"File Name\tProject ID\tCase ID\n{DX}\tTCGA-COAD\tTCGA-3L-AA1B\n")
    (source,) = list_slide_sources(tmp_path / "s", table=sheet).sources
    assert source.project == "TCGA-COAD"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\na\n", "expected at least slide"),
        ("slide\na\na\n", "line 3 has a a second time"),
        ("slide,split\na,train\n", r"\['b'\] have no split but others do"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, table, message):
    touch(tmp_path / "s", "a.svs", "b.svs")
    file = tmp_path / "slides.csv"
    file.write_text(table)
    with pytest.raises(ValueError, match=message):
        list_slide_sources(tmp_path / "s", table=file)


def test_a_broken_split_costs_its_slide(tmp_path):
    touch(tmp_path / "s", "a.svs", "b.svs")
    (tmp_path / "slides.csv").write_text("slide,split\na,../x\nb,val\n")
    (failed,) = list_slide_sources(tmp_path / "s", table=tmp_path / "slides.csv").failed
    assert failed.name == "a.svs"


@pytest.mark.parametrize("mpp", ["much", "nan", "inf"])
def test_a_scale_that_is_no_number_is_a_fault_of_its_slide(tmp_path, mpp):
    touch(tmp_path / "s", "a.svs", "b.svs")
    (tmp_path / "slides.csv").write_text(f"slide,mpp\na,{mpp}\n")
    a, b = list_slide_sources(tmp_path / "s", table=tmp_path / "slides.csv").sources
    assert f"has mpp '{mpp}' in its table, expected a number" in a.fault
    assert (a.mpp, b.fault) == (None, "")


def test_two_slides_of_one_name_are_refused(tmp_path):
    touch(tmp_path, "x/a.svs", "y/a.svs")
    with pytest.raises(ValueError, match=r"stand for two slides each.*x/a\.svs"):
        list_slide_sources(tmp_path)


def test_a_slide_without_its_mask_fails(tmp_path):
    touch(tmp_path, "s/a.svs", "s/b.svs", "m/a.png")
    found = list_slide_sources(tmp_path / "s", masks=tmp_path / "m")
    a, b = found.sources
    assert (a.mask.name, a.fault) == ("a.png", "")
    assert "has no mask; add" in b.fault


def test_given_tiles_keep_split_slide_corner_and_facts(tmp_path):
    touch(tmp_path, "train/a/10_20.webp", "val/b/0_5.png")
    (tmp_path / "tiles.csv").write_text(
        "file,x_level0,y_level0,extent_level0,tissue_fraction\ntrain/a/10_20.webp,10,20,443,0.9\n"
    )
    a, b = list_tiles(tmp_path).sources
    assert (a.slide, a.split, b.slide, b.split) == ("a", "train", "b", "val")
    assert a.tiles[0][1:] == ("train/a/10_20.webp", 10, 20, 443, 0.9)
    assert b.tiles[0][1:5] == ("val/b/0_5.png", 0, 5, 0)


def test_tiles_without_splits_are_grouped_by_folder(tmp_path):
    touch(tmp_path, "TCGA-3L-AA1B-x/1.png", "b/2.png")
    a, b = list_tiles(tmp_path).sources
    assert (a.patient, a.site, a.split) == ("TCGA-3L-AA1B", "3L", "")
    assert b.patient == "b"


def test_flat_tiles_are_grouped_by_name_or_not_at_all(tmp_path):
    touch(tmp_path, "a_1_2.png", "a_3_4.png", "b_c_1_2.png")
    assert [s.slide for s in list_tiles(tmp_path).sources] == ["a", "b_c"]
    touch(tmp_path, "else.png")
    found = list_tiles(tmp_path)
    assert len(found.sources) == 1
    assert "all tiles count as one slide" in found.notes[0]


def test_one_slide_in_two_splits_is_refused(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/2.png")
    with pytest.raises(ValueError, match="stand for two slides"):
        list_tiles(tmp_path)


def test_a_listed_tile_that_is_gone_fails(tmp_path):
    touch(tmp_path, "train/a/1.png")
    (tmp_path / "tiles.csv").write_text("file\ntrain/a/2.png\n")
    assert list_tiles(tmp_path).failed == (
        ("train/a/2.png", "is listed in tiles.csv but is not there"),
    )
