"""The documentation is true: public examples run, and the README's file tree is the tree."""

import doctest
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.python_process import start_python

ROOT = Path(__file__).parents[2]
MODULES = [
    "cytosyn_aug.cache.store",
    "cytosyn_aug.cache.spec",
    "cytosyn_aug.transforms.classical",
    "cytosyn_aug.model.conditions",
    "cytosyn_aug.stain.estimate",
    "cytosyn_aug.cache.encodings",
    "cytosyn_aug.transforms.variants",
    "cytosyn_aug.model.generator",
    "cytosyn_aug.stain.macenko",
    "cytosyn_aug.model.memory",
    "cytosyn_aug.stain.reference",
    "cytosyn_aug.stain.reinhard",
    "cytosyn_aug.transforms.replay",
    "cytosyn_aug.transforms.resample",
    "cytosyn_aug.transforms.schedules",
    "cytosyn_aug.transforms.stain_transfer",
    "cytosyn_aug.transforms.cached_variants",
    "cytosyn_aug.transforms.stain_views",
    "training.stages.perception",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    module = import_module(name)
    # Examples use the names a reader would import.
    import torch

    import cytosyn_aug

    names = {n: getattr(cytosyn_aug, n) for n in cytosyn_aug.__all__} | {"torch": torch}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_public_names_are_completed_before_they_are_loaded_and_say_what_they_are():
    script = "import cytosyn_aug, sys; print(*dir(cytosyn_aug)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import cytosyn_aug

    assert {*cytosyn_aug.__all__, "offline"} <= set(done.stdout.split())
    for name in cytosyn_aug.__all__:
        assert len(getattr(cytosyn_aug, name).__doc__) > 20, name


@pytest.mark.parametrize("name", ["README.md", "docs/cookbook.md"])
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # a reader goes on where the block before ended
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_the_readmes_tree_names_every_package():
    text = (ROOT / "README.md").read_text()
    tree = text.split("```text\n")[1].split("```")[0]
    listed = set(re.findall(r"^ {0,2}(\w+)/ ", tree, re.MULTILINE))
    found = {
        f.parent.name
        for folder in ("cytosyn_aug", "training", "benchmarks")
        for f in (ROOT / folder).rglob("__init__.py")
    }
    assert found <= listed


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


def test_help_loads_no_torch():
    code = (
        "import sys, cytosyn_aug.cli.main as c\n"
        "for name in ['demo', 'augment', 'normalize', 'cache', 'sample', 'slurm',\n"
        "             'report', 'budget']:\n"
        "    try: c.main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
