"""Differences between named tensors and what a network expects, and the renaming that would fit.

One report names all differences of all parts, so that weights nobody here has seen can be
loaded after one look. It refuses to know where tensors come from, and changes none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

# A likely name must be so much likelier than the next one; else it is left to the user.
_CLEARLY = 0.02


@dataclass(frozen=True, slots=True)
class Differences:
    """How the tensors of one part differ from what its network expects; empty if they fit.

    Attributes:
        cls: Name of the network's class.
        part: Name of the part, under which a key map answers.
        missing: Names the network expects.
        unexpected: Names it does not know.
        shapes: Sentences about tensors of another shape.
        not_finite: Names of tensors with NaN or infinity.
        guess: Renaming of unexpected to missing names that would fit, by shape and likeness.
    """

    cls: str
    part: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[str, ...]
    not_finite: tuple[str, ...]
    guess: Mapping[str, str | None]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.not_finite)

    def lines(self) -> list[str]:
        """Return one line for each difference; those of numbered blocks share one."""
        return [
            *(f"missing: {k}" for k in _gather(self.missing)),
            *(f"unexpected: {k}" for k in _gather(self.unexpected)),
            *(f"shape: {s}" for s in self.shapes),
            *(f"not finite: {k}" for k in _gather(self.not_finite)),
        ]


def compare(
    cls: str, network: nn.Module, tensors: Mapping[str, Tensor], part: str = ""
) -> Differences:
    """Compare tensors with the state a network expects; the network may be on the meta device."""
    expected = network.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    shapes = tuple(
        f"{k} is {list(tensors[k].shape)}, expected {list(expected[k].shape)}"
        for k in sorted(expected.keys() & tensors.keys())
        if tensors[k].shape != expected[k].shape
    )
    return Differences(
        cls=cls,
        part=part,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        shapes=shapes,
        not_finite=tuple(k for k in sorted(tensors) if not is_finite(tensors[k])),
        guess=_prefix_guess(expected, tensors)
        or _guess({k: expected[k] for k in missing}, {k: tensors[k] for k in unexpected}),
    )


def report(source: str, differences: list[Differences], problems: Sequence[str] = ()) -> str:
    """Return one message that names all differences of all parts, and the likely answer.

    Args:
        source: Where the tensors come from.
        differences: One per part.
        problems: Further sentences that belong to the same report.
    """
    text = list(problems)
    for one in differences:
        what = f"{source}{one.part and '/'}{one.part} does not fit {one.cls}"
        text.append(f"{what}:\n  " + "\n  ".join(one.lines()))
    guesses = {one.part: dict(one.guess) for one in differences if one.guess and one.part}
    if guesses:
        text.append(
            "By shape and name this renaming would fit. If you agree, save it as a file and pass "
            f"key_map=FILE (null leaves a tensor out):\n{json.dumps(guesses, indent=1)}"
        )
    return "\n".join(text)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def _prefix_guess(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """Return the entry that takes a wrapper's prefix off, and leaves out a second set of weights.

    Wrappers of training put all names under one prefix. Averaged weights are taken where a file
    holds both; they are what samples are drawn with.
    """
    prefixes = {p for name in tensors for p in _prefixes(name)}
    fits = {
        p: sum(
            name.startswith(p) and name.removeprefix(p) in expected and name not in expected
            for name in tensors
        )
        for p in prefixes
    }
    whole = [p for p, count in fits.items() if count > len(expected) / 2]
    if not whole:
        return {}
    best = max(whole, key=lambda p: (fits[p], "ema" in p, -len(p)))
    others = [p for p in whole if p != best and not p.startswith(best) and not best.startswith(p)]
    return {f"{best}*": "*"} | {f"{p}*": None for p in sorted(others)}


def _guess(
    missing: Mapping[str, Tensor], unexpected: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """Return names in the file to names of the network, where shape and name leave no doubt.

    The tensors of numbered blocks are taken together, so that no block is given another's; and a
    name that two fit about as well is left out.
    """
    expected, given = _by_template(missing), _by_template(unexpected)
    scores = {
        (f, w): SequenceMatcher(None, w, f).ratio()
        for f, of_file in given.items()
        for w, of_network in expected.items()
        if {k: t.shape for k, (_, t) in of_file.items()}
        == {k: t.shape for k, (_, t) in of_network.items()}
    }
    guess: dict[str, str | None] = {}
    for (f, w), score in scores.items():
        rivals = [s for (a, b), s in scores.items() if (a == f) != (b == w)]
        if all(score > rival + _CLEARLY for rival in rivals):
            guess |= {given[f][k][0]: expected[w][k][0] for k in given[f]}
    return dict(sorted(guess.items()))


def _by_template(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Group tensors by name without the first number in it, and by that number ("" for none)."""
    groups: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        template, number = _template(name)
        groups.setdefault(template, {})[number] = (name, tensor)
    return groups


def _template(name: str) -> tuple[str, str]:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}#{name[number.end() :]}", number[0]


def _gather(names: Iterable[str]) -> list[str]:
    """Write names that differ in their first number as one: `blocks.[0-2,5].norm.weight`."""
    groups: dict[str, list[int]] = {}
    for template, number in map(_template, names):
        groups.setdefault(template, []).extend([int(number)] if number else [])
    lines = []
    for template, numbers in groups.items():
        written = _ranges(sorted(numbers))
        several = len(numbers) > 1
        lines.append(template.replace("#", f"[{written}]" if several else written, 1))
    return lines


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _prefixes(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[:k]) + "." for k in range(1, len(pieces))]
