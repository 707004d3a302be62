"""Store of results on disk, so that an evaluation that was stopped goes on from them.

A result is a tensor, found by a digest of what it was made from: whoever asks with another model,
other tiles or other settings makes it anew, beside the old one. Only a change of the code goes
unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cytosyn_aug.io.files import write_atomically


class ResultStore:
    """A folder of results.

    Args:
        folder: Created with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, made_from: Mapping[str, object], make: Callable[[], Tensor]) -> Tensor:
        """Return a result from disk, or make it and keep it.

        Args:
            name: How its file begins, for readers of the folder.
            made_from: All that the result depends on, as JSON has it.
            make: Makes it, if it is absent or its file is damaged.
        """
        text = json.dumps(made_from, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = self.folder / f"{name}-{digest}.safetensors"
        try:
            return load_file(file)["result"]
        except (FileNotFoundError, SafetensorError):
            result = make().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"result": result}, metadata={"made_from": text}))
        return result


def images_digest(images: Tensor) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the shape and bytes of uint8 images."""
    whole = hashlib.sha256(json.dumps(list(images.shape)).encode())
    whole.update(images.cpu().contiguous().numpy().data)
    return whole.hexdigest()[:16]
