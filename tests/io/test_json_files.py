"""Dataclasses as JSON."""

import json
from dataclasses import dataclass

import pytest

from cytosyn_aug.io.json_files import from_json, to_json


@dataclass(frozen=True)
class Corner:
    x: int
    name: str | None = None


@dataclass(frozen=True)
class Shape:
    first: Corner
    corners: tuple[Corner, ...]
    sizes: tuple[tuple[float, float], tuple[float, float]]
    limits: tuple[int, ...] | None = None


SHAPE = Shape(Corner(1), (Corner(2, "b"), Corner(3)), ((0.5, 1.0), (2.0, 3.0)), (4, 5))


def test_nested_dataclasses_and_tuples_survive_json():
    assert from_json(Shape, json.loads(json.dumps(to_json(SHAPE)))) == SHAPE


def test_another_field_inside_is_named_with_its_place():
    content = to_json(SHAPE)
    content["first"]["y"] = 2
    with pytest.raises(ValueError, match=r"first has the fields \['name', 'x', 'y'\], expected"):
        from_json(Shape, content, "shape.json")


def test_what_is_no_object_is_refused():
    with pytest.raises(ValueError, match="has the fields list, expected"):
        from_json(Corner, [1, 2])
