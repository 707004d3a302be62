"""What a data set takes, by hand; and the page that tells it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from cytosyn_aug.cache.encodings import encodings_spec
from cytosyn_aug.cli.budget import Fleet, Volume, labour, storage
from cytosyn_aug.cli.main import main, parse

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


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
    assert main(["budget", *words]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["budget", "--slides", "1.5", "--tiles", "9"])


def test_the_page_has_the_numbers_of_the_command(capsys):
    words = ["--slides", "10000", "--tiles", "40e6", "--unit-tiles", "1024"]
    assert main(["budget", *words]) == 0
    kept = json.loads(capsys.readouterr().out)["storage"]
    table = re.findall(r"^\| .* \| ([\d.]+) TB \| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(table) == len(kept)
    for (terabytes, files), row in zip(table, kept.values(), strict=True):
        digits = len(terabytes.partition(".")[2])
        assert float(terabytes) == round(row["bytes"] / 1e12, digits)
        assert files == f"{row['files']:,}"


def test_the_commands_of_the_page_are_understood():
    lines = re.findall(r"^cytosyn-aug (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) > 4
    for line in lines:
        command = line.partition(">")[0].replace("RATE", "100")
        args = parse(shlex.split(command, comments=True))
        if args.command == "slurm":
            parse(args.words[1:])
