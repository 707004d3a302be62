"""Runs on Ray: the same as in one process, also when actors die; ended cleanly, refused clearly."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from cytosyn_aug import StainReference
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.cli.main import main
from cytosyn_aug.runs import execute as running
from cytosyn_aug.runs import plan as plans
from cytosyn_aug.runs import ray_actors
from cytosyn_aug.runs.execute import cut_units
from cytosyn_aug.runs.folder import open_run
from cytosyn_aug.runs.plan import plan_slides
from cytosyn_aug.runs.ray_actors import Death, RayCluster, on_actors
from cytosyn_aug.runs.recipes import NormalizeRecipe, SampleRecipe, Tiles
from cytosyn_aug.runs.unit_work import UnitWorker, software
from cytosyn_aug.slides.recipe import SlideRecipe
from tests.runs.test_execute import command
from tests.support.offline_runs import QUIET, augment, digest, rows
from tests.support.synthetic import synthetic_tiles, write_slide

pytestmark = pytest.mark.slow  # where Ray is installed, minutes
MARK = "CYTOSYN_AUG_TEST_MARK"
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}  # when busy
RAY = ["--engine", "ray", "--actors", "2", "--quiet"]


@pytest.fixture(scope="module")
def ray():
    """A Ray of this machine with room for two actors, small and silent."""
    module = pytest.importorskip("ray", reason="without Ray its engine is not verified")
    os.environ.update(SETTINGS)
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not have it
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # and so actors ask for one processor each
    module.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
    )
    yield module
    module.shutdown()
    torch.set_num_threads(before)


def test_an_address_where_nothing_answers_is_refused_before_ray_asks_for_minutes():
    silent = SimpleNamespace(is_initialized=lambda: False)  # and fails if it is asked to connect
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ConnectionError, match=f"nothing answers at {address}: .*ray start"),
            ray_actors._connected(silent, RayCluster(address=address), 0),
        ):
            pass


def dying_once(edit, mark, batches):
    """Return an edit whose process kills itself, once, after so many batches."""
    done = []

    def edit_or_die(batch):
        done.append(batch)
        if len(done) == batches and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from edit(batch)

    return edit_or_die


def test_a_killed_actor_changes_nothing(
    ray, tree, tmp_path, model_folder, laboratories, monkeypatch, capsys
):
    (tree / "stroma" / "broken.png").write_bytes(b"nothing")
    assert main(command(tree, tmp_path / "one", model_folder, laboratories)) == 1
    said = capsys.readouterr().out.removeprefix(str(tmp_path / "one"))
    plan, mark = plans.plan_augment, tmp_path / "mark"

    def plan_death(*args):
        run = plan(*args)
        edit = dying_once(run.work.edit, mark, batches=2)
        return replace(run, work=replace(run.work, edit=edit))

    monkeypatch.setattr(plans, "plan_augment", plan_death)
    out = tmp_path / "many"
    words = command(tree, out, model_folder, laboratories, *RAY)
    assert main(words) == 1
    assert mark.exists()
    assert capsys.readouterr().out.removeprefix(str(out)) == said
    assert digest(out) == digest(tmp_path / "one")
    assert not (out / ".work").exists()
    (tree / "stroma" / "broken.png").unlink()
    assert main(words) == 2  # another input, as without Ray


def test_an_interrupted_run_leaves_no_process_and_resumes(
    tree, tmp_path, model_folder, laboratories
):
    pytest.importorskip("ray", reason="without Ray its engine is not verified")
    out = tmp_path / "out"
    # So many variants that no waiting for a processor here outlasts the run.
    many = ["--variants", "40", "--strength", "0.2", "1", "--unit-tiles", "1"]
    words = command(tree, out, model_folder, laboratories, *many)
    process = subprocess.Popen(
        [sys.executable, "-m", "cytosyn_aug.cli.main", *words, *RAY, "--actors", "1"],
        env=os.environ | SETTINGS | {MARK: str(out)},
        start_new_session=True,  # a group of its own, all of which a terminal interrupts
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(out.rglob("*.png")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "stopped" in said
    deadline = time.monotonic() + 60
    while (left := marked(str(out))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert not (out / "manifest.parquet").exists()
    assert main(words) == 0
    words[2] = str(tmp_path / "one")
    assert main(words) == 0
    assert digest(out) == digest(tmp_path / "one")


def marked(value):
    """Return the command lines of all processes that were started with the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes()[:80])
        except OSError:  # gone, or somebody else's
            continue
    return found


