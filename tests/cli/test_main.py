"""The command line as a whole: its version and its reference page."""

from importlib.metadata import version

import pytest

from cytosyn_aug.cli.main import main

COMMANDS = ["demo", "info", "doctor", "convert", "augment", "normalize", "cache", "sample"]
COMMANDS += ["normalize-slide", "report"]


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"cytosyn-aug {version('cytosyn-aug')}\n"


def test_the_commands_are_these(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{{{','.join(COMMANDS)}}}" in capsys.readouterr().out
