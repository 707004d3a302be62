"""full.sh itself, with commands that only note what they were asked to do."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from training.command_line import parse
from training.plan import launch_text

SCRIPT = Path(__file__).parents[2] / "training" / "full.sh"
STAGES = ["tile", "repae", "latents", "distil", "decoder", "export", "evaluate", "export"]
COMMAND = """#!/usr/bin/env bash
trap 'echo saved >> "$NOTES"; exit 143' TERM
echo "$(basename "$0") $*" >> "$NOTES"
[ "$(basename "$0")" != torchrun ] || echo "patience $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$NOTES"
case "$*" in
*"training tile"*) exit "$TILE_EXIT" ;;
*"training $SLOW"*) sleep 30 & wait ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    for name in ("python", "torchrun", "scontrol"):
        (tmp_path / name).write_text(COMMAND)
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()

    def start(tile_exit=0, slow="none"):
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "GPUS": "8"}
        given |= {"TILE_EXIT": str(tile_exit), "SLOW": slow, "SLURM_JOB_ID": "17"}
        arguments = [SCRIPT, "slides", "manifest.txt", "sd-vae", "h0-mini", "out"]
        return subprocess.Popen(arguments, env=os.environ | given), notes

    return start


def stages(notes):
    words = [shlex.split(line) for line in notes.read_text().splitlines()]
    return [line[line.index("training") + 1] for line in words if "training" in line]


def test_the_script_runs_what_a_dry_run_prints(start):
    process, notes = start()
    assert process.wait(30) == 0
    ran = [shlex.split(line) for line in notes.read_text().splitlines() if "torchrun" in line]
    for words in ran:
        launch, every_stage = launch_text("xl", words[words.index("training") + 1]).split("\n")[1:]
        printed = shlex.split(launch)[2:]
        assert len(printed) == len(words)
        assert all(p == w or p.isupper() for p, w in zip(printed, words, strict=True))
    usage = next(x for x in SCRIPT.read_text().splitlines() if "usage:" in x).split("usage: ")[1]
    assert every_stage.endswith(f" {usage}")
    assert "--gpus-per-node 8 " in every_stage


def test_the_script_gives_no_stage_an_option_that_it_does_not_have(start):
    process, notes = start()
    assert process.wait(30) == 0
    lines = [shlex.split(x) for x in notes.read_text().splitlines() if "-m training" in x]
    assert len(lines) == len(STAGES)
    for words in lines:
        parse(words[words.index("training") + 1 :])


def test_a_recipe_of_one_process_needs_no_launcher():
    assert launch_text("tiny", "repae") == ""


@pytest.mark.parametrize("tile_exit", [0, 1])
def test_all_stages_run_in_order_although_slides_failed(start, tile_exit):
    process, notes = start(tile_exit)
    assert process.wait(30) == 0
    assert stages(notes) == STAGES
    assert notes.read_text().count("--nproc-per-node 8") == 4
    assert notes.read_text().count("--compile") == 3
    assert "--unseen out/tiles/unseen" in notes.read_text()


def test_torchrun_lets_a_stage_save_until_shortly_before_slurm_kills_it(start):
    process, notes = start()
    assert process.wait(30) == 0
    printed = launch_text("xl", "repae")
    slurm_s = int(re.search(r"TERM@(\d+)", printed)[1])
    patience_s = [int(x.split()[1]) for x in notes.read_text().splitlines() if "patience" in x]
    assert len(patience_s) == 4
    assert all(slurm_s - 120 < x < slurm_s for x in patience_s)
    assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={patience_s[0]} torchrun " in printed


def test_nothing_follows_a_tile_stage_that_could_not_run(start):
    process, notes = start(tile_exit=2)
    assert process.wait(30) == 2
    assert stages(notes) == ["tile"]


def test_a_signal_reaches_the_stage_which_saves_and_the_job_is_queued_again(start):
    process, notes = start(slow="distil")
    while "distil" not in notes.read_text():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert notes.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 17"]
    assert stages(notes)[-1] == "distil"