class AllUnits:
    """A worker that does whole runs, by number, one process for all of them."""

    def __init__(self, runs):
        self.runs = runs

    def do(self, number):
        run = self.runs[number]
        worker = UnitWorker(run, 2, 2, "cpu", 1)
        for unit in cut_units(run.listing, run.unit_items):
            worker.do(unit)


def test_every_command_can_be_done_elsewhere(ray, tree, tmp_path, small, laboratories):
    tiles = Tiles(source=tree, unit_tiles=3)
    by_slide = {"method": "cytosyn", "source": "slide"}
    classical = {"method": "macenko", "source": "slide"}
    conditions = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))

    def runs(out):
        recipes = [NormalizeRecipe(**by_slide), NormalizeRecipe(**classical)]
        for k, recipe in enumerate(recipes):
            yield plans.plan_normalize(
                tiles, out / f"normalised{k}", small, laboratories[:1], recipe, "tar"
            )
        recipe = SampleRecipe(steps=2, seed=3)
        yield plans.plan_sample(out / "sampled", small, 7, conditions, recipe, "webp", 3)
        yield plans.plan_cache(tiles, out / "cache", small, ["moments", "features"])
        lab = StainReference.fit(small, laboratories[0])
        yield plan_slides(slides, out / "slides", small, lab, "cytosyn", SlideRecipe())

    slides = tmp_path / "slides"
    slides.mkdir()
    for k in range(2):
        pixels = synthetic_tiles(1, seed=k, size=896)[0].permute(1, 2, 0).numpy()
        write_slide(slides / f"{k}.svs", pixels, mpp="0.5", power="20")
    one, many = list(runs(tmp_path / "one")), list(runs(tmp_path / "many"))
    for run in one:
        assert running.do_run(run, QUIET).is_complete
    for run in many:
        with open_run(
            run.folder, run.identity, software(), overwrite=False, context=run.context
        ) as folder:
            folder.prepare()
    make = partial(AllUnits, many)
    assert dict(on_actors(make, range(5), RayCluster(actors=1))) == dict.fromkeys(range(5))
    for run in many:
        assert running.do_run(run, QUIET).is_complete  # writes the manifest
    for name in ("normalised0", "normalised1", "sampled", "slides"):
        assert digest(tmp_path / "many" / name) == digest(tmp_path / "one" / name)
    manifests = [pq.read_table(run.folder / "manifest.parquet") for run in (one[3], many[3])]
    assert manifests[0].equals(manifests[1], check_metadata=True)
    caches = [LatentCache.open(tmp_path / name / "cache") for name in ("one", "many")]
    keys = [row["key"] for row in manifests[0].to_pylist()]
    records = [cache.get(keys) for cache in caches]
    assert all(found.is_found.all() for found in records)
    for name, values in records[0].fields.items():
        assert torch.equal(values, records[1].fields[name])


class Lethal:
    """A worker that notes what it does, and dies of unit 3 every time."""

    def __init__(self, folder):
        self.folder = folder

    def do(self, unit):
        if unit == 3:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == 7:
            raise OSError(errno.ENOSPC, "No space left on device", "results")
        (self.folder / str(unit)).touch()


class Elsewhere:
    """What cannot be read where a module is missing."""

    def __reduce__(self):
        return eval, ("__import__('module_of_another_version')",)


