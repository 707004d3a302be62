"""No test is hidden: what a plain run of pytest leaves out, continuous integration runs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]


def left_out() -> set[str]:
    """Return the markers that a plain run leaves out."""
    expression = re.search(r'-m "([^"]*)"', OPTIONS["addopts"])
    words = expression[1].split(" and ") if expression else []
    assert all(word.startswith("not ") for word in words), "a plain run leaves out by marker only"
    return {word.removeprefix("not ") for word in words}


def chosen(script: str) -> set[str]:
    """Return the markers by which the commands of a script choose from all tests, each by `or`."""
    whole = [line for line in script.splitlines() if "pytest " in line and "tests/" not in line]
    expressions = re.findall(r'-m "?([\w ]+)"?', "\n".join(whole))
    words = {word.strip() for e in expressions for word in e.split(" or ")}
    return {word for word in words if not word.startswith("not ")}


def test_what_a_plain_run_leaves_out_is_run_by_ci():
    assert left_out() == {"slow"}
    assert left_out() <= chosen((ROOT / ".ci" / "run").read_text())
    assert left_out() <= chosen((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_every_marker_is_used_and_said_what_it_means():
    names = [line.split(":")[0] for line in OPTIONS["markers"]]
    text = "".join(f.read_text() for f in (ROOT / "tests").rglob("test_*.py"))
    used = set(re.findall(r"pytest\.mark\.(\w+)", text))
    assert used - {"parametrize", "filterwarnings", "skipif", "usefixtures"} == set(names)


def test_ci_runs_the_command_that_the_readme_prints():
    command = re.search(
        r"pip install -e \"\.\[test\]\" && (pytest[^\n]*)", (ROOT / "README.md").read_text()
    )
    assert command is not None
    assert f"\n{command[1]}\n" in (ROOT / ".ci" / "run").read_text()
