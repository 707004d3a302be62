"""Runs: resumed, shared, refused; killed at any moment, on disks that are full or closed."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cytosyn_aug import TileGenerator, offline
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.cli.main import main, parse
from cytosyn_aug.runs.recipes import Work
from tests.support.offline_runs import QUIET, augment, digest, rows
from tests.support.python_process import start_python
from tests.support.synthetic import save_tile as save
from tests.support.synthetic import synthetic_tiles


def command(tree, out, model_folder, laboratories, *more):
    return [
        "augment",
        *(str(tree), str(out), "--model", str(model_folder), "--batch-size", "2"),
        *("--variants", "2", "--unit-tiles", "3", "--references", *map(str, laboratories)),
        *more,
    ]


def test_shards_together_are_the_whole(tree, tmp_path, small, laboratories):
    augment(tree, tmp_path / "whole", small, laboratories)
    out = tmp_path / "out"
    first = augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    assert not first.is_complete
    assert not (out / "manifest.parquet").exists()
    second = augment(tree, out, small, laboratories, work=Work(shard=(1, 2), readers=1, writers=1))
    assert second.is_complete
    assert digest(out) == digest(tmp_path / "whole")


def test_a_rerun_does_nothing_and_changes_nothing(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    assert augment(tree, out, small, laboratories).counts == {"blank": 2, "edited": 18}
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(("format", "gone"), [("png", "tumour"), ("tar", "shard-000001.tar")])
def test_results_that_somebody_removed_are_made_again(
    tree, tmp_path, small, laboratories, format, gone
):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, format=format)
    before = digest(out)
    (out / gone).rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match=f"done again, because {gone}.* is gone"):
        summary = augment(tree, out, small, laboratories, format=format)
    assert summary.is_complete
    assert digest(out) == before


def test_dry_run_writes_nothing_and_counts(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    work = replace(QUIET, dry_run=True)
    estimate = augment(tree, out, small, laboratories, work=work).estimate
    assert not out.exists()
    assert (estimate["tiles_to_do"], estimate["results"], estimate["units"]) == (10, 20, 4)
    assert estimate["with_masks"] == 1
    assert estimate["tiles_per_s"] > 0
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    before = digest(out)
    assert augment(tree, out, small, laboratories, work=work).estimate["units_to_do"] == 2
    assert digest(out) == before


def test_a_bar_tells_tiles_rate_and_what_is_left(tree, tmp_path, small, laboratories, capsys):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    assert capsys.readouterr().err == ""
    augment(tree, out, small, laboratories, work=Work())
    first, *_, last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    assert re.search(r" 6/10 \[00:00<\?, \?tile/s\]", first)  # what the other shard has done
    assert re.search(r"100%.* 10/10 \[\d\d:\d\d<00:00, +[\d.]+(tile/s|s/tile)\]", last)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["png", "tar", "latents"])
def test_dry_run_tells_the_bytes_of_what_is_written(
    tmp_path, small, laboratories, monkeypatch, format
):
    # As large as the model's where a cache needs it, and else larger: results are as sources are.
    size = small.tile.size_px * (1 if format == "latents" else 3)
    for k, tile in enumerate(synthetic_tiles(6, size=size)):
        save(tmp_path / "in" / f"{k}.png", tile)
    out, settings = tmp_path / "out", {"references": laboratories, "format": format}
    work = replace(QUIET, dry_run=True)
    estimate = offline.augment(tmp_path / "in", out, small, work=work, **settings).estimate
    offline.augment(tmp_path / "in", out, small, work=QUIET, **settings)
    kept = {"png": "*.png", "tar": "*.tar", "latents": "shards/*"}[format]
    written = sum(f.stat().st_size for f in out.glob(kept))
    assert estimate["output_bytes"] == pytest.approx(written, rel=0.3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written // 3))
    with pytest.raises(ValueError, match="the results take about"):
        offline.augment(tmp_path / "in", tmp_path / "other", small, work=QUIET, **settings)


def test_another_recipe_is_refused_with_the_difference(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    with pytest.raises(ValueError, match=r"recipe\.seed: 0 -> 1"):
        augment(tree, out, small, laboratories, seed=1)
    save(tree / "new.png", synthetic_tiles(1, seed=9)[0])
    with pytest.raises(ValueError, match=r"input\.num_tiles: 10 -> 11"):
        augment(tree, out, small, laboratories)
    summary = augment(tree, out, small, laboratories, work=replace(QUIET, overwrite=True))
    assert summary.counts["edited"] == 20
    augment(tree, tmp_path / "fresh", small, laboratories)
    assert digest(out) == digest(tmp_path / "fresh")


def test_a_folder_of_something_else_is_refused(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    for work in (QUIET, replace(QUIET, overwrite=True), replace(QUIET, dry_run=True)):
        with pytest.raises(ValueError, match="not empty"):
            augment(tree, out, small, laboratories, work=work)


def kill(words, out, folder):
    """Start a command and kill it at some moment after it began to write."""
    before = len(list(out.rglob("*")))
    process = start_python("-m", "cytosyn_aug.cli.main", *words, folder=folder)
    while len(list(out.rglob("*"))) == before and process.is_alive():
        time.sleep(0.01)
    time.sleep(random.Random(process.pid).uniform(0, 0.5))
    process.kill()
    process.join()


def all_records(folder, run):
    """Return every record that a run vouches for, and fail if one is not there."""
    cells = [(r["key"], r["variant"]) for r in rows(run) if r["status"] in ("edited", "cached")]
    found = LatentCache.open(folder).get(*map(list, zip(*cells, strict=True)))
    assert found.is_found.all()
    return {name: field.tolist() for name, field in found.fields.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "tar", "latents", "cache", "sample"])
def test_killed_anywhere_and_run_again_it_is_the_same(
    tree, tmp_path, model_folder, laboratories, kind
):
    def words(out):
        if kind in ("png", "tar", "latents"):
            return command(tree, out, model_folder, laboratories, "--format", kind)
        model = ("--model", str(model_folder), "--batch-size", "2", "--unit-tiles", "3")
        if kind == "cache":
            return ["cache", str(tree), str(out), *model]
        return ["sample", str(out), "--n", "10", "--steps", "2", *model]

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(words(whole)) == 0
    for _ in range(2 if kind == "png" else 1):
        kill(words(out), out, tmp_path)
    assert main(words(out)) == 0
    assert not list(out.rglob(".work"))
    made, expected = digest(out), digest(whole)
    if kind in ("latents", "cache"):  # shards are named by the time, and may hold records twice
        runs = [next(folder.rglob("manifest.parquet")).parent for folder in (out, whole)]
        assert all_records(out, runs[0]) == all_records(whole, runs[1])
        made, expected = (
            {name: sha for name, sha in files.items() if not name.startswith("shards/")}
            for files in (made, expected)
        )
    assert made == expected


class Killed(BaseException):
    """What stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("format", ["png", "tar"])
