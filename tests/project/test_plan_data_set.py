"""The plan of a data set, by hand; and the page about scale, with its job script."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cytosyn_aug.cache.encodings import encodings_spec
from cytosyn_aug.cli.main import parse
from examples.plan_data_set import Fleet, Volume, labour, main, storage
from tests.support.offline_runs import rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "how-to" / "scale.md"


def test_storage_by_hand():
    volume = Volume(
        slides=2, tiles=1000, variants=3, format="png", unit_tiles=256, tile_bytes=100, cls_width=10
    )
    kept = storage(volume)
    assert kept["tiles"] == {"bytes": 100_000, "files": 2}
    assert kept["features"] == {"bytes": 1000 * (4 * 10 + 48 + 46), "files": 4}
    assert kept["moments"] == {"bytes": 1000 * (2 * 2 * 4 * 28 * 28 + 48 + 46), "files": 4}
    assert kept["results"] == {"bytes": round(3000 * 2.2 * 224 * 224), "files": 3000}
    assert kept["while_running"]["files"] == 8


def test_records_are_those_of_real_caches(generator):
    width = len(generator.null_condition)
    volume = Volume(slides=1, tiles=1, tile=generator.tile, cls_width=width)
    for content in ("features", "moments"):
        expected = encodings_spec(generator, [content]).record_bytes
        assert storage(volume)[content]["bytes"] == expected


def test_labour_by_hand():
    volume = Volume(slides=1, tiles=72_000, variants=2, format="tar", unit_tiles=1000)
    found = labour(volume, Fleet(tiles_per_s=10, workers=4, price=3, task_hours=0.5))
    assert (found["worker_hours"], found["hours"], found["price"]) == (2, 0.5, 6)
    assert found["array_tasks"] == 4
    assert found["processors_per_worker"] == round(10 * (0.0018 + 2 * 0.0013), 2)
    assert found["bytes_per_s"] == 40 * (74_000 + 2 * 2 * 224 * 224)
    assert found["restart_s"] == round(72_000 * 24e-6 + 72 * 1.9e-3, 1)
    assert found["lost_worker_s"] == 2 * 4 * 1000 / 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slides", "10", "--tiles", "0"], "expected at least 1"),
        *(
            (["--slides", "10", "--tiles", "9", *words], said)
            for words, said in [
                (["--tile-bytes", "nan"], "a tile has nan bytes"),
                (["--tiles-per-s", "0"], "expected finite numbers of more than 0"),
                (["--tiles-per-s", "nan"], "a task are nan, 1"),
                (["--tiles-per-s", "inf"], "a task are inf, 1"),
                (["--tiles-per-s", "9", "--task-hours", "nan"], "and nan, expected finite"),
                (["--tiles-per-s", "9", "--price", "nan"], "price is nan"),
                (["--tiles-per-s", "9", "--price", "-1"], "price is -1"),
            ]
        ),
    ],
)
def test_what_cannot_be_is_refused(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--slides", "1.5", "--tiles", "9"])


def test_the_page_has_the_numbers_of_the_script(capsys):
    words = ["--slides", "10000", "--tiles", "40e6", "--unit-tiles", "1024"]
    assert main(words) == 0
    kept = json.loads(capsys.readouterr().out)["storage"]
    table = re.findall(r"^\| .* \| ([\d.]+) TB \| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(table) == len(kept)
    for (terabytes, files), row in zip(table, kept.values(), strict=True):
        digits = len(terabytes.partition(".")[2])
        assert float(terabytes) == round(row["bytes"] / 1e12, digits)
        assert files == f"{row['files']:,}"


def test_the_commands_of_the_page_are_understood(capsys):
    programs = r"cytosyn-aug|python examples/plan_data_set\.py"
    lines = re.findall(rf"^(?:{programs}) .*[^\\\n]$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        first, *words = shlex.split(line.replace("RATE", "100"), comments=True)
        if first == "python":
            assert main(words[1:]) == 0
        else:
            parse(words)


@pytest.mark.skipif(shutil.which("bash") is None, reason="without bash the job script is not run")
@pytest.mark.slow
def test_the_job_script_of_the_page_completes_a_run(tree, tmp_path, model_folder, laboratories):
    text = PAGE.read_text()
    (script,) = re.findall(r"^```bash\n(#!/bin/bash.*?)^```", text, re.MULTILINE | re.DOTALL)
    for name, path in {"TILES": tree, "OUT": tmp_path / "out", "LAB": laboratories[0]}.items():
        script, count = re.subn(rf"^{name}=.*$", f"{name}={path}", script, flags=re.MULTILINE)
        assert count == 1
    for words, tiny in [
        ("--device cuda --dtype bfloat16", f"--model {model_folder} --batch-size 2"),
        ("--unit-tiles 1024", "--unit-tiles 1"),
    ]:
        assert words in script
        script = script.replace(words, tiny)
    program, job = tmp_path / "bin" / "cytosyn-aug", tmp_path / "job.sh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec {sys.executable} -m cytosyn_aug "$@"\n')
    program.chmod(0o755)
    job.write_text(script)
    num_tasks = 2  # of 32: every task loads torch
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_ARRAY_TASK_COUNT": str(num_tasks),
        "SLURM_CPUS_PER_TASK": "1",
    }
    for task in range(num_tasks):
        assert not (tmp_path / "out" / "manifest.parquet").exists()
        own = environment | {"SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["bash", job], env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    statuses = [row["status"] for row in rows(tmp_path / "out")]
    assert sorted(statuses) == ["blank"] + 9 * ["edited"]
