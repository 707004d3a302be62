"""The command line as a whole: its version, and what it refuses before it loads anything."""

import json
import subprocess
import sys
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


AUGMENT = "augment IN OUT --references LAB"
NORMALIZE = "normalize IN OUT --reference LAB"
SAMPLE = "sample OUT --n 1"
# Command lines that contradict themselves or name what is not there, and what is said of them.
CONTRADICTIONS = {
    f"{AUGMENT} --variants 2": "2 variants per tile need as many references",
    f"{AUGMENT} --variants 0": "variants is 0, expected at least 1",
    f"{AUGMENT} --strength 0.8 0.2": "strength is 0.8 to 0.2",
    f"{AUGMENT} --strength 0 0.5 1": "strength has 3 values, expected one, or least and largest",
    f"{AUGMENT} --max-similarity 0.9": "bound what is drawn anew",
    f"{AUGMENT} --mode resample --max-similarity 0.9 --format images": "needs all variants",
    f"{AUGMENT} --mode resample --steps 0": "steps is 0, expected at least 1",
    f"{AUGMENT} --mode resample --guidance-scale nan": "guidance scale is nan",
    f"{AUGMENT} --mode resample --encoder none": "mode resample needs an encoder",
    f"{AUGMENT} --preserve none --encoder none": "preserve 'none' needs an encoder",
    f"{AUGMENT} --unit-tiles 0": "unit_tiles is 0, expected at least 1",
    f"{AUGMENT} --actors 2": "--actors can only be combined with --engine ray",
    f"{AUGMENT} --overwrite --shard 0/2": "--overwrite with --shard would remove",
    "augment IN OUT": "mode stain needs references",
    "augment IN OUT --references GONE": "reference GONE does not exist",
    "augment GONE OUT --references LAB": "GONE does not exist; give a folder",
    "augment IN IN/out --references LAB": "lie in each other",
    f"{NORMALIZE} --strength 2": "strength is 2",
    f"{NORMALIZE} --readers 0": "expected at least 1 of each",
    "normalize IN OUT --reference GONE": "reference GONE does not exist",
    "normalize GONE OUT --reference LAB": "GONE does not exist; give a folder",
    "normalize-slide IN OUT --reference LAB --engine ray --actors 0": "actors is 0",
    "cache IN OUT --overwrite": "overwrite does not remove it",
    "cache GONE OUT": "GONE does not exist; give a folder",
    "sample OUT --n 0": "n is 0, expected at least 1",
    f"{SAMPLE} --steps 0": "steps is 0, expected at least 1",
    f"{SAMPLE} --conditions GONE.npy": "GONE.npy does not exist",
    f"{SAMPLE} --engine ray --device cuda:1": "expected 'cuda': Ray gives",
}
RUN_ALL = """
import contextlib, io, json, sys
from cytosyn_aug.cli.main import main
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(line.split())
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What all of them say, in one process: exit code, message, whether torch was loaded."""
    folder = tmp_path_factory.mktemp("request")
    for name in ("IN", "LAB"):
        (folder / name).mkdir()
    # What loads torch comes last, or it would hide what others load.
    lines = sorted(CONTRADICTIONS, key=lambda line: line.startswith("normalize-slide"))
    words = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "OUT").exists()
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_a_contradiction_is_refused_before_torch_is_loaded(answers, line):
    code, message, has_torch = answers[line]
    assert code == 2
    assert CONTRADICTIONS[line] in message
    assert not has_torch or line.startswith("normalize-slide")  # whose recipe needs it
