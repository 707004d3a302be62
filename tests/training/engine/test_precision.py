"""Mixed precision: where the processor has it, and nowhere else."""

import pytest
import torch

from training.engine import precision


@pytest.mark.parametrize("is_fast", [True, False])
def test_bfloat16_is_used_where_it_is_fast(monkeypatch, is_fast):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: is_fast)
    x = torch.ones(16, 16)
    with precision.mixed_precision(torch.device("cpu")):
        assert (x @ x).dtype == (torch.bfloat16 if is_fast else torch.float32)
    with precision.mixed_precision(torch.device("cpu"), enabled=False):
        assert (x @ x).dtype == torch.float32


def test_a_build_without_onednn_has_no_kernels_for_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert precision.has_fast_bfloat16()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.has_fast_bfloat16()
