"""Several processes that run the same lines, one a GPU (or a few on a CPU), as torchrun starts them.

Each has a rank. What only one may do (print, write files) rank 0 does; without torchrun there is only that
one, and all of this is a formality. A process that adds up, gathers or asks rank 0 waits for the others to do so too.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist

from nanochat import InputError


def join() -> None:
    """Meet the other processes that torchrun started, if it did; from here on only rank 0 prints.

    Raises InputError if something else has set WORLD_SIZE, and not the rest.
    """
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1" and not dist.is_initialized():
        if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise InputError(f"WORLD_SIZE is {count}, but {missing[0]} is not set: start several processes with torchrun, "
                             "or one with WORLD_SIZE=1")
        # gloo for what lies on the CPU, NCCL for gradients on GPUs. Rank 0 may prepare a corpus for hours while
        # the others wait; if a process dies, it is torchrun that ends the others, not this limit.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=2))
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*values: float) -> list[float]:
    """Each value, added up over all processes, in float64: the same list in each of them."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_all_ranks(value) -> list:
    """What each process has, in the order of their ranks."""
    values = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def from_rank_0(function: Callable):
    """What function() gives in rank 0, for all; the others wait for it. If it fails there, torchrun ends all."""
    box = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(function: Callable) -> Callable:
    """Decorator: elsewhere the function does nothing."""
    return wraps(function)(lambda *args, **named: function(*args, **named) if rank() == 0 else None)


def leave(code: int) -> None:
    """End one of several processes without Python's own end, in which gloo's threads may abort (pytorch issue 179291)."""
    if dist.is_initialized():
        if code == 0:
            dist.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
