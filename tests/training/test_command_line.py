"""The command line of training: each stage's own options, and what is wrong with them, at once."""

import re
import shlex
import subprocess
import sys
from typing import get_args

import pytest

from training.command_line import SAMPLERS, main
from training.stage_inputs import TRAINED

STAGES = ("tile", *TRAINED, "latents", "export", "evaluate", "restaining")


def said(capsys, *arguments):
    """Return the exit code of a command that argparse ends, and what it says."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    output = capsys.readouterr()
    return ended.value.code, output.out + output.err


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text.split("example:\n")[0]))


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_one_example_that_has_only_options_of_the_stage(capsys, stage):
    code, text = said(capsys, stage, "--help")
    assert code == 0
    (example,) = re.findall(r"^example:\n  (.*)$", text, re.MULTILINE)  # one line, to be pasted
    words = shlex.split(example)
    assert words[:4] == ["python", "-m", "training", stage]
    assert {word for word in words if word.startswith("--")} <= options(text)


def test_help_has_the_options_of_its_stage_alone(capsys):
    texts = {stage: options(said(capsys, stage, "--help")[1]) for stage in STAGES}
    assert {s for s in STAGES if "--teacher" in texts[s]} == {"distil"}
    assert {s for s in STAGES if "--warm-start" in texts[s]} == set(TRAINED)
    assert {s for s in STAGES if "--vae" in texts[s]} == {
        *("latents", "sit", "repae", "distil", "decoder", "export")
    }
    assert {s for s in STAGES if "--sampler" in texts[s]} == {"evaluate"}
    assert texts["vae"] == {
        *("--help", "--dry-run", "--recipe", "--data", "--out", "--warm-start", "--minutes"),
        *("--compile", "--threads"),
    }


def test_help_and_wrong_options_load_neither_torch_nor_pyarrow():
    code = f"""
import sys
from training.command_line import main
commands = [[stage, "--help"] for stage in {STAGES}]
commands += [["--help"], ["vae"], ["sit", "--data", "."], ["evaluate", "--sampler", "none"]]
commands += [["tile", "--out", "x"], ["vae", "--data", "nowhere", "--out", "x"]]
for command in commands:
    try:
        main(command)
    except SystemExit as ended:
        assert ended.code == (0 if "--help" in command else 2), command
        continue
    raise AssertionError(command)
sys.exit("torch" in sys.modules or "pyarrow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "--out", "x"], "vae needs --data"),
        (["sit", "--data", ".", "--out", "x"], "sit needs --vae and --encoder and --latents"),
        (["distil", "--data", ".", "--out", "x", "--vae", ".", "--encoder", ".", "--latents", "."],
         "distil needs --teacher"),
        (["export", "--dry-run", "--vae", ".", "--encoder", "."], "export needs --sit"),
        (["evaluate", "--data", "."], "evaluate needs --out"),
        (["vae", "--data", "nowhere", "--out", "x"], "--data nowhere is not there"),
        (["vae", "--data", ".", "--out", "x", "--warm-start", "no"], "--warm-start no is not"),
        (["decoder", "--data", ".", "--out", "x", "--vae", ".", "no"], "--vae no is not there"),
        (["vae", "--data", ".", "--out", "x", "--teacher", "."], "unrecognized arguments: --t"),
        (["vae", "--data", ".", "--out", "x", "--steps", "9"], "unrecognized arguments: --steps"),
        (["export", "--report", "folder"], "got 'folder', expected NAME=DIR"),
        (["tile", "--slides", "."], "required: --out"),
        (["tile", "--out", "x"], "give --slides or --tiles"),
        (["tile", "--out", "x", "--slides", ".", "--tiles", "."], "give --slides or --tiles"),
        (["tile", "--out", "x", "--tiles", ".", "--masks", "."], "are for --slides"),
        (["tile", "--out", "x", "--slides", ".", "--manifest", "no"], "--manifest no is not"),
        (["huge"], "invalid choice: 'huge'"),
        ([], "required: STAGE"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_options_is_named(capsys, arguments, message):
    code, text = said(capsys, *arguments)
    assert code == 2
    assert message in text


def test_networks_that_a_stage_has_no_use_for_are_named(capsys, tmp_path):
    """A script may hand one list of networks to all stages."""
    given = ("--recipe", "huge", "--data", tmp_path, "--out", tmp_path, "--encoder", tmp_path)
    assert main([*map(str, ("decoder", *given, "--vae", tmp_path, "--sit", tmp_path))]) == 2
    error = capsys.readouterr().err
    assert "training decoder makes no use of --encoder, --sit\n" in error
    assert "no recipe huge_decoder" in error


def test_samplers_are_those_of_the_model():
    from cytosyn_aug.model.sampler import Sampler

    assert get_args(Sampler) == SAMPLERS


def test_the_modules_of_the_command_are_what_python_runs():
    done = subprocess.run(
        [sys.executable, "-m", "training", "decoder", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m training decoder")
