"""Mixed precision, where the hardware has it."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device, enabled: bool = True) -> torch.autocast:
    """Return autocast to bfloat16 for `device`, switched off where that is only emulated.

    Processors without AVX-512 or AMX multiply bfloat16 matrices ninety times slower than float32
    ones (LOG.md, 2026-11-28), so there everything is computed in float32.
    """
    is_fast = device.type != "cpu" or has_fast_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and is_fast)


def has_fast_bfloat16() -> bool:
    """Return whether this processor has kernels for bfloat16: what torch itself dispatches by."""
    if not torch.backends.mkldnn.is_available():  # builds without oneDNN lack the operator
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
