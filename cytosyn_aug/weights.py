"""Named tensors on disk, and everything in which they differ from what a network expects.

Files are mapped into memory, not read: a tensor costs memory only where its type is changed.
Nothing here executes code from a file; only safetensors are opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_SHOWN = 40


def weight_files(folder: Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """Return the files of one part: a single one, or the shards that its index names.

    Args:
        folder: Folder of the part.
        name: Name of the single file; the index is `<name>.index.json`.

    Raises:
        FileNotFoundError: No weights, or a shard is missing, all named.
    """
    index = folder / f"{name}.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} is partial: {absent} are missing; copy them again")
        return [folder / shard for shard in shards]
    if (folder / name).is_file():
        return [folder / name]
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".ckpt"))
    if pickles:
        raise FileNotFoundError(
            f"{folder} holds {pickles} but no {name}; pickles are not loaded here, "
            "run `cytosyn-aug convert` once"
        )
    raise FileNotFoundError(
        f"{folder / name} is missing; the model folder is partial, copy it again"
    )


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Map the tensors of safetensors files into memory.

    Raises:
        ValueError: A file is corrupt, or two files hold the same name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt ({error}); copy the model folder again") from error
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(f"{file} repeats {sorted(twice)} of another shard; copy it again")
        tensors |= found
    return tensors


@dataclass(frozen=True, slots=True)
class KeyMap:
    """A user's answer to a report of differences, kept in a JSON file.

        {"transformer": {"cond.weight": "y_embedder.linear.weight",
                         "module.*": "*",
                         "not.needed": null},
         "latents_bias": [0.1, 0.2, 0.3, 0.4], "latents_scale": [1.0, 1.0, 1.0, 1.0]}

    Attributes:
        names: For each part, names in the file to names of the network; a trailing `*` stands for
            any rest of a name, None leaves a tensor out.
        latents_bias: Per-channel mean of the VAE's latents, where no file states it.
        latents_scale: One over their standard deviation.
    """

    names: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    latents_bias: tuple[float, ...] | None = None
    latents_scale: tuple[float, ...] | None = None

    @classmethod
    def load(cls, file: Path | str | None) -> KeyMap:
        """Read a key map; without a file, the empty one.

        Raises:
            ValueError: The file is not of the form shown above.
        """
        if file is None:
            return cls()
        try:
            content = json.loads(Path(file).read_text())
            numbers = {k: tuple(map(float, content.pop(k))) for k in _NUMBERS if k in content}
            names = {part: dict(entries) for part, entries in content.items()}
        except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a key map ({error}); see {cls.__name__}") from error
        bad = [k for entries in names.values() for k, v in entries.items() if not _is_entry(k, v)]
        if bad:
            raise ValueError(
                f"{file} maps {bad} to no name; expected a name, null, or `prefix*` to `prefix*`"
            )
        return cls(names=names, **numbers)

    def rename(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a part under the network's names.

        Raises:
            ValueError: An entry matches no tensor, or two tensors get one name.
        """
        entries = self.names.get(part, {})
        unused = [k for k in entries if not any(_matches(k, name) for name in tensors)]
        if unused:
            raise ValueError(f"the key map names {unused} for {part}, which its file does not hold")
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            entry = next((k for k in entries if _matches(k, name)), None)
            to = name if entry is None else _renamed(name, entry, entries[entry])
            if to in out:
                raise ValueError(f"the key map gives two tensors of {part} the name {to}")
            if to is not None:
                out[to] = tensor
        return out


_NUMBERS = ("latents_bias", "latents_scale")


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
    guess: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.not_finite)

    def lines(self) -> list[str]:
        """Return one line for each difference."""
        return [
            *(f"missing: {k}" for k in self.missing),
            *(f"unexpected: {k}" for k in self.unexpected),
            *(f"shape: {s}" for s in self.shapes),
            *(f"not finite: {k}" for k in self.not_finite),
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
        guess=_guess({k: expected[k] for k in missing}, {k: tensors[k] for k in unexpected}),
    )


def report(source: str, differences: list[Differences]) -> str:
    """Return one message that names all differences of all parts, and the likely answer."""
    text = []
    for one in differences:
        lines = one.lines()
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        what = f"{source}{one.part and '/'}{one.part} does not fit {one.cls}"
        text.append(f"{what}:\n  " + "\n  ".join(lines[:_SHOWN] + more))
    guesses = {one.part: dict(one.guess) for one in differences if one.guess and one.part}
    if guesses:
        text.append(
            "By shape and name this renaming would fit. If you agree, save it as a file and pass "
            f"key_map=FILE (null leaves a tensor out):\n{json.dumps(guesses, indent=1)}"
        )
    return "\n".join(text)


def assign(network: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make tensors that fit the parameters of a network, without copying what has the dtype.

    Args:
        network: On the meta device or any other; its old tensors are released.
        tensors: Exactly its state.
        dtype: Floating type wanted; statistics of batch norms stay float32.
    """

    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if name.startswith("bn.") else dtype)

    network.load_state_dict({k: cast(k, v) for k, v in tensors.items()}, assign=True)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError: No file; the message ends with the advice.
        ValueError: The file holds no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {advice}")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected an object; {advice}")
    return content


def _guess(missing: Mapping[str, Tensor], unexpected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names in the file to names of the network: a common prefix, else the closest names."""
    if not missing or not unexpected:
        return {}
    for name in unexpected:
        for prefix in _prefixes(name):
            rest = {k.removeprefix(prefix) for k in unexpected if k.startswith(prefix)}
            if len(rest) > 1 and rest <= missing.keys():
                return {f"{prefix}*": "*"}
    scored = sorted(
        (
            (SequenceMatcher(None, wanted, found).ratio(), wanted, found)
            for wanted, a in missing.items()
            for found, b in unexpected.items()
            if a.shape == b.shape
        ),
        reverse=True,
    )
    guess: dict[str, str] = {}
    for _, wanted, found in scored:
        if found not in guess and wanted not in guess.values():
            guess[found] = wanted
    return dict(sorted(guess.items()))


def _prefixes(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[:k]) + "." for k in range(1, len(pieces))]


def _is_entry(name: object, to: object) -> bool:
    is_pattern = isinstance(name, str) and name.endswith("*")
    return to is None or (isinstance(to, str) and to.endswith("*") == is_pattern)


def _matches(entry: str, name: str) -> bool:
    return name.startswith(entry[:-1]) if entry.endswith("*") else name == entry


def _renamed(name: str, entry: str, to: str | None) -> str | None:
    if to is None or not entry.endswith("*"):
        return to
    return to[:-1] + name.removeprefix(entry[:-1])
