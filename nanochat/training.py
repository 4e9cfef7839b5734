"""train(): the loop, written out; below it its settings, and the parts that it names.

A micro-step is one forward and backward of batch_size examples; a step is `accumulate`
micro-steps and one optimizer update; an epoch is every example once. Pre-training and
fine-tuning run this same loop: what differs comes in as values (a model, examples, an
`evaluate` function, settings).

Under torchrun the processes share the micro-steps of a step, and DistributedDataParallel averages
their gradients: the settings say what a step is, the number of processes only how long it takes.

A resumed run is the run that it would have been: a checkpoint holds all that a step depends on
(resume.py), and the order of the examples is a function of one counter.

Sources: AdamW, Loshchilov & Hutter 2019; Muon, Jordan et al. 2024, as torch.optim.Muon, its update
scaled as in Liu et al. 2025; linear decay to zero, Defazio et al. 2023; the loss scaler, Micikevicius et al. 2018; MFU, the share of the
devices' measured peak that the network's products reach, Chowdhery et al. 2022, appendix B.
"""

from __future__ import annotations  # train() stands above the settings that it takes

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from nanochat import InputError, processes, rehearsal, runs, runtime
from nanochat.metrics import MetricsLog, draw_losses
from nanochat.model import GPT, IGNORED, Batch, forward_flops
from nanochat.resume import Progress, meet_conditions, restore, settings_to_resume, snapshot
from nanochat.runtime import autocast
from nanochat.tokenizer import Tokenizer


