"""Isolation from the caller's autocast and default device.

A training step under `torch.autocast` calls transforms and models of this package, whose colour
needs float32 and whose networks have a type of their own. `torch.set_default_device` would move
what is made on the CPU, seeds and noise among it, away from its generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def isolated() -> Iterator[None]:
    """Switch autocast off, and the default device back to the CPU; a decorator as well."""
    with ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":  # setting it slows every operation a little
            stack.enter_context(torch.device("cpu"))
        yield
