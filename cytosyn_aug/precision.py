"""Code that computes in the types it was written for, whatever autocast is around its caller.

A training step under `torch.autocast` calls transforms and models of this package, whose colour
needs float32 and whose networks have a type of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_precision() -> Iterator[None]:
    """Switch autocast off, on every type of device; a decorator as well."""
    with ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
