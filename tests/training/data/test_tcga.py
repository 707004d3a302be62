import pytest

from training.data.tcga import parse_barcode, patient_and_site, read_manifest

UUID = "8923A151-A690-40B7-9E5A-FCBEDFC2394F"
HEADER = "id\tfilename\tmd5\tsize\tstate\n"


def test_a_barcode_is_taken_apart():
    found = parse_barcode(f"TCGA-3L-AA1B-01Z-00-DX1.{UUID}.svs")
    assert found == ("TCGA-3L-AA1B", "3L", "01", "DX")


def test_frozen_and_normal_sections_are_told_apart():
    assert parse_barcode(f"tcga-cr-7395-01a-01-ts1.{UUID}.svs").section == "TS"
    normal = parse_barcode("TCGA-BH-A0BW-11A-02-BSA.svs")
    assert (normal.sample, normal.section) == ("11", "BS")


def test_patient_and_site_are_read_from_any_tcga_name():
    assert patient_and_site("tcga-3l-aa1b_tile") == ("TCGA-3L-AA1B", "3L")
    assert patient_and_site("TCGA-3L-AA1BX") is None
    assert patient_and_site("CMU-1") is None


def test_other_slides_have_no_barcode():
    assert parse_barcode("CMU-1.svs") is None


@pytest.mark.parametrize("name", ["TCGA-3L-AA1B.svs", "TCGA-3L-AA1B-01Z-00-QQ1.svs", "tcga-x.svs"])
def test_a_broken_barcode_is_named_not_guessed(name):
    with pytest.raises(ValueError, match=f"{name} is not the barcode of a slide"):
        parse_barcode(name)


def test_a_manifest_is_read(tmp_path):
    file = tmp_path / "manifest.txt"
    file.write_text(f"{HEADER}u1\ta.svs\tABC\t12\treleased\n")
    assert read_manifest(file) == [("u1", "a.svs", "abc", 12)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id\tfilename\n", r"no column \['md5', 'size'\]"),
        (HEADER, "lists no file"),
        (f"{HEADER}u1\ta.svs\n", "line 2 is incomplete"),
        (f"{HEADER}u1\ta.svs\tx\tbig\t\n", "line 2 is incomplete"),
        (f"{HEADER}u1\t../a.svs\tx\t1\t\n", "expected plain names"),
        (f"{HEADER}u1\ta.svs\tx\t1\t\nu2\ta.svs\tx\t1\t\n", r"lists a\.svs twice"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_place(tmp_path, content, message):
    file = tmp_path / "manifest.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(file)
