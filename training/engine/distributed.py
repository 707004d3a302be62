"""Several processes that train one model: which rows each computes, and how gradients meet.

Every process draws the random numbers of the whole batch and computes its own rows, so a run is
the same, up to rounding, on any number of processes, and bit-equal when it is repeated on as many.

Gradients are averaged once after the backward pass. DistributedDataParallel would overlap that
with the backward pass, but allows each network to run once per step; REPA-E runs its transformer
twice, the first time with weights that get no gradient. For SiT-XL the sum moves 3 GB per step,
which a node's links do in a few hundredths of a second, of steps that take one or more.

It refuses to know what is trained. Start it with torchrun, which sets the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 16 * 2**20  # elements summed at a time


class World(NamedTuple):
    """Place of this process among those that train together."""

    rank: int
    size: int


def join_world() -> tuple[World, torch.device]:
    """Join the processes that torchrun started, or stand alone; return place and device.

    NCCL with one GPU per process where there are GPUs, gloo on the CPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1), device
    store, rank, size = next(iter(dist.rendezvous("env://")))
    # torchrun keeps its store over restarts: without a name of its own, a restarted process may
    # read the address of one that is dead, and wait for it.
    life = dist.PrefixStore(f"life_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if has_gpu else "gloo", store=life, rank=rank, world_size=size)
    return world(), device


def world() -> World:
    """Return the place of this process; (0, 1) if it stands alone."""
    if not dist.is_initialized():
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


def row_shares(batch_size: int, num_micro_batches: int = 1) -> list[slice]:
    """Return the rows of a batch that this process computes, one slice a micro-batch.

    Raises:
        ValueError: The batch does not divide evenly.
    """
    rank, size = world()
    num_shares = size * num_micro_batches
    if batch_size % num_shares:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared by {size} processes with "
            f"{num_micro_batches} micro-batches; choose a batch_size divisible by {num_shares}"
        )
    width = batch_size // num_shares
    first = rank * num_micro_batches
    return [slice((first + k) * width, (first + k + 1) * width) for k in range(num_micro_batches)]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes, in buckets; a missing one counts as 0.

    Args:
        parameters: The same ones, in the same order, in every process.
    """
    if world().size == 1:
        return
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            _average(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        _average(bucket)


def _average(bucket: list[nn.Parameter]) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    mean = mean_over_processes(torch.cat([g.flatten() for g in gradients]))
    parts = mean.split([p.numel() for p in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if world().size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world().size


def meet() -> None:
    """Wait until all processes are here."""
    if world().size > 1:
        dist.barrier()


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Return whether any process says so; they all get the same answer."""
    if world().size == 1:
        return flag
    return bool(mean_over_processes(torch.tensor(float(flag), device=device)) > 0)
