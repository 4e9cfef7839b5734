"""Before the first step: what a run will take, in memory, time and disk, and whether it is there.

`rehearse` takes a few steps that change nothing. They tell how long a step is (of which
training.steps_in makes a number of steps, once, so that a resumed run has the same schedule),
whether the compiler works, and whether it pays. What does not fit stops here, with the settings that do,
and not after an hour, in a traceback or by the kernel's hand.
"""

import copy
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from nanochat import InputError, lora, processes, runs
from nanochat.model import GPT, LOSS_CHUNK, Batch
from nanochat.runtime import autocast, clock, out_of_memory, rng_state, set_rng_state

WORTH_A_TRIAL = 600  # seconds of a run from which on --compile auto tries the compiler: that takes up to a minute
ROOM = 0.9  # share of the memory that a run may take: the rest is for buffers that nobody counts


def rehearse(model: GPT, optimizer, batch: Batch, micro_steps: int, dtype: torch.dtype, compiling: str, seconds: float,
             length: Callable[[float], float]) -> tuple[nn.Module, float]:
    """Steps that change nothing: → (the network that is to step, seconds of a step).

    That is the model, or the same weights compiled: "yes", "no", or with "auto" if the run is long
    enough (`length`: seconds of a step → seconds of the run) and the compiled steps are faster; with
    several processes, either of them under DistributedDataParallel. `seconds`: to spend on timing.
    The optimizer's state is emptied afterwards and the random state put back; `batch` is on the
    model's device. InputError, with the settings that fit, if its memory runs out.
    """
    device = batch.inputs.device
    random_state, mode = rng_state(device), model.training
    model.train()
    timed = partial(time_steps, optimizer=optimizer, batch=batch, micro_steps=micro_steps, dtype=dtype, seconds=seconds)
    network: nn.Module | None = model
    micro_step = step = math.inf
    try:
        if compiling != "yes":
            micro_step, step = timed(model)
        if compiling == "yes" or (compiling == "auto" and length(step) > WORTH_A_TRIAL):
            candidate = compiled(model, optimizer, batch, dtype)
            times = timed(candidate)  # also where it did not compile: all processes time together
            if times[1] < 0.97 * step:
                network, (micro_step, step) = candidate, times
        if processes.world_size() > 1:
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
            step = (micro_steps - 1) * micro_step + timed(network, micro_steps=1)[1]  # only the last one waits for others
    except Exception as error:
        if not out_of_memory(error):
            raise
        network = None
    if network is None:  # said here, since the except clause keeps the tensors of the failed step alive
        raise InputError(f"--batch-size {len(batch.inputs)} does not fit the memory of {device}; "
                         + advice(what_fits(model, optimizer, batch, micro_steps, dtype)))
    for part in optimizer.parts:
        part.state.clear()
    set_rng_state(random_state, device)
    model.train(mode)
    return network, step


def compiled(model: GPT, optimizer, batch: Batch, dtype: torch.dtype) -> GPT:
    """The model with its blocks and the loss compiled; or, after one warning, the model itself.

    One block is compiled and serves all layers, once for each length of rows; the rows of the loss are
    as many as a batch has supervised tokens, in steps of 64, so their number stays open (its second
    value is compiled for any). Tables and the last layer norm stay as they are: compiled, the rows of their gradients
    would add up in any order, and no run could be repeated.
    """
    try:
        torch._dynamo.config.recompile_limit = 64  # lengths of rows; beyond it the rest would run uncompiled
        torch._dynamo.config.optimize_ddp = False  # a block is small; it is the same graph with DDP and without
        network = copy.copy(model)  # another object with the same weights
        network.layer = torch.compile(model.layer, dynamic=False)
        network.chunk_nll = torch.compile(model.chunk_nll)
        one_round(network, optimizer, batch, dtype)
        return network
    except Exception as error:  # a missing compiler, an unknown GPU, … raise a dozen kinds
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"warning: --compile does not work here, going on without it: {reason}", file=sys.stderr)
        return model


def time_steps(network: nn.Module, optimizer, batch: Batch, micro_steps: int, dtype: torch.dtype,
               seconds: float) -> tuple[float, float]:
    """Median seconds of a micro-step and of a step, over all processes and about `seconds`."""
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < 3 or (sum(step for _, step in rounds) < seconds and len(rounds) < 12):
        micro_step, update = one_round(network, optimizer, batch, dtype)
        sums = processes.sum_over_ranks(micro_step, micro_steps * micro_step + update)  # all of them take as many rounds
        rounds.append(tuple(total / processes.world_size() for total in sums))
    return tuple(map(median, zip(*rounds[1:])))  # the first round warms up


