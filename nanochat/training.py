"""train(): the loop, written out; below it its settings, and the parts that it names.

A micro-step is one forward and backward of batch_size examples; a step is `accumulate`
micro-steps and one optimizer update; an epoch is every example once. Pre-training and
fine-tuning run this same loop: what differs comes in as values (a model, examples, an
`evaluate` function, settings).

Sources: AdamW, Loshchilov & Hutter 2019; Muon, Jordan et al. 2024, as torch.optim.Muon;
linear decay to zero, Defazio et al. 2023; the loss scaler, Micikevicius et al. 2018.
"""

from __future__ import annotations  # train() stands above the settings that it takes

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Literal, Protocol

import torch
from tqdm import tqdm

from nanochat import InputError, checkpoint
from nanochat.model import GPT, IGNORED, Batch
from nanochat.runtime import MetricsLog, autocast, draw_losses, rng_state, set_rng_state
from nanochat.tokenizer import Tokenizer


def train(model: GPT, tokenizer: Tokenizer, data: Examples, config: TrainConfig, *, out: Path, settings: dict,
          device: torch.device, dtype: torch.dtype, evaluate: Callable[[], dict[str, float]],
          sample: Callable[[], str], resume: dict | None = None) -> Progress:
    """Train `model` in place; write metrics.jsonl, loss.png and checkpoints into `out`.

    evaluate() → at least {"val_loss"}; sample() → a text to look at; settings: what to save
    beside the weights; resume: the state of a checkpoint of the same run, without which an
    earlier run in `out` is deleted.
    """
    model.to(device)
    network = torch.compile(model) if config.compile else model
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress(max_steps=steps_in(config, None, len(data)))
    if resume is None:
        checkpoint.clear_run(out)
    else:
        progress = restore(resume, model, optimizer, scaler)
    log = MetricsLog(out / "metrics.jsonl", keep_steps=progress.step if resume else None)
    print(describe(model, data, config, progress, device, dtype, settings), file=sys.stderr)
    bar = tqdm(total=progress.max_steps, initial=progress.step, unit="step", dynamic_ncols=True)
    step_seconds: list[float] = []
    model.train()

    while progress.max_steps is None or progress.step < progress.max_steps:
        started = time.perf_counter()
        rate = learning_rate_factor(progress.step, progress.max_steps, config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

        # The whole step is drawn first: its loss is the mean over all its supervised tokens, and
        # micro-batches hold different numbers of them (a mean of means would weigh them wrongly).
        batches = []
        for _ in range(config.accumulate):
            batches.append(data.batch(example_order(progress.examples, config.batch_size, len(data), config.seed)))
            progress.examples += config.batch_size
        supervised = sum(int((batch.targets != IGNORED).sum()) for batch in batches)

        step_loss = torch.zeros((), device=device)
        for batch in batches:
            with autocast(device, dtype):
                loss = network(*batch.to(device)) / max(supervised, 1)
            scaler.scale(loss).backward()  # gradients add up over the micro-steps
            step_loss += loss.detach()

        scaler.unscale_(optimizer)  # before clipping: the norm must not depend on the scale
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        loss_value, norm_value = step_loss.item(), grad_norm.item()
        stop_if_not_finite(loss_value, norm_value, rate, progress, scaler.is_enabled())
        scale = scaler.get_scale()
        scaler.step(optimizer)  # does nothing if an fp16 gradient overflowed …
        scaler.update()  # … and then halves the scale
        optimizer.zero_grad(set_to_none=True)
        if scaler.get_scale() < scale:
            progress.skipped_in_a_row += 1
            continue  # the schedule does not advance
        progress.skipped_in_a_row = 0
        progress.step += 1

        seconds = time.perf_counter() - started
        progress.seconds += seconds
        step_seconds.append(seconds)
        if config.max_minutes and not progress.minutes_counted and len(step_seconds) == 20:
            progress.max_steps = max(progress.step, steps_in(config, median(step_seconds[10:]), len(data)))
            progress.minutes_counted, bar.total = True, progress.max_steps
            bar.write(f"{config.max_minutes:g} minutes are {progress.max_steps:,} steps here", file=sys.stderr)
        tokens_per_second = sum(batch.inputs.numel() for batch in batches) / seconds
        learning_rate = config.learning_rate * rate
        record = dict(step=progress.step, loss=loss_value, learning_rate=learning_rate, grad_norm=norm_value,
                      tokens_per_second=tokens_per_second, seconds=progress.seconds)
        bar.set_postfix_str(f"loss {loss_value:.3f} lr {learning_rate:.1e} norm {norm_value:.2f} "
                            f"{tokens_per_second:,.0f} tok/s", refresh=False)
        bar.update()

        quarter = progress.max_steps and math.ceil(progress.max_steps / 4)
        evaluating = progress.step == progress.max_steps or is_due(progress.step, config.eval_every or quarter)
        best = False
        if evaluating:
            results = evaluate()
            if not math.isfinite(results["val_loss"]):
                raise InputError(f"step {progress.step}: validation loss {results['val_loss']}, so this step is not saved")
            best = results["val_loss"] < progress.best_loss
            progress.best_loss = min(progress.best_loss, results["val_loss"])
            progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
            record |= results
            bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in results.items())
                      + f"{' (best)' if best else ''}\n  {sample()}", file=sys.stderr)
        log.write(**record)
        if evaluating or is_due(progress.step, config.save_every):
            state = snapshot(progress, model, optimizer, scaler)
            checkpoint.save(out, progress.step, model, tokenizer, settings=settings, results=record,
                            resume=state, best=best, keep=config.keep)
        if config.patience and progress.evaluations_since_best >= config.patience:
            bar.write(f"no better for {config.patience} evaluations: stopping early", file=sys.stderr)
            break

    bar.close()
    model.eval()
    draw_losses(out / "metrics.jsonl", out / "loss.png")
    return progress


