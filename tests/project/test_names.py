"""Names of types: one meaning in the whole project."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The transforms of albumentations bear the names of torchvision's on purpose.
TWINS = {
    "CachedVariants",
    "ConditionedResample",
    "DensityTransport",
    "MacenkoNormalize",
    "ReinhardNormalize",
    "StainNormalize",
    "StainTransfer",
}


def _type_names(module: ast.Module) -> Iterator[str]:
    """Yield the public classes and type aliases that a module defines, not those it imports."""
    for node in module.body:
        match node:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield name
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar" | "ParamSpec"))):
                pass  # stands for any type
            case ast.Assign(targets=[ast.Name(id=name)]) if _is_alias(name):
                yield name


def _is_alias(name: str) -> bool:
    return name[:1].isupper() and not name.isupper()


def test_a_type_name_has_one_meaning():
    modules = defaultdict(set)
    for package in ("cytosyn_aug", "training"):
        for file in (ROOT / package).rglob("*.py"):
            for name in _type_names(ast.parse(file.read_text())):
                modules[name].add(str(file.relative_to(ROOT)))
    repeated = {k: sorted(v) for k, v in modules.items() if len(v) > 1 and k not in TWINS}
    assert not repeated
