"""The documentation is true: its Python runs, and what it names is there."""

import doctest
import re
import runpy
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs" / "pages").rglob("*.md")),
]
MODULES = [
    "cytosyn_aug.cache.store",
    "cytosyn_aug.cache.spec",
    "cytosyn_aug.transforms.classical",
    "cytosyn_aug.model.conditions",
    "cytosyn_aug.stain.recipe",
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


def page_name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.slow
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


@pytest.fixture(autouse=True, scope="module")
def tiny_loaded_once():
    """Let all pages share one generator, since each begins by loading it."""
    from cytosyn_aug import TileGenerator

    load = TileGenerator.from_pretrained
    tiny = cache(load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TileGenerator, "from_pretrained", lambda *a, **k: load(*a, **k) if a or k else tiny()
        )
        yield


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python\n" in p.read_text()], ids=page_name
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # a reader goes on where the block before ended
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
    for included in re.findall(r'^--8<-- "(.*)"', text, re.MULTILINE):
        assert (ROOT / included).is_file(), included


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=page_name)
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    tops = r"(?:cytosyn_aug|training|tests|benchmarks|examples|docs)"
    files = set(re.findall(rf"(?<![\w/]){tops}/[\w/.-]+\.(?:py|md|sh|ipynb|yml)\b", text))
    packages = "|".join(f.name for f in (ROOT / "cytosyn_aug").iterdir() if f.is_dir())
    files |= {f"cytosyn_aug/{name}" for name in re.findall(rf"`((?:{packages})/\w+\.py)`", text)}
    modules = re.findall(r"python -m ((?:benchmarks|training|cytosyn_aug)[\w.]*)", text)
    files |= {f"{m.replace('.', '/')}.py" for m in modules if "." in m}
    missing = {f for f in files if not (ROOT / f).is_file()}
    assert not missing


def test_the_readme_is_short_and_holds_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert "pip install -e . && cytosyn-aug demo" in lines
    assert 'pip install -e ".[test]" && pytest -n auto --dist loadfile' in lines


def test_the_page_of_commands_is_what_commands_say():
    written = runpy.run_path(str(ROOT / "docs" / "write_commands.py"))
    page = written["PAGE"].read_text()
    # Versions of Python break lines elsewhere.
    assert page.split() == written["commands_page"]().split(), "run python docs/write_commands.py"


def test_every_program_stands_in_the_reference():
    text = (ROOT / "docs/pages/reference/programs.md").read_text()
    examples = {f"examples/{f.name}" for f in (ROOT / "examples").glob("*.*")}
    benchmarks = {f"benchmarks.{f.stem}" for f in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert examples | benchmarks <= set(re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE))


def test_every_public_name_stands_in_the_reference():
    from cytosyn_aug import __all__ as names
    from cytosyn_aug import offline

    text = "".join(f.read_text() for f in (ROOT / "docs/pages/reference").glob("*.md"))
    shown = set(re.findall(r"^::: cytosyn_aug\.([\w.]+)$", text, re.MULTILINE))
    wanted = {*names, *(f"offline.{n}" for n in offline.__all__ if n not in names)}
    assert wanted <= shown


def test_the_page_of_formats_names_every_column_of_the_manifest():
    from cytosyn_aug.runs.receipts import ROW_SCHEMA

    text = (ROOT / "docs/pages/reference/formats.md").read_text()
    table = text.split("### manifest.parquet")[1].split("### ")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(ROW_SCHEMA.names)


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


def test_help_loads_no_torch():
    code = (
        "import runpy, sys, cytosyn_aug.cli.main as c\n"
        f"runpy.run_path({str(ROOT / 'docs' / 'write_commands.py')!r})['commands_page']()\n"
        "try: c.main(['--version'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
