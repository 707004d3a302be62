"""Functions compiled whole for fixed shapes, once for every number of rows they are given.

A compiler holds what it was given first for the rule: shapes, strides, types, even where in a
larger tensor a view begins. What differs is compiled anew, and after eight times given up, counted
by the code of the function whoever runs it. So inputs are made alike here, every number of rows has
a graph of its own, and every graph code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.model.sampler import Forward
from cytosyn_aug.model.transformer import Modulation, SiT


def compile_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of tensors that is compiled for each length of the first.

    All else about its inputs must be the same in every call.
    """
    graphs: dict[int, Callable[..., Tensor]] = {}

    def run(x: Tensor, *rest: Any) -> Tensor:  # Any: tensors, or named tuples of them
        if len(x) not in graphs:
            graphs[len(x)] = torch.compile(_with_own_code(function), fullgraph=True, dynamic=False)
        return graphs[len(x)](x, *rest)

    return run


def compile_forward(network: SiT) -> Forward:
    """Return `network.forward_modulated`, compiled; one graph for all samplers and steps."""
    compiled = compile_rows(network.forward_modulated)
    dtype = network.x_embedder.proj.weight.dtype

    def forward(x: Tensor, modulation: Modulation) -> Tensor:
        alike = Modulation(
            tuple(_fresh(m, dtype) for m in modulation.blocks), _fresh(modulation.final, dtype)
        )
        return compiled(_fresh(x, dtype), alike).to(x.dtype)

    return forward


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy: no view, in the order of its dimensions."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Any) -> Tensor:
        return function(*inputs)

    call.__code__ = call.__code__.replace()
    return call
