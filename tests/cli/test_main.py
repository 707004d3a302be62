"""The command line as a whole: its version and its reference page."""

from importlib.metadata import version

import pytest

from cytosyn_aug.cli.main import main
from cytosyn_aug.cli.reference import reference_page

COMMANDS = ["demo", "info", "doctor", "convert", "augment", "normalize", "cache", "sample"]
COMMANDS += ["normalize-slide", "report"]


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"cytosyn-aug {version('cytosyn-aug')}\n"


def test_the_reference_page_has_the_help_of_every_command(monkeypatch, capsys):
    page = reference_page()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## cytosyn-aug", *(f"## cytosyn-aug {name}" for name in COMMANDS)]
    monkeypatch.setenv("COLUMNS", "80")
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"```text\n{capsys.readouterr().out}```" in page
    monkeypatch.setenv("COLUMNS", "200")
    assert reference_page() == page  # whatever terminal it is made in
