"""The comparison is fair: every row costs the forwards it states, and its solvers are right."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import compare_samplers
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import linear_grid
from tests.support.synthetic import synthetic_tiles
from training.evaluation.extractors import load_extractor
from training.evaluation.metrics import principal_components
from training.evaluation.scores import ReferenceSet

F64 = torch.float64


def field(x, t):
    """dx/dt = 1.7 x + t, solved below in closed form from x = 0.8 at t = 1."""
    return 1.7 * x + t


def exact():
    a, start = 1.7, 0.8
    return (start + 1 / a + 1 / a**2) * math.exp(-a) - 1 / a**2


@pytest.mark.parametrize("name", ["heun", "unipc"])
def test_solvers_of_the_comparison_are_of_second_order(name):
    def solve(steps):
        start = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float32 if name == "unipc" else F64)
        if name == "unipc":
            return compare_samplers.unipc(field, start, steps).item()
        return compare_samplers.heun(field, start, linear_grid(steps)).item()

    errors = [abs(solve(n) - exact()) for n in (16, 32, 64)]
    assert all(coarse > 3 * fine for coarse, fine in itertools.pairwise(errors))


def test_every_row_costs_the_forwards_it_states(student_folder, monkeypatch):
    generator = TileGenerator.from_pretrained(student_folder)
    calls = []

    def count(x, *rest):
        calls.append(len(x))
        return x

    monkeypatch.setattr(generator, "velocity", count)
    monkeypatch.setattr(TileGenerator, "student", property(lambda self: count))
    rows = list(compare_samplers.runs(generator, 1.0, 12))
    assert {r.sampler for r in rows} == set(compare_samplers.SAMPLERS)
    for run in rows:
        calls.clear()
        latents = run.draw(range(2), torch.zeros(2, 24))
        assert calls == [2] * run.forwards, run.sampler
        assert latents.shape == (2, *generator.latent_shape)


def test_a_set_has_no_distance_to_itself_and_full_recall():
    features = torch.randn(60, 20, dtype=F64, generator=torch.Generator().manual_seed(0))
    real = ReferenceSet.of(features, principal_components(features, 4))
    same = compare_samplers.measure(real, features)
    assert same == pytest.approx({"frechet": 0, "recall": 1, "coverage": 1}, abs=1e-6)
    far = compare_samplers.measure(real, features + 100)
    assert far["frechet"] > 1000
    assert far["recall"] == far["coverage"] == 0


def test_real_tiles_are_looked_at_once_and_another_comparison_is_refused(
    student_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare_samplers, "FORWARDS", (1, 2))  # for time only
    generator = TileGenerator.from_pretrained(student_folder)
    own = load_extractor("own", own=generator.encoder)
    loaded = {"alexnet": lambda kept: replace(own, kept=kept)}  # for time: a smaller network
    monkeypatch.setattr(
        compare_samplers, "load_extractor", lambda name, device, kept: loaded[name](kept)
    )
    images = synthetic_tiles(40)
    settings = {"scale": 1.0, "num_reference": 0, "is_few_step": False}
    rows = compare_samplers.compare(generator, images, tmp_path, samplers=["student"], **settings)
    assert [(r["sampler"], r["forwards"]) for r in rows] == [
        ("real", 0), ("student", 1), ("student", 2),
    ]  # fmt: skip
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").iterdir()}
    both = ["student", "Euler"]
    more = compare_samplers.compare(generator, images, tmp_path, samplers=both, **settings)
    assert more[:3] == rows
    assert [r["forwards"] for r in more[3:]] == [1, 2]
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert len(list((tmp_path / "kept").iterdir())) == len(before) + 2  # of what was drawn
    with pytest.raises(ValueError, match=r"another comparison \(was, now\): .*'tiles'"):
        compare_samplers.compare(
            generator, images.flip(0), tmp_path, samplers=["Euler"], **settings
        )
    with pytest.raises(ValueError, match=r"'guidance': \(1\.0, 2\.0\)"):
        compare_samplers.compare(
            generator, images, tmp_path, samplers=["Euler"], **settings | {"scale": 2.0}
        )


def test_the_plot_shows_every_sampler_of_the_table(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="without matplotlib no plot is drawn")
    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k)
    )
    names = [name for name in compare_samplers.SAMPLERS if name != "ODE"]
    rows = [{"sampler": n, "forwards": f, "frechet": 9.0 / f, "recall": 0.1} for n in names
            for f in (2, 4)]  # fmt: skip
    real = {"sampler": "real", "forwards": 0, "frechet": 0.01, "recall": 0.9}
    compare_samplers.plot([real, *rows], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [n if n != "SDE" else "SDE, 2 forwards" for n in names]