# ------------------------------------------------------------------ settings and state


# Large batches are trained with 0.95; at a thousand tokens a step, where a token's row has a gradient
# every few hundred steps, the longer memory of 0.999 gave 2.5 % fewer bits per byte.
ADAM_BETAS = (0.9, 0.999)


@dataclass
class TrainConfig:
    """How to train. A run ends with the first of --max-steps, --max-minutes, --epochs that is reached.

    The scripts start from settings of their own: Settings in train.py and finetune.py.
    """

    batch_size: int = 8
    """sequences in a micro-step"""
    accumulate: int = 1
    """micro-steps in a step: a large batch in little memory, with the same gradient"""
    max_steps: int | None = None
    """optimizer steps in all"""
    max_minutes: float | None = None
    """minutes of training, without evaluations; steps 11 to 20 are timed, and it becomes a number of steps"""
    epochs: float | None = None
    """passes over the training examples"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest"""
    learning_rate: float = 6e-4
    """peak rate; warm-up rises to it linearly, and it falls linearly to zero at the last step"""
    warmup_steps: int = 20
    """steps of rising rate"""
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
    compile: bool = False
    """compile the network: pays on GPUs; on a CPU only in runs of hours"""
    seed: int = 0
    """of the weights' start, the data order and dropout"""

    def __post_init__(self):
        least = {"batch_size": 1, "accumulate": 1, "max_steps": 1, "eval_every": 1, "save_every": 1, "keep": 1,
                 "patience": 1, "warmup_steps": 0, "weight_decay": 0, "seed": 0}
        wrong = [
            f"--{name.replace('_', '-')} is {value}, must be at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and not value >= low
        ]
        wrong += [
            f"--{name.replace('_', '-')} is {value}, must be above 0"
            for name in ("max_minutes", "epochs", "learning_rate", "clip")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if self.seed > 2**40:
            wrong.append(f"--seed is {self.seed}, must be at most 2^40")
        if wrong:
            raise InputError("; ".join(wrong))

    def or_minutes(self, minutes: float) -> TrainConfig:
        """These settings, with a length of `minutes` if they name none."""
        if self.max_steps is self.max_minutes is self.epochs is None:
            return replace(self, max_minutes=minutes)
        return self


class Examples(Protocol):
    """What can be trained on: numbered examples, and a batch of any of them."""

    block_size: int  # most inputs of an example

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> Batch: ...


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint."""

    step: int = 0  # optimizer steps taken
    examples: int = 0  # examples consumed: the whole data position
    max_steps: int | None = None  # None while only --max-minutes limits the run and no step is timed
    minutes_counted: bool = False  # --max-minutes has become a number of steps
    best_loss: float = math.inf  # lowest validation loss
    evaluations_since_best: int = 0
    skipped_in_a_row: int = 0  # fp16 steps whose gradient overflowed
    seconds: float = 0.0  # of training, without evaluations and saves


# ------------------------------------------------------------------ length and rate of a run


def steps_in(config: TrainConfig, seconds_per_step: float | None, examples: int) -> int | None:
    """Steps of a run: the smallest of --max-steps, --epochs and, once steps are timed, --max-minutes.

    At least one; None if only the minutes limit it and no step is timed yet.
    """
    limits = [config.max_steps] if config.max_steps is not None else []
    if config.epochs is not None:
        limits.append(math.ceil(config.epochs * examples / (config.batch_size * config.accumulate)))
    if config.max_minutes is not None and seconds_per_step is not None:
        limits.append(int(config.max_minutes * 60 / seconds_per_step))
    if not limits and config.max_minutes is None:
        raise InputError("no length of the run: give --max-steps, --max-minutes or --epochs")
    return max(1, min(limits)) if limits else None


def describe(model: GPT, data: Examples, config: TrainConfig, progress: Progress, device: torch.device,
             dtype: torch.dtype, settings: dict) -> str:
    """What is about to happen: settings, size, tokens per step, steps, epochs, what was chosen."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_step = config.batch_size * config.accumulate
    length = f"{config.max_minutes} minutes"
    if progress.max_steps is not None:
        epochs = progress.max_steps * per_step / len(data)
        length = f"{progress.max_steps:,} steps, {epochs:.2f} epochs"
    return (
        f"settings: {json.dumps(settings, default=str, ensure_ascii=False)}\n"
        f"{learning:,} parameters learn, on {device} in {str(dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads\n"
        f"{len(data):,} examples of up to {data.block_size} tokens; {per_step} a step, "
        f"{per_step * data.block_size:,} tokens; {length}, from step {progress.step}"
    )


def learning_rate_factor(step: int, max_steps: int | None, warmup_steps: int) -> float:
    """Share of the peak rate at a step, counted from 0: linear warm-up, then linear decay to zero.

    While max_steps is not known yet, the rate stays at its peak after warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if max_steps is None:
        return 1.0
    return (max_steps - step) / max(1, max_steps - warmup_steps)


def is_due(step: int, every: int | None) -> bool:
    """Whether `step` is one of every, 2·every, 3·every, …"""
    return every is not None and step % every == 0


def stop_if_not_finite(loss: float, norm: float, rate: float, progress: Progress, fp16: bool) -> None:
    """Stop before an update that would destroy the weights.

    In fp16 a gradient that overflows is normal (the scaler skips the step and halves its scale),
    eleven in a row are not.
    """
    if math.isfinite(loss) and (math.isfinite(norm) or (fp16 and progress.skipped_in_a_row < 10)):
        return
    raise InputError(
        f"step {progress.step + 1}: loss {loss}, gradient norm {norm} at {rate:.0%} of the learning rate, "
        f"examples up to {progress.examples}; the last checkpoint is sound: try a lower --learning-rate"
    )


# ------------------------------------------------------------------ order of the examples


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


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer | MuonAndAdamW:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for tables and vectors.

    Only matrices decay: a row of a table is seen when its token comes up, and decay in between
    would shrink the rare ones. Muon's update is scaled to AdamW's root mean square (0.2), so that
    one rate serves both.
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_matrices = [name for name, p in learning.items() if name.startswith("h.") and p.dim() == 2]
    peak = {"peak_lr": config.learning_rate}
    matrices = peak | {"params": [learning.pop(name) for name in in_matrices], "weight_decay": config.weight_decay}
    others = peak | {"params": list(learning.values()), "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, lr=config.learning_rate, betas=ADAM_BETAS, fused=True)
    if config.optimizer == "adamw":
        return adamw([matrices, others])
    muon = torch.optim.Muon([matrices], lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW([muon, adamw([others])])


class MuonAndAdamW:
    """Two optimizers that step as one, so that an fp16 overflow in either skips both."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


# ------------------------------------------------------------------ state of a run


def snapshot(progress: Progress, model: GPT, optimizer, scaler: torch.amp.GradScaler) -> dict:
    """All that a run needs, beside its weights, to go on as if it had never stopped."""
    name_of = {p: name for name, p in model.named_parameters()}
    parts = getattr(optimizer, "parts", [optimizer])
    return {
        "progress": asdict(progress),
        "optimizer": {name_of[p]: dict(state) for part in parts for p, state in part.state.items()},
        "scaler": scaler.state_dict(),
        "rng": rng_state(),
    }


def restore(state: dict, model: GPT, optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Put a snapshot back: into the optimizer, scaler and generators; → the progress."""
    name_of = {p: name for name, p in model.named_parameters()}
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            for p in group["params"]:
                if name_of[p] in state["optimizer"]:
                    saved = state["optimizer"][name_of[p]]
                    part.state[p] = {key: value.to(p.device) for key, value in saved.items()}
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    set_rng_state(state["rng"])
    return Progress(**state["progress"])
