"""What a pass of a network costs, measured without memory: FLOP, and bytes kept for the way back.

The bytes are those of fake tensors, which have shapes, dtypes and storages but no memory, and
behave as on a GPU under autocast to bfloat16. What autograd saves is counted, every storage once.
Weights are not, but their copies in bfloat16 are, which do not grow with the batch.

Not in it: workspace of kernels, gradients of activations during the backward pass, losses that
compare outputs alone, and what an allocator loses to fragmentation. Leave a tenth of a GPU to
them. `torch.compile` keeps less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flop(network: nn.Module, *inputs: Tensor) -> float:
    """Return the FLOP of a forward pass of one sample, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return float(counter.get_total_flops())


class Kept(NamedTuple):
    """Bytes kept by a pass: whatever the batch, and for each of its samples."""

    fixed: float
    per_sample: float

    def scaled(self, share: float) -> Kept:
        """Return what is kept if only a share of the samples is passed, or each several times."""
        return Kept(self.fixed, share * self.per_sample)


def kept_bytes(network: nn.Module, call: Callable[..., object], *inputs: Tensor) -> Kept:
    """Return what a pass keeps on a GPU under autocast to bfloat16.

    Args:
        network: On the meta device, where it stays. Convolutions in it are laid out channels last,
            as stages do: norms on a GPU then keep a copy of their input.
        call: Takes the network and the inputs; gradients flow to both.
        inputs: Of one sample, on the meta device.
    """
    network = copy.deepcopy(network)
    nn.Module.to(network, memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True), FusedAttention():
        network = network.to_empty(device="cuda")
        one, two = (_kept_by(network, call, inputs, num) for num in (1, 2))
    return Kept(2 * one - two, two - one)


def saved_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Return the bytes of all storages that autograd saves in a call, without weights."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    found = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # kept, so that its address is not given away again
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in found.values())


def _kept_by(
    network: nn.Module, call: Callable[..., object], inputs: tuple[Tensor, ...], num: int
) -> int:
    given = [
        torch.zeros(num, *x.shape[1:], dtype=x.dtype, device="cuda", requires_grad=True)
        for x in inputs
    ]
    with gpu_autocast():
        return saved_bytes(network, lambda: call(network, *given))


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Do what `torch.autocast("cuda", torch.bfloat16)` does, which needs a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class FusedAttention(TorchFunctionMode):
    """Attend as a GPU does; torch looks for one before it chooses, and writes attention out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: whatever is called
        is_fused = torch.backends.cuda.flash_sdp_enabled()  # not where a step asks for the formula
        if func is F.scaled_dot_product_attention and is_fused:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))