def test_ended_at_any_write_and_run_again_it_is_the_same(
    tree, tmp_path, small, laboratories, monkeypatch, format
):
    augment(tree, tmp_path / "whole", small, laboratories, format=format)
    out = tmp_path / "out"
    real, left = os.fsync, [0]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(descriptor)

    for number in (0, 1, 2, 3, 5, 8, 13, 21):
        left[0] = number
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "fsync", fsync)
            augment(tree, out, small, laboratories, format=format)
    assert augment(tree, out, small, laboratories, format=format).is_complete
    assert digest(out) == digest(tmp_path / "whole")


# Holds its first unit until another process holds one too, and notes the units that it did.
SHARING = """
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from cytosyn_aug.cli.main import main, parse
from cytosyn_aug.runs.folder import RunFolder

mine, others = Path("units"), Path(sys.argv[1]) / "units"
real_claim, real_receipt = RunFolder.claim, RunFolder.write_receipt

@contextmanager
def claim(self, unit):
    with real_claim(self, unit) as is_mine:
        if is_mine:
            mine.touch()
            end = time.monotonic() + 60
            while not others.exists() and time.monotonic() < end:
                time.sleep(0.01)
        yield is_mine

def write_receipt(self, unit, rows):
    with mine.open("a") as stream:
        stream.write(f"{unit.number} ")
    real_receipt(self, unit, rows)

RunFolder.claim, RunFolder.write_receipt = claim, write_receipt
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_share_one_run_and_do_each_unit_once(
    tree, tmp_path, model_folder, laboratories
):
    assert main(command(tree, tmp_path / "whole", model_folder, laboratories)) == 0
    out = tmp_path / "out"
    words = command(tree, out, model_folder, laboratories)
    (tmp_path / "sharing.py").write_text(SHARING)
    folders = tmp_path / "first", tmp_path / "second"
    processes = []
    for folder, other in zip(folders, folders[::-1], strict=True):
        folder.mkdir()
        line = (str(tmp_path / "sharing.py"), str(other), *words)
        processes.append(start_python(*line, folder=folder))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = ((folder / "units").read_text().split() for folder in folders)
    assert first
    assert second
    assert sorted(first + second) == ["0", "1", "2", "3"]
    assert digest(out) == digest(tmp_path / "whole")


PLAIN_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="this processor has nothing to leave away: another kind of machine is not verified",
)
def test_another_kind_of_machine_differs_by_one_grey_level(
    tree, tmp_path, model_folder, laboratories
):
    """Without vector instructions kernels add up in another order, as those of others do."""
    (tree / "tumour" / "slide1_10_1_mask.png").unlink()
    words = {
        "stain": command(tree, "", model_folder, laboratories, "--strength", "0.5", "1"),
        "resample": [
            *("augment", str(tree), "", "--model", str(model_folder)),
            *("--mode", "resample", "--variants", "2", "--steps", "2"),
        ],
    }
    there = "import json, sys, torch; from cytosyn_aug.cli.main import main\n"
    there += "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
    there += "assert not any([main(words) for words in json.loads(sys.argv[1])])"
    for mode, line in words.items():
        assert main([*line[:2], str(tmp_path / "here" / mode), *line[3:]]) == 0
    lines = [[*w[:2], str(tmp_path / "there" / mode), *w[3:]] for mode, w in words.items()]
    environment = os.environ | PLAIN_PROCESSOR
    subprocess.run([sys.executable, "-c", there, json.dumps(lines)], env=environment, check=True)
    for mode in words:
        here, other = rows(tmp_path / "here" / mode), rows(tmp_path / "there" / mode)
        for row, same in zip(here, other, strict=True):
            images = (
                np.asarray(Image.open(tmp_path / name / mode / row["output"]), np.int16)
                for name in ("here", "there")
            )
            assert np.abs(np.subtract(*images)).max() <= 1
            for name in ("similarity", "colour_distance"):
                assert row.pop(name) == pytest.approx(same.pop(name), abs=1e-3)
            assert row == same


def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    tree,
    tmp_path,
    small,
    laboratories,
    monkeypatch,
):
    augment(tree, tmp_path / "whole", small, laboratories)
    out, left = tmp_path / "out", [9]
    real = os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device.*out"):
            augment(tree, out, small, laboratories)
    augment(tree, out, small, laboratories)
    assert digest(out) == digest(tmp_path / "whole")


def test_a_reference_of_other_pixels_makes_another_run(tree, tmp_path, small, laboratories):
    lab = tmp_path / "lab"
    shutil.copytree(laboratories[0], lab)
    for file in lab.iterdir():  # BMP, so that other pixels take as many bytes
        with Image.open(file) as image:
            image.save(file.with_suffix(".bmp"))
        file.unlink()
    augment(tree, tmp_path / "out", small, [lab, laboratories[1]])
    augment(tree, tmp_path / "out", small, [lab, laboratories[1]])
    file = next(lab.iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)holds another run.*references"):
        augment(tree, tmp_path / "out", small, [lab, laboratories[1]])


def test_a_disk_that_is_too_small_is_refused_before_work(
    tree,
    tmp_path,
    small,
    laboratories,
    monkeypatch,
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match="has 1,000 bytes free"):
        augment(tree, tmp_path / "out", small, laboratories)
    assert not (tmp_path / "out").exists()  # or it would refuse another format, as advised


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder is closed to root too")
def test_a_closed_folder_is_named(tree, tmp_path, small, laboratories, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # there is no room there either
    with pytest.raises(OSError, match=r"give a folder that can be made and written: '/proc/self/x"):
        augment(tree, Path("/proc/self/x/out"), small, laboratories)


def test_links_that_lead_out_are_refused(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 4)))
    (tmp_path / "elsewhere").mkdir()
    (out / "tumour").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        augment(tree, out, small, laboratories)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", [".work/receipts", ".work/locks", ".work/files", "shards"])
def test_links_in_place_of_a_runs_own_folders_are_refused(
    tree, tmp_path, small, laboratories, name
):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    settings = {"format": "latents"}
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 4)), **settings)
    (out / name).rename(elsewhere)
    before = digest(elsewhere)
    (out / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is a link, to {elsewhere}"):
        augment(tree, out, small, laboratories, **settings)
    assert digest(elsewhere) == before
    (out / name).unlink()
    elsewhere.rename(out / name)
    (tmp_path / "link").symlink_to(out)  # of the whole folder is fine
    assert augment(tree, tmp_path / "link", small, laboratories, **settings).is_complete


@pytest.mark.parametrize("name", ["shards", "runs"])
def test_links_in_a_cache_are_refused_before_it_is_made(tree, tmp_path, small, name):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    elsewhere.mkdir()
    (cache / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is a link, to {elsewhere}"):
        offline.cache(tree, cache, small, work=QUIET)
    assert [f.name for f in tmp_path.glob("*/*")].count(name) == len(list(cache.iterdir())) == 1


def test_a_tar_file_that_is_a_link_is_replaced_and_not_written_through(
    tree, tmp_path, small, laboratories
):
    out, other = tmp_path / "out", tmp_path / "other.tar"
    other.write_bytes(b"mine")
    augment(tree, out, small, laboratories, format="tar", work=replace(QUIET, shard=(0, 4)))
    (out / "shard-000001.tar").symlink_to(other)
    augment(tree, out, small, laboratories, format="tar")
    assert other.read_bytes() == b"mine"
    assert not (out / "shard-000001.tar").is_symlink()


def test_a_cache_of_something_else_is_left_as_it_was_and_never_overwritten(tree, tmp_path, small):
    cache = tmp_path / "cache"
    offline.cache(tree, cache, small, contents=["features"], work=QUIET)
    before = digest(cache)
    with pytest.raises(ValueError, match="use another folder"):
        offline.cache(tree, cache, small, contents=["moments"], work=QUIET)
    with pytest.raises(ValueError, match="overwrite does not remove it"):
        offline.cache(tree, cache, small, work=replace(QUIET, overwrite=True))
    assert digest(cache) == before
    assert len(list((cache / "runs").iterdir())) == 1


def test_results_among_their_sources_are_refused(tree, small, laboratories):
    for out in (tree, tree / "out", tree.parent):
        with pytest.raises(ValueError, match="lie in each other"):
            augment(tree, out, small, laboratories)


def test_a_changed_file_costs_its_unit_and_a_broken_one_loses_its_results(
    tree,
    tmp_path,
    small,
    laboratories,
):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.png")}
    save(tree / "stroma" / "slide0_60_6.png", synthetic_tiles(1, seed=3)[0])
    (tree / "tumour" / "slide1_10_1.png").write_bytes(b"broken")
    summary = augment(tree, out, small, laboratories)
    assert summary.counts == {"blank": 2, "edited": 16, "failed": 1}
    assert [name for name, _ in summary.failed] == ["tumour/slide1_10_1.png"]
    files = {f.relative_to(out).as_posix() for f in out.rglob("*.png")}
    assert files == {p for r in rows(out) for p in (r["output"], r["mask"]) if p}
    untouched = [f for f in out.rglob("*.png") if f.stat().st_mtime_ns == before[f]]
    assert untouched  # of units whose files are as they were


def test_what_has_no_name_of_its_own_leaves_the_results_of_others(
    tree, tmp_path, small, laboratories
):
    first, other = "tumour/slide1_10_1.png", "tumour/slide1_10_1.bmp"
    (tree / other).write_bytes((tree / first).read_bytes())
    table, out = tree / "tiles.csv", tmp_path / "out"
    absent = "stroma/slide0_60_6.jpg", f"{300 * 'n'}.png"  # found so before it has a name
    names = [*absent, "stroma/slide0_60_6.png", first, other, first]
    table.write_text("\n".join(["path", *names]))
    for _ in range(2):  # the second time to try again what failed
        summary = augment(table, out, small, laboratories, unit_tiles=1)
        assert summary.counts["failed"] == 5
        assert [row["output"] for row in rows(out) if row["source"] == first][:2] == [
            "tumour/slide1_10_1_v0.png",
            "tumour/slide1_10_1_v1.png",
        ]
        assert len(list(out.rglob("*.png"))) == 2


@pytest.mark.slow
def test_exit_codes_and_messages(tree, tmp_path, model_folder, laboratories, capsys):
    out = tmp_path / "out"
    words = command(tree, out, model_folder, laboratories)
    (tree / "stroma" / "bro\nken.png").write_bytes(b"nothing")
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 2 blank, 18 edited, 1 failed")
    assert "failed: stroma/bro\\nken.png is damaged or no image" in printed.err
    assert main([*words, "--seed", "5"]) == 2
    assert "recipe.seed: 0 -> 5" in capsys.readouterr().err
    assert main(["augment", str(tmp_path / "absent"), str(out)]) == 2
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["units_to_do"] == 1  # the failed one
    save(tree / "stroma" / "bro\nken.png", synthetic_tiles(1, seed=5)[0])
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("augment IN OUT", offline.augment),
        ("normalize IN OUT --reference R", offline.normalize),
        ("normalize-slide IN OUT --reference R", offline.normalize_slides),
        ("cache IN OUT", offline.cache),
        ("sample OUT --n 1", offline.sample),
        ("report OUT", offline.report),
    ],
)
def test_python_has_the_options_of_the_commands_with_their_defaults(words, function):
    called = {"quiet": "progress", "actor_cpus": "cpus", "actor_gpus": "gpus", "model": "source"}
    called |= {"keep_thumbnail": "keeps_thumbnail", "allow_damage": "allows_damage"}
    called |= {"out": "folder"} if function is offline.cache else {}
    homes = [offline.RayCluster, TileGenerator.from_pretrained, offline.Work, function]
    if function is offline.normalize_slides:
        homes.append(offline.SlideRecipe)
    known = {}
    for home in homes:
        known |= {name: p.default for name, p in signature(home).parameters.items()}
    options = vars(parse(words.split()))
    options["quiet"] = not options.get("quiet", False)  # shows progress
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    for name in options.keys() - {"command", "run", "engine", "source"}:
        value, expected = options[name], known[called.get(name, name)]
        if isinstance(value, list):
            value = value[0] if len(value) == 1 else tuple(value)
        is_set = (name, function) != ("writers", offline.normalize_slides)  # not there
        assert value == expected or expected is Parameter.empty or not is_set, name


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--guidance-scale", "nan"]])
def test_settings_that_cannot_be_drawn_with_do_not_lock_a_folder(
    tree, tmp_path, model_folder, laboratories, capsys, wrong
):
    out = tmp_path / "out"
    words = [*command(tree, out, model_folder, laboratories), "--mode", "resample", *wrong]
    sample = ["sample", str(out), "--model", str(model_folder), "--n", "2", *wrong]
    for each in (words, sample):
        assert main(each) == 2
        assert "steps is 0" in (said := capsys.readouterr().err) or "scale is nan" in said
        assert not out.exists()
