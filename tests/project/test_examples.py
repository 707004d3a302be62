"""Examples run as a reader would run them, and the notebook shows what it says."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.support.python_process import start_python

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("augment_in_loop.py", "step 2 loss"),
        ("train_on_batches.py --epochs 1 --loop plain", "restained    accuracy"),
        ("train_on_batches.py --epochs 1 --loop lightning", "restained    accuracy"),
        ("train_on_cache.py CACHE --epochs 1 --way cached", "accuracy on other laboratories"),
        ("train_on_cache.py --epochs 2 --way replay", "variants made"),
    ],
)
def test_examples_run(command, said, tmp_path):
    assert said in run_example(command, tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train_on_batches.py --epochs 1 --loop plain", "256 tiles to train on"),
        ("train_on_batches.py --epochs 1 --loop lightning", "256 tiles to train on"),
        ("train_on_cache.py CACHE --epochs 1 --way cached", "512 variants in"),
        ("train_on_cache.py --epochs 1 --way replay", "variants made"),
    ],
)
def test_examples_train_on_real_fields(command, said, tmp_path):
    folder = os.environ.get("CYTOSYN_AUG_DATA")
    if not folder:
        pytest.skip("without CYTOSYN_AUG_DATA training on BRCA-M2C is not verified")
    out = run_example(f"{command} --data {Path(folder) / 'brca_m2c'}", tmp_path)
    assert said in out
    found = [float(x) for x in re.findall(r"other laboratories (\d\.\d+)", out)]
    assert found
    assert all(0.3 < x < 0.9 for x in found)  # one epoch: near 0.5


def run_example(command, tmp_path):
    name, *arguments = command.replace("CACHE", str(tmp_path / "cache")).split()
    done = start_python(str(ROOT / "examples" / name), *arguments, folder=tmp_path)
    done.join()
    assert done.exitcode == 0, (tmp_path / "stderr").read_text()
    return (tmp_path / "stdout").read_text()


def test_the_notebook_holds_its_pictures():
    assert NOTEBOOK.stat().st_size < 1_500_000
    outputs = [out for cell in code_cells() for out in cell["outputs"]]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 4
    assert not any(out["output_type"] == "error" or out.get("name") == "stderr" for out in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # a cell goes on where the one before ended
    for cell in code_cells():
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert len(names["losses"]) == 30


def code_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]