def one_round(network: nn.Module, optimizer, batch: Batch, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a micro-step and of an update. Zero gradients at a rate of zero leave every weight as it is."""
    device = batch.inputs.device
    start = clock(device)
    with autocast(device, dtype):
        loss = network(*batch)
    loss.backward()
    middle = clock(device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad.zero_()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # as a step does, for its time
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return middle - start, clock(device) - middle


# ------------------------------------------------------------------ memory


def check_memory(model: GPT, optimizer, batch_size: int, tokens: int, masked: bool, micro_steps: int, dtype: torch.dtype) -> int:
    """Bytes that a step takes, about; InputError, with the settings that fit, if the device has fewer.

    For a CPU, where the kernel kills what takes too much; a GPU says so itself, in `rehearse`.
    """
    device = model.wpe.weight.device
    limit, needs = ROOM * memory_of_machine(), memory_needed(model, optimizer, tokens, masked, dtype)
    if needs(batch_size) <= limit:
        return int(needs(batch_size))
    pair = next((pair for pair in smaller(batch_size, micro_steps) if needs(pair[0]) <= limit), None)
    raise InputError(f"--batch-size {batch_size} with rows of {tokens} tokens needs about {needs(batch_size) / 1e9:.1f} GB, "
                     f"{device} has {limit / ROOM / 1e9:.1f} GB; {advice(pair)}")


def smaller(batch_size: int, micro_steps: int) -> Iterator[tuple[int, int]]:
    """Pairs (batch_size, micro_steps) of less memory and the same rows, so the same gradient, a step; largest first."""
    rows = batch_size * micro_steps
    return ((rows // more, more) for more in range(micro_steps + 1, rows + 1) if rows % more == 0)


def advice(pair: tuple[int, int] | None) -> str:
    """What to say of a pair of `smaller`, or of none."""
    if pair is None:
        return "not even 1 fits: take a smaller model or --block-size"
    return f"--batch-size {pair[0]} --accumulate {pair[1] * processes.world_size()} fits and takes the same steps"


def what_fits(model: GPT, optimizer, batch: Batch, micro_steps: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """The largest smaller pair, found by trying."""
    for size, more in smaller(len(batch.inputs), micro_steps):
        try:
            one_round(model, optimizer, Batch._make(None if x is None else x[:size] for x in batch), dtype)
            return size, more
        except Exception as error:
            if not out_of_memory(error):
                raise
    return None


def memory_needed(model: GPT, optimizer, tokens: int, masked: bool, dtype: torch.dtype) -> Callable[[int], float]:
    """Bytes of a training step on a CPU, as a function of the number of rows of `tokens` tokens.

    Weights, gradients and the optimizer's state are known. What a forward pass keeps for its
    backward is counted in one row and in two; the mask of rows that hold several texts (`masked`)
    comes on top, T × T, fp32, one a layer. A backward holds 0.7 times as much again, and its logits
    five times; with recomputation it holds one block besides, and its gradients: five times what the
    block would have kept. (The factors were measured; tests/test_rehearsal.py holds them to that.)
    """
    one, two = (kept_for_backward(model, rows, tokens, dtype) for rows in (1, 2))
    block_of_a_row = 0.0
    if model.recompute:
        model.recompute = False
        block_of_a_row = (kept_for_backward(model, 2, tokens, dtype) - two) / 2 / model.config.n_layer
        model.recompute = True
    per_row = 1.7 * (two - one) + 5 * block_of_a_row + 4 * masked * model.config.n_layer * tokens**2
    fixed = sum(4 * p.numel() * (2 if p.requires_grad else 1) for p in model.parameters()) + optimizer_bytes(optimizer)
    chunk = 4 * (len(model.labels) if model.labels else model.config.vocab_size) * LOSS_CHUNK  # fp32 logits
    return lambda rows: fixed + 2 * one - two + per_row * rows + 5 * chunk * min(1, rows * tokens / LOSS_CHUNK)


def kept_for_backward(model: GPT, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of rows of `tokens` tokens keeps for its backward pass, beside the weights."""
    device, weights = model.wpe.weight.device, {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}  # of each storage, by its address: several tensors may share one

    def note(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # x itself would hold its graph and be held by it, for ever

    random_state, mode = rng_state(device), model.training
    model.train()
    batch = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    with saved_tensors_hooks(note, lambda x: x), autocast(device, dtype):
        loss = model(batch, batch)  # held until its tensors are counted
    total = sum(size for address, size in sizes.items() if address not in weights)
    del loss
    set_rng_state(random_state, device)
    model.train(mode)
    return total


def memory_of_machine() -> int:
    """Bytes of memory that this process may have: of the machine, or of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [2**62]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(file) and (limit := Path(file).read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share it


# ------------------------------------------------------------------ disk


def optimizer_bytes(optimizer) -> int:
    """Size of its state: two fp32 numbers a weight for AdamW, one for Muon."""
    return sum((1 if isinstance(part, torch.optim.Muon) else 2) * 4 * p.numel()
               for part in optimizer.parts for group in part.param_groups for p in group["params"])


def checkpoint_bytes(model: GPT, optimizer) -> int:
    """Size of a checkpoint: fp32 weights (with LoRA only those that learn), the optimizer's state, and 4 MB for the tokenizer and the rest."""
    alone = lora.is_adapted(model)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad or not alone) + optimizer_bytes(optimizer) + 4_000_000


def base_bytes(model: GPT) -> int:
    """Size of what the checkpoints of a model with LoRA stand on, which is written once; 0 without LoRA."""
    return 4 * sum(p.numel() for p in model.parameters()) if lora.is_adapted(model) else 0


@processes.on_rank_0
def check_disk(out: Path, size: int, keep: int, base: int = 0) -> None:
    """InputError if checkpoints of `size` bytes will not fit: --keep, the best, and the one being written; and their base."""
    out.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for folder in [*runs.saved_steps(out), out / "base"] for path in folder.rglob("*.*"))
    needed, free = (keep + 2) * size + base, shutil.disk_usage(out).free + there
    if needed > free:
        raise InputError(f"--out {out}: {keep + 2} checkpoints (--keep, the best, the one being written) of "
                         f"{size / 1e6:,.0f} MB{f' and their base of {base / 1e6:,.0f} MB' if base else ''} need "
                         f"{needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free")
