"""Arrows point down: which package may import which, checked on the syntax tree."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A package imports only from lines below its own; packages of one line do not know each other, but
# for the modules of the lowest.
LIBRARY = [
    {"cli"},
    {"offline", "albumentations", "demo"},
    {"report"},
    {"runs"},
    {"transforms", "slides"},
    {"stain", "cache"},
    {"model"},
    {"io"},
    {"config", "images", "autocast"},
]
TRAINING = [
    {"__main__"},
    {"command_line"},
    {"export"},
    {"model_card"},
    {"plan"},
    {"costs"},
    {"build"},
    {"recipes"},
    {"evaluation"},
    {"stages"},
    {"engine"},
    {"data"},
    {"stage_inputs"},
]
LAYERS = pytest.mark.parametrize(
    ("package", "layers"), [("cytosyn_aug", LIBRARY), ("training", TRAINING)]
)
FORBIDDEN_NAMES = {"utils", "util", "helpers", "misc", "common", "core", "base"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    return {module_name(f): f for f in sorted((ROOT / package).rglob("*.py"))}


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules that a file imports from, where in it and why so ever."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


def room(name: str) -> str:
    """Return the part of a module's name that a line of the layers has."""
    return name.split(".")[1] if "." in name else ""


@LAYERS
def test_packages_import_only_from_lines_below(package, layers):
    height = {name: -k for k, line in enumerate(layers) for name in line}
    known = modules(package)
    for name, file in known.items():
        if name in (package, "cytosyn_aug.__main__"):  # the public names, and the command line
            continue
        assert room(name) in height, f"{name} belongs to no line; see {__file__}"
        for other in imported(file, known) & known.keys() - {package}:
            below = height[room(other)] < height[room(name)]
            beside = room(other) == room(name) or {room(other), room(name)} <= layers[-1]
            assert below or beside, f"{name} imports {other}"


@LAYERS
def test_modules_do_not_import_each_other_in_a_circle(package, layers):
    known = modules(package)
    graph = {name: imported(f, known) & known.keys() - {package} for name, f in known.items()}
    del graph[package]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@LAYERS
def test_a_package_holds_a_docstring_and_nothing_else(package, layers):
    for file in (ROOT / package).glob("*/__init__.py"):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        assert len(tree.body) == 1, file


def test_the_library_does_not_know_training_or_what_measures_it():
    for name, file in modules("cytosyn_aug").items():
        roots = {other.split(".")[0] for other in imported(file, {})}
        assert not roots & {"training", "benchmarks", "tests", "examples"}, name


def test_no_module_is_a_dumping_ground():
    for package in ("cytosyn_aug", "training", "benchmarks"):
        stems = {f.stem for f in (ROOT / package).rglob("*.py")}
        assert not stems & FORBIDDEN_NAMES
