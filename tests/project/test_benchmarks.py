"""Benchmarks run, on little work: their numbers mean nothing here, but their tables are whole."""

import runpy
import sys

import pytest
import torch


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a benchmark in this process, which has torch already, and returns what it printed."""
    num_threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = None
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert not code, said.err
        return said.out

    yield run
    torch.set_num_threads(num_threads)


def test_normalisers_are_measured_beside_torchstain(run):
    pytest.importorskip("torchstain", reason="without torchstain nothing is compared with it")
    out = run("normalisers", "--rounds", "1")
    ratios = {line[:38].strip(): float(line.split()[-1]) for line in out.splitlines()[2:]}
    assert ratios["torchstain Macenko"] == ratios["torchstain Reinhard"] == 1
    assert {"MacenkoNormalize", "ReinhardNormalize", "DensityTransport"} < ratios.keys()
    assert min(ratios.values()) > 0


@pytest.mark.slow
def test_a_run_is_measured_beside_the_bare_generator(run):
    out = run("runs", "--tiles", "8", "--repeats", "1")
    assert "ratio of processor time" in out


def test_units_are_measured(run):
    assert "bytes of memory per tile" in run("units", "--tiles", "512")


@pytest.mark.slow
def test_a_slide_is_measured_beside_each_tile_alone(run, synthetic_slide, tmp_path):
    pytest.importorskip("tifffile", reason="without tifffile no slide is measured")
    slide = synthetic_slide(grid="###\n###", side=448, mpp="0.5", power="20")
    out = run("slides", slide, tmp_path / "out.ome.tif", "--method", "macenko")
    assert "each tile alone" in out


@pytest.mark.slow
def test_samplers_are_timed_beside_their_distance(run, tmp_path):
    from cytosyn_aug import TileGenerator

    digest = TileGenerator.from_pretrained().digest
    (tmp_path / "comparison.json").write_text(f'{{"model": "{digest}", "guidance": 1.0}}')
    rows = [
        '{"sampler": "real", "forwards": 0, "frechet": 0.004}',
        '{"sampler": "student", "forwards": 1, "frechet": 1.07}',
        '{"sampler": "Euler", "forwards": 2, "frechet": 11.76}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = run("sampler", "--compare", tmp_path, "--repeats", "1")
    table = [line.split("|")[1:5] for line in out.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row[:3]] for row in table[2:4]] == [
        ["student", "1", "1.07"], ["Euler", "2", "11.76"],
    ]  # fmt: skip
    assert all(float(row[3]) > 0 for row in table[2:4])
    (tmp_path / "comparison.json").write_text('{"model": "another", "guidance": 1.0}')
    with pytest.raises(ValueError, match="compares model another"):
        run("sampler", "--compare", tmp_path)