@runtime.signals_wait()
def train(model: GPT, tokenizer: Tokenizer, data: Examples, config: TrainConfig, *, out: Path, settings: dict,
          device: torch.device, dtype: torch.dtype, evaluate: Callable[[], dict[str, float]],
          sample: Callable[[], dict[str, str]], held_out: str = "", resume: dict | None = None) -> Progress:
    """Train `model` in place; write metrics.jsonl, loss.png and checkpoints into `out`.

    evaluate() → at least {"val_loss"}; sample() → prompts and what the model makes of them; settings: what
    to save beside the weights; held_out: fingerprint of what evaluate() reads; resume: the state of a
    checkpoint of the same run, or None to start anew, which deletes an earlier run in `out`. The first
    SIGINT or SIGTERM ends the run after the step that it meets, saved: runtime.Stopped is raised.
    """
    model.to(device)
    model.recompute = config.recompute
    world_size = processes.world_size()
    optimizer: Any = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    network, progress, record, conditions = begin(
        model, optimizer, scaler, data, held_out, config, out, settings, dtype, resume)
    if not resume:
        runs.clear(out)  # of an earlier run, now that all is ready
    peak = runtime.product_speed(device, dtype) * world_size  # FLOP/s of all processes
    model.train()
    batches, supervised = draw(data, progress.examples, config, device)
    with (closing(MetricsLog(out / "metrics.jsonl", before=progress.step)) as log,
          tqdm(total=progress.max_steps, initial=progress.step, unit="step", dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10) as bar):
        while True:
            # What follows a step stands here, before the next one: its checkpoint, below, is saved before it is
            # evaluated, so that a resumed run, whose `record` comes from there, begins with the evaluation it owes.
            if record:  # of the step just done; none before the first, and after one that was skipped
                if evaluation_due(progress, config):
                    results = evaluate()
                    best = note_evaluation(progress, results["val_loss"])
                    runs.add_results(out, progress.step, results, best)
                    record |= results | {"samples": sample(), "peak_memory_mb": round(runtime.peak_memory(device) / 1e6)}
                    bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in results.items()) + " (best)" * best
                              + "".join(f"\n  {prompt!r} → {text!r}" for prompt, text in record["samples"].items()), file=sys.stderr)
                log.write(**record)
            if progress.step >= progress.max_steps or progress.evaluations_since_best >= (config.patience or math.inf):
                break

            started = time.perf_counter()
            learning_rate = config.learning_rate * learning_rate_factor(progress.step, progress.max_steps, config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            step_loss = 0.0
            for batch in batches:
                network.require_backward_grad_sync = batch is batches[-1]  # DDP, if it is that, waits for others once a step
                with autocast(device, dtype):
                    loss = network(*batch.to(device)) / max(supervised, 1)
                scaler.scale(loss * world_size).backward()  # gradients add up over the micro-steps; DDP takes their mean
                step_loss += loss.detach()
            progress.examples += config.batch_size * config.accumulate
            next_step = draw(data, progress.examples, config, device)  # while a GPU is still at work

            scaler.unscale_(optimizer)  # before clipping: the norm must not depend on the scale
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            loss_value, tokens, flops = processes.sum_over_ranks(
                float(step_loss),
                sum(batch.inputs.numel() for batch in batches),  # padding is work too
                sum(training_flops(model, batch) for batch in batches))
            norm_value = grad_norm.item()
            stop_if_not_finite(loss_value, norm_value, learning_rate, progress, scaler, batches, tokenizer)
            scale = scaler.get_scale()
            scaler.step(optimizer)  # does nothing if an fp16 gradient overflowed …
            scaler.update()  # … and then halves the scale
            optimizer.zero_grad(set_to_none=True)
            batches, supervised = next_step
            if scaler.get_scale() < scale:
                progress.skipped_in_a_row += 1
                record = None
                continue  # the schedule does not advance
            progress.skipped_in_a_row = 0
            progress.step += 1

            seconds = time.perf_counter() - started
            progress.seconds += seconds
            record = dict(step=progress.step, loss=loss_value, learning_rate=learning_rate, grad_norm=norm_value,
                          tokens_per_second=tokens / seconds, mfu=flops / seconds / peak, seconds=progress.seconds)
            stop_signal = runtime.signal_received()  # Ctrl-C or SIGTERM, which signals_wait has only noted
            if stop_signal or evaluation_due(progress, config) or is_due(progress.step, config.save_every):
                state = snapshot(progress, record, model, optimizer, scaler) | {"conditions": conditions}
                runs.save(out, progress.step, model, tokenizer, settings=settings, results=record, resume=state, keep=config.keep)
            if stop_signal:
                log.write(**record)
                break
            bar.set_postfix_str(f"loss {loss_value:.3f} lr {record['learning_rate']:.1e} norm {norm_value:.2f} "
                                f"{tokens / seconds:,.0f} tok/s {record['mfu']:.0%} MFU", refresh=False)
            bar.update()

    model.eval()
    draw_losses(out / "metrics.jsonl", out / "loss.png")
    if stop_signal := runtime.signal_received():
        raise runtime.Stopped(stop_signal, f"step {progress.step} is saved in {out}; --resume goes on from it")
    if progress.step < progress.max_steps:
        print(f"step {progress.step} of {progress.max_steps} is the last: no better validation loss in --patience {config.patience} evaluations",
              file=sys.stderr)
    return progress


# ------------------------------------------------------------------ settings and data


@dataclass
class TrainConfig:
    """How to train. A run ends with the first of --max-steps, --max-minutes, --epochs that is reached.

    The scripts start from settings of their own: Settings in train.py and finetune.py.
    """

    batch_size: int = 8
    """sequences in a micro-step"""
    accumulate: int = 1
    """micro-steps in a step, shared by all processes: a large batch in little memory, with the same gradient"""
    max_steps: int | None = None
    """optimizer steps in all"""
    max_minutes: float | None = None
    """minutes of training, without evaluations; some steps are timed beforehand, and it becomes a number of steps"""
    epochs: float | None = None
    """passes over the training examples"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest"""
    learning_rate: float = 6e-4
    """peak rate; warm-up rises to it linearly, and it falls linearly to zero at the last step"""
    warmup_steps: int = 20
    """steps of rising rate"""
    beta2: float = 0.999
    """AdamW's decay of the running mean of squared gradients; steps of over 100,000 tokens want 0.95"""
    weight_decay: float = 0.1
    """decoupled decay of the matrices, never of tables, biases and layer norms"""
    clip: float = 1.0
    """largest norm of the gradient of a step; above it, it is scaled down to it"""
    eval_every: int | None = None
    """steps between evaluations; None: four in a run"""
    save_every: int | None = None
    """steps between checkpoints, beside those of the evaluations"""
    keep: int = 2
    """newest checkpoints kept, beside the best"""
    patience: int | None = None
    """stop after so many evaluations without a better validation loss; None: never"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """type of the large products; weights stay fp32"""
    device: str = "auto"
    """cuda, cpu, cuda:1, …"""
    compile: Literal["auto", "yes", "no"] = "auto"
    """compile the blocks and the loss; auto: in runs of over ten minutes, if some steps are then faster"""
    recompute: bool = False
    """keep only the input of each block for the backward pass: less memory, a third more work (activation checkpointing)"""
    seed: int = 0
    """of the weights' start, the data order and dropout"""

    def __post_init__(self):
        least = {"batch_size": 1, "accumulate": 1, "max_steps": 1, "eval_every": 1, "save_every": 1, "keep": 1,
                 "patience": 1, "warmup_steps": 0, "weight_decay": 0, "seed": 0}
        wrong = [
            f"--{name.replace('_', '-')} is {value}, must be at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and not low <= value < math.inf
        ]
        wrong += [
            f"--{name.replace('_', '-')} is {value}, must be above 0 and at most {most:g}"
            for name, most in {"max_minutes": 1e7, "epochs": 1e9, "learning_rate": 1e3, "clip": math.inf}.items()
            if (value := getattr(self, name)) is not None and not 0 < value <= most
        ]
        if self.batch_size * self.accumulate > 10**7:
            wrong.append(f"--batch-size {self.batch_size} times --accumulate {self.accumulate} is over ten million rows a step")
        if not 0 <= self.beta2 < 1:
            wrong.append(f"--beta2 is {self.beta2}, must be at least 0 and below 1")
        if self.seed > 2**40:
            wrong.append(f"--seed is {self.seed}, must be at most 2^40")
        if wrong:
            raise InputError("; ".join(wrong))

    def completed(self, minutes: float) -> TrainConfig:
        """These settings, with a length of `minutes` if they name none; InputError if the processes cannot share a step."""
        if self.accumulate % processes.world_size():
            raise InputError(f"--accumulate is {self.accumulate}, must be a multiple of {processes.world_size()}, the number of "
                             "processes, which share the micro-steps of a step")
        if self.max_steps is self.max_minutes is self.epochs is None:
            return replace(self, max_minutes=minutes)
        return self


class Examples(Protocol):
    """What can be trained on: numbered examples, and a batch of any of them."""

    block_size: int  # most inputs of an example
    fingerprint: str  # equal only for equal examples in equal order

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> Batch: ...


# ------------------------------------------------------------------ before the first step


def set_up(settings, parse: Callable, minutes: float, writes: bool = True) -> tuple:
    """How both scripts begin: look at the run folder, complete the settings, choose device and precision.

    → (settings, the step folder to resume from and its state, device, dtype); a run that starts anew has None for
    these two. settings: the dataclass of a script, as parse() gave it; minutes: the length of a run that names none;
    writes: False if nothing will be written, so that the run folder may hold another run.
    """
    overwrite = settings.overwrite or not (writes or settings.resume)
    init = Path(settings.init or "")
    if settings.init and writes and not settings.resume and init.exists() and init.resolve().is_relative_to(settings.out.resolve()):
        raise InputError(f"--init {init} lies in --out {settings.out}, where this run begins anew: name another --out")
    saved, state = processes.from_rank_0(lambda: runs.open_run(settings.out, settings.resume, overwrite))
    if state:
        settings = settings_to_resume(settings, state, parse)
    config = settings.training = settings.training.completed(minutes)
    torch.manual_seed(config.seed)
    runtime.keep_freed_memory()
    device = runtime.pick_device(config.device)
    dtype = processes.from_rank_0(lambda: runtime.pick_dtype(state["conditions"]["dtype"] if state else config.dtype, device))
    return settings, saved, state, device, dtype


def begin(model: GPT, optimizer, scaler: torch.amp.GradScaler, data: Examples, held_out: str, config: TrainConfig, out: Path,
          settings: dict, dtype: torch.dtype, resume: dict | None) -> tuple[Any, Progress, dict | None, dict]:
    """Rehearse, then start or go on: → (the network that steps, progress, the last step's record, conditions).

    Does the run fit disk and memory, how long does a step take, and is it faster compiled? What came of it is
    printed. conditions: all that must be equal for a resumed run to be the same run.
    """
    device, micro_steps = model.wpe.weight.device, config.accumulate // processes.world_size()
    disk = rehearsal.checkpoint_bytes(model, optimizer)
    rehearsal.check_disk(out, disk, config.keep, rehearsal.base_bytes(model))
    memory = 0
    if device.type != "cuda":
        masked = data.batch([0]).segments is not None
        memory = rehearsal.check_memory(model, optimizer, config.batch_size, data.block_size, masked, micro_steps, dtype)
    texts = f"{data.fingerprint} {held_out}"
    if resume:
        meet_conditions(resume["conditions"], device, texts)
    batch = data.batch([i % len(data) for i in range(config.batch_size)]).to(device)
    compiling = config.compile
    if resume:
        compiling = "yes" if resume["conditions"]["compiled"] else "no"
    time_to_spend = 0.01 * 60 * (config.max_minutes or 2)  # seconds, on the trial steps

    def run_seconds(step_seconds: float) -> float:
        return step_seconds * steps_in(config, step_seconds, len(data))

    print("trying a few steps: do they fit, and how long do they take?", file=sys.stderr)
    network, seconds = rehearsal.rehearse(model, optimizer, batch, micro_steps, dtype, compiling, time_to_spend, run_seconds)
    if resume:
        progress, record = restore(resume, model, optimizer, scaler)
    else:
        progress, record = Progress(steps_in(config, seconds, len(data))), None
        torch.manual_seed(1_000_003 * (config.seed + 1) + processes.rank())  # for dropout: each process drops others
    conditions = {
        "settings": json.loads(json.dumps(settings, default=str)),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size(),
        "compiled": getattr(network, "module", network) is not model,
        "texts": texts,
    }
    memory = memory or torch.cuda.max_memory_allocated(device)
    print(announcement(model, data, config, progress, conditions, seconds, memory, disk), file=sys.stderr)
    return network, progress, record, conditions


def announcement(model: GPT, data: Examples, config: TrainConfig, progress: Progress, conditions: dict, seconds_per_step: float,
                 memory: int, disk: int) -> str:
    """What is about to happen: settings, size, length, what was chosen, and what it will take."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = config.batch_size * config.accumulate
    left = progress.max_steps - progress.step
    minutes = left * seconds_per_step / 60
    lines = [
        f"settings: {json.dumps(conditions['settings'], ensure_ascii=False)}",
        f"{learning:,} parameters learn, on {conditions['device']} in {conditions['dtype']}, "
        f"{conditions['processes']} process{'es' * (conditions['processes'] > 1)}, {conditions['threads']} threads"
        f"{', compiled' * conditions['compiled']}",
        f"{len(data):,} examples of up to {data.block_size} tokens; {rows} a step, {rows * data.block_size:,} tokens; "
        f"{progress.max_steps:,} steps, {progress.max_steps * rows / len(data):.2f} epochs",
        f"about {minutes:.1f} minutes for {left:,} steps, and evaluations; "
        f"{memory / 1e9:.1f} GB of memory; {disk / 1e6:,.0f} MB a checkpoint, {config.keep + 1} kept at most",
    ]
    if progress.max_steps <= config.warmup_steps:
        lines.append(f"the rate rises for --warmup-steps {config.warmup_steps}: this run ends before it falls")
    if progress.step:
        lines.append(f"resumed at step {progress.step:,}" + ("" if left else ": the run is complete; --init goes on from its "
                     "weights with a new schedule"))
    return "\n".join(lines)


# ------------------------------------------------------------------ length and rate of a run


def steps_in(config: TrainConfig, seconds_per_step: float, examples: int) -> int:
    """Steps of a run, at least one: the smallest of --max-steps, --epochs and --max-minutes."""
    limits = [config.max_steps] if config.max_steps is not None else []
    if config.epochs is not None:
        limits.append(math.ceil(config.epochs * examples / (config.batch_size * config.accumulate)))
    if config.max_minutes is not None:
        limits.append(int(config.max_minutes * 60 / seconds_per_step))
    if not limits:
        raise InputError("no length of the run: give --max-steps, --max-minutes or --epochs")
    return max(1, min(limits))


def learning_rate_factor(step: int, max_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at a step, counted from 0: linear warm-up, then linear decay to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (max_steps - step) / max(1, max_steps - warmup_steps)


def is_due(step: int, every: int | None) -> bool:
    """Whether `step` is one of every, 2·every, 3·every, …"""
    return every is not None and step % every == 0


def evaluation_due(progress: Progress, config: TrainConfig) -> bool:
    """After every --eval-every steps, else after each quarter of the run; and at its end."""
    every = config.eval_every or math.ceil(progress.max_steps / 4)
    return progress.step >= progress.max_steps or is_due(progress.step, every)


def note_evaluation(progress: Progress, val_loss: float) -> bool:
    """Count an evaluation; → whether it is the best so far."""
    if not math.isfinite(val_loss):
        raise InputError(f"step {progress.step}: validation loss {val_loss}: the run has diverged; try a lower --learning-rate")
    best = val_loss < progress.best_loss
    progress.best_loss = min(progress.best_loss, val_loss)
    progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
    return best


def stop_if_not_finite(loss: float, norm: float, learning_rate: float, progress: Progress, scaler: torch.amp.GradScaler,
                       batches: list[Batch], tokenizer: Tokenizer) -> None:
    """Stop before an update that would destroy the weights, and show what was being learned.

    In fp16 a gradient that overflows is normal (the scaler skips the step and halves its scale),
    eleven in a row are not.
    """
    if math.isfinite(loss) and (math.isfinite(norm) or (scaler.is_enabled() and progress.skipped_in_a_row < 10)):
        return
    for row in [row for batch in batches for row in batch.inputs][:8]:
        print(f"  in this step: {tokenizer.decode(row[:40].tolist())!r} …", file=sys.stderr)
    raise InputError(
        f"step {progress.step + 1}: loss {loss}, gradient norm {norm} at learning rate {learning_rate:.2g}; "
        f"the last checkpoint is sound: look at the texts above, or start anew with a lower --learning-rate"
    )


# ------------------------------------------------------------------ order of the examples


def draw(data: Examples, position: int, config: TrainConfig, device: torch.device) -> tuple[list[Batch], int]:
    """The micro-batches of the step at `position` in the order of examples: → (this process's, supervised tokens of all).

    Process r of w takes the micro-batches r, r + w, …. A step is drawn whole, since its loss is the
    mean over all its supervised tokens, and micro-batches hold different numbers of them: a mean of
    means would weigh them wrongly.
    """
    batches = []
    for micro_step in range(processes.rank(), config.accumulate, processes.world_size()):
        start = position + micro_step * config.batch_size
        batches.append(data.batch(example_order(start, config.batch_size, len(data), config.seed)))
    supervised = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    if device.type == "cuda":
        batches = [batch.pinned() for batch in batches]
    return batches, int(processes.sum_over_ranks(supervised)[0])


def training_flops(model: GPT, batch: Batch) -> int:
    """Of a micro-batch, forward and backward, with the length of its own rows and the head where it is computed.

    A frozen matrix needs no gradient of its own: one product less. (A label head is too small to count.)
    """
    supervised = 0 if model.labels else int((batch.targets != IGNORED).sum())
    blocks = list(model.h.parameters())
    learning = sum(p.numel() for p in blocks if p.requires_grad) / sum(p.numel() for p in blocks)
    return int((2 + learning) * forward_flops(model.config, batch.inputs.numel(), supervised, batch.inputs.size(1)))


def example_order(position: int, count: int, examples: int, seed: int) -> list[int]:
    """Which examples stand at position … position + count in the endless order of a run.

    Every epoch is a permutation of all examples, drawn from (seed, epoch); the order runs on
    across epochs, so every batch is full and one counter says where a run is.
    """
    places = range(position, position + count)
    return [int(_permutation(examples, seed, place // examples)[place % examples]) for place in places]


@lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator)


# ------------------------------------------------------------------ optimizer


def build_optimizer(model: GPT, config: TrainConfig) -> Optimizers:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for tables and vectors.

    β₂: at a thousand tokens a step, where a token's row has a gradient every few hundred steps, the
    longer memory of 0.999 gave 2.5 % fewer bits per byte than 0.95.

    Only matrices decay: a row of a table is seen when its token comes up, and decay in between
    would shrink the rare ones. Muon's update is scaled to AdamW's root mean square (0.2), so that
    one rate serves both.
    """
    for p in model.parameters():
        p.data = p.data.contiguous()  # those that a GPT-2 file has transposed, too
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_matrices = [name for name, p in learning.items() if name.startswith("h.") and p.dim() == 2]
    matrices = {"params": [learning.pop(name) for name in in_matrices], "weight_decay": config.weight_decay}
    others = {"params": list(learning.values()), "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return Optimizers([adamw([matrices, others])])
    muon = torch.optim.Muon([matrices], lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
    return Optimizers([muon, adamw([others])])


class Optimizers:
    """One or two optimizers that step as one, so that an fp16 overflow in either skips both."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        """An update of all parameters, each by the optimizer that has it."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)
