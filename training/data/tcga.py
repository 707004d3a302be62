"""What TCGA's file names and manifests say, without a network.

    TCGA-3L-AA1B-01Z-00-DX1.8923A151-A690-40B7-9E5A-FCBEDFC2394F.svs
         |  |    ||  |  |
         |  |    ||  |  section: DX diagnostic (FFPE); TS, BS, MS frozen top, bottom, middle
         |  |    ||  portion
         |  |    |vial
         |  |    sample: 01 primary tumour, 06 metastasis, 11 normal tissue, ...
         |  participant
         tissue source site

The patient is `TCGA-3L-AA1B`. A site never spans two projects. The project is not in the name.

Source: NCI Genomic Data Commons, "TCGA Barcode"; facts on slides from IDC's index, release 25.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SECTIONS = {
    "DX": "FFPE diagnostic",
    "TS": "frozen, top",
    "MS": "frozen, middle",
    "BS": "frozen, bottom",
}
_BARCODE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})"
    r"-(?P<sample>\d{2})(?P<vial>[A-Z])-(?P<portion>\d{2})-(?P<section>[A-Z]{2})(?P<number>\w+)",
    re.IGNORECASE,
)
_PATIENT = re.compile(r"TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
_MANIFEST_COLUMNS = ("id", "filename", "md5", "size")


class Barcode(NamedTuple):
    """The parts of a slide's barcode, upper case.

    Attributes:
        patient: First twelve characters; what a split must not divide.
        site: Code of the tissue source site.
        sample: "01" primary tumour, "11" normal tissue and so on.
        section: Key of `SECTIONS`.
    """

    patient: str
    site: str
    sample: str
    section: str


class ManifestEntry(NamedTuple):
    """One file of a GDC manifest; `size` in bytes."""

    file_id: str
    name: str
    md5: str
    size: int


def parse_barcode(name: str) -> Barcode | None:
    """Return the barcode that a file name starts with; None for a slide that is not TCGA's.

    Raises:
        ValueError: The name starts with TCGA- but is not a slide's barcode.
    """
    match = _BARCODE.match(name)
    if match:
        parts = {key: value.upper() for key, value in match.groupdict().items()}
        if parts["section"] in SECTIONS:
            return Barcode(parts["patient"], parts["site"], parts["sample"], parts["section"])
    if name.upper().startswith("TCGA-"):
        raise ValueError(
            f"{name} is not the barcode of a slide, expected TCGA-SS-PPPP-01Z-00-DX1; "
            "give the file the name it has at the GDC"
        )
    return None


def patient_and_site(name: str) -> tuple[str, str] | None:
    """Return the patient and the site that any TCGA name starts with, a slide's or not."""
    match = _PATIENT.match(name)
    return (match[0].upper(), match["site"].upper()) if match else None


def read_manifest(file: Path) -> list[ManifestEntry]:
    """Read a GDC manifest: tab-separated, with at least id, filename, md5 and size.

    Raises:
        ValueError: A column is missing, a row is cut short, or a file is listed twice.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, delimiter="\t")
        missing = set(_MANIFEST_COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{file} has no column {sorted(missing)}; is it a GDC manifest?")
        entries = [_entry(row, file, reader.line_num) for row in reader]
    if not entries:
        raise ValueError(f"{file} lists no file; download the manifest again")
    counts = Counter(entry.name for entry in entries)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"{file} lists {', '.join(twice[:3])} twice; remove one")
    return entries


def _entry(row: dict[str, str | None], file: Path, line: int) -> ManifestEntry:
    values = [(row[column] or "").strip() for column in _MANIFEST_COLUMNS]
    if not all(values) or not values[3].isdigit():
        raise ValueError(f"{file} line {line} is incomplete: {values}; download it again")
    if Path(values[1]).name != values[1] or Path(values[0]).name != values[0]:
        raise ValueError(f"{file} line {line} names {values[0]}/{values[1]}, expected plain names")
    return ManifestEntry(values[0], values[1], values[2].lower(), int(values[3]))