def test_a_unit_that_kills_its_actors_is_given_up_and_no_other(ray, tmp_path):
    answers = dict(on_actors(partial(Lethal, tmp_path), range(6), RayCluster(actors=2)))
    death = answers.pop(3)
    assert isinstance(death, Death)
    assert "died in each of 3 attempts" in death.reason
    assert answers == dict.fromkeys([0, 1, 2, 4, 5])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0", "1", "2", "4", "5"]


def test_errors_of_actors_end_the_run_under_their_own_names(ray, tmp_path):
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(on_actors(partial(Lethal, tmp_path), range(6, 9), RayCluster(actors=1)))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "results")
    with pytest.raises(ZeroDivisionError):
        list(on_actors(lambda: 1 // 0, range(3), RayCluster(actors=1)))
    with pytest.raises(OSError, match="3 actors in a row died while they began"):
        list(on_actors(partial(os._exit, 1), range(3), RayCluster(actors=1)))
    with pytest.raises(OSError, match=r"all machines need the same versions.*No module named"):
        list(on_actors(Elsewhere(), range(3), RayCluster(actors=1)))
    with pytest.raises(ValueError, match=r"asks for 1 CPUs and 1 GPUs.* that: 2 CPUs and 0 GPUs"):
        list(on_actors(partial(Lethal, tmp_path), range(3), RayCluster(gpus=1)))


def test_a_unit_given_up_is_named_and_tried_again(tree, tmp_path, small, laboratories, monkeypatch):
    augment(tree, tmp_path / "one", small, laboratories)
    out = tmp_path / "out"

    def one_dies(make, units, cluster, shared_bytes):
        worker = make.func(*make.args)
        for unit in units:
            if unit.number == 1:
                yield unit, Death("its process died")
                continue
            worker.do(unit)
            yield unit, None

    work = replace(QUIET, ray=RayCluster())
    with monkeypatch.context() as patch:
        patch.setattr(running, "on_actors", one_dies)
        summary = augment(tree, out, small, laboratories, work=work)
    assert summary.is_complete
    assert summary.counts["failed"] == 3
    assert {reason for _, reason in summary.failed} == {"its process died"}
    assert {row["unit"] for row in rows(out) if row["status"] == "failed"} == {1}
    augment(tree, out, small, laboratories)
    assert rows(out) == rows(tmp_path / "one")
    found, expected = digest(out), digest(tmp_path / "one")
    del found["manifest.parquet"], expected["manifest.parquet"]  # equal rows, in another encoding
    assert found == expected


def test_a_machine_without_the_output_is_refused(tree, tmp_path, small, laboratories, monkeypatch):
    monkeypatch.setattr(running, "do_run", lambda run, work: run)
    tiles = Tiles(source=tree)
    run = plans.plan_normalize(
        tiles, tmp_path / "out", small, laboratories[:1], NormalizeRecipe(), "png"
    )
    with pytest.raises(FileNotFoundError, match=r"does not see .*run\.json"):
        UnitWorker(run, 1, 1, "cpu", None)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_engine_says_what_to_install(
    tree, tmp_path, model_folder, laboratories, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = command(tree, tmp_path / "out", model_folder, laboratories, *RAY)
    assert main(words) == 2
    assert 'pip install "cytosyn-aug[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--actors", "2", "--address", "auto"],
            "--address, --actors can only be combined with",
        ),
        (["--engine", "ray", "--actors", "0"], "actors is 0, expected at least 1"),
        (["--engine", "ray", "--device", "cuda:1"], "expected 'cuda': Ray gives"),
        (["--engine", "ray", "--actor-cpus", "0"], "CPUs of an actor are 0, expected at least 1"),
        (["--engine", "ray", "--actor-gpus", "-1"], "GPUs of an actor are -1"),
    ],
)
def test_contradictions_are_usage_errors(words, said, tree, tmp_path, model_folder, capsys):
    line = ["sample", str(tmp_path / "out"), "--n", "1", "--model", str(model_folder), *words]
    assert main(line) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
