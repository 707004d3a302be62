"""Tensor files of a model (safetensors), and the key map by which a user renames tensors.

Files are mapped into memory, not read: a tensor costs memory only where its type is changed.
Nothing here executes code from a file; only safetensors are opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cytosyn_aug.config import PART_NAMES
from cytosyn_aug.io.json_files import read_json

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """Return the files of one part: a single one, or the shards that its index names.

    Args:
        folder: Folder of the part.
        name: Name of the single file; the index is `<name>.index.json`.

    Raises:
        FileNotFoundError: No weights, or a shard is missing, all named.
        ValueError: An index of shards that is none.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    index = folder / f"{name}.index.json"
    if index.is_file() or len(indices) == 1:
        index = index if index.is_file() else indices[0]
        where = read_json(index, "copy it again").get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index} names no shards (weight_map); copy it again")
        shards = sorted(set(where.values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} is partial: {absent} are missing; copy them again")
        return [folder / shard for shard in shards]
    if (folder / name).is_file():
        return [folder / name]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:  # a variant such as fp16, or another tool's name
        return others
    if others:
        raise FileNotFoundError(
            f"{folder} holds {[f.name for f in others]} but no {name}; keep the one you want"
        )
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".ckpt"))
    if pickles:
        raise FileNotFoundError(
            f"{folder} holds {pickles} but no {name}; pickles are not loaded here, translate them "
            f"once: `cytosyn-aug convert {folder / pickles[0]} {folder / name}`"
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
            loaded = load_file(file)
        except SafetensorError as error:
            with file.open("rb") as stream:
                if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise ValueError(
                        f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` there"
                    ) from error
            raise ValueError(f"{file} is corrupt ({error}); copy the model folder again") from error
        twice = tensors.keys() & loaded.keys()
        if twice:
            raise ValueError(f"{file} repeats {sorted(twice)} of another shard; copy it again")
        tensors |= loaded
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
        unknown = sorted(names.keys() - set(PART_NAMES))
        if unknown or len(numbers) == 1:
            raise ValueError(
                f"{file} holds {unknown or sorted(numbers)}; expected {', '.join(PART_NAMES)}, "
                "and latents_bias together with latents_scale"
            )
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
            # The longest entry is the most particular one.
            entry = max((k for k in entries if _matches(k, name)), key=len, default=None)
            to = name if entry is None else _renamed(name, entry, entries[entry])
            if to in out:
                raise ValueError(f"the key map gives two tensors of {part} the name {to}")
            if to is not None:
                out[to] = tensor
        return out


_NUMBERS = ("latents_bias", "latents_scale")


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


def _is_entry(name: object, to: object) -> bool:
    is_pattern = isinstance(name, str) and name.endswith("*")
    return to is None or (isinstance(to, str) and to.endswith("*") == is_pattern)


def _matches(entry: str, name: str) -> bool:
    return name.startswith(entry[:-1]) if entry.endswith("*") else name == entry


def _renamed(name: str, entry: str, to: str | None) -> str | None:
    if to is None or not entry.endswith("*"):
        return to
    return to[:-1] + name.removeprefix(entry[:-1])
