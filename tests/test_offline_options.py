"""Options of whole data sets are stated once; functions and commands repeat them truly."""

import re
from inspect import getdoc, signature

import pytest

from cytosyn_aug import offline
from cytosyn_aug.cli.main import parse
from cytosyn_aug.cli.options import stated_options
from cytosyn_aug.runs.recipes import AugmentRecipe, NormalizeRecipe, SampleRecipe, Tiles

AUGMENT = (offline.augment, "augment IN OUT")
NORMALIZE = (offline.normalize, "normalize IN OUT --reference R")
HOMES = pytest.mark.parametrize(
    ("function", "command", "settings", "names"),
    [
        (*AUGMENT, AugmentRecipe, {}),
        (*AUGMENT, Tiles, {}),
        (*NORMALIZE, NormalizeRecipe, {"source": "stain_source"}),
        (*NORMALIZE, Tiles, {}),
        (offline.sample, "sample OUT --n 1", SampleRecipe, {}),
        (offline.cache, "cache IN OUT", Tiles, {}),
    ],
)


def documented(function):
    """Return the sentences of a docstring about arguments, by name."""
    arguments = getdoc(function).split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=\n    \w|\Z)", arguments, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


@HOMES
def test_a_function_repeats_default_and_sentence_of_the_settings(
    function, command, settings, names
):
    sentences, parameters = documented(function), signature(function).parameters
    args = vars(parse(command.split()))
    options = stated_options(settings)
    assert len(options) > 2
    for field, _, sentence in options:
        name = names.get(field.name, field.name)
        assert sentences[name] == sentence
        is_range = isinstance(field.default, tuple)
        assert parameters[name].default == (field.default[0] if is_range else field.default)
        assert args[name] == ([field.default[0]] if is_range else field.default)


@HOMES
def test_help_repeats_the_sentences(function, command, settings, names, capsys):
    with pytest.raises(SystemExit):
        parse([command.split()[0], "--help"])
    shown = "".join(capsys.readouterr().out.split())  # lines break anywhere
    for _, _, sentence in stated_options(settings):
        assert "".join(sentence[1:-1].split()) in shown


@pytest.mark.parametrize(
    "function",
    [offline.augment, offline.normalize, offline.normalize_slides, offline.cache, offline.sample],
)
def test_every_argument_of_a_function_is_explained_where_it_stands(function):
    sentences = documented(function)
    assert sorted(sentences) == sorted(signature(function).parameters)
    assert not [text for text in sentences.values() if re.search(r"[Ss]ee `|^The same", text)]
