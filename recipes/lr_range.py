"""Learning-rate range test: one short run in which the rate grows until the loss does, drawn as a curve.

The rate rises by the same factor at every step, from --low until the loss is half as high again as its lowest, or the
examples have all been seen: in a second pass the loss falls because they are known. The rate proposed is a fifth of the
one at which the smoothed loss is lowest: there it is about to rise, and a whole run is longer than this one. The table
compares a fine-tune at --learning-rate with one at that rate.

    python recipes/lr_range.py
    python recipes/lr_range.py --data bbc --task classify --block-size 64 --steps 120

Measured on 2026-11-22, one core of an AMD EPYC, torch 2.13.0 CPU, three seeds: chitchat, perplexity 110.0 ± 0.3 at the
default 2e-3, 109.4 ± 0.3 at 2.3e-3, the rate proposed (−0.5 ± 0.1); BBC, accuracy 0.868 ± 0.014 at 2e-3, 0.884 ± 0.004 at
1.5e-3 (+0.016 ± 0.014).

Sources: Smith 2017 (cyclical learning rates for training neural networks), section 3.3; Howard & Gugger 2020 (fastai) for
the constant factor. They take the steepest place, or a tenth of the lowest; the fifth was chosen on chitchat.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import trange
from trial import Trial, compare, run

from nanochat import InputError, training
from nanochat.metrics import picture
from nanochat.model import GPT
from nanochat.rows import Rows
from nanochat.runtime import autocast

Curve = list[tuple[float, float]]  # (rate, loss of the step at it)


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    low: float = 1e-4
    """first rate"""
    high: float = 1e-1
    """last rate"""
    curve: Path = Path("lr_range.png")
    """where the curve is drawn"""

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise InputError(f"--low is {self.low}, must be above 0 and below --high {self.high}")
        super().__post_init__()


def sweep(model: GPT, rows: Rows, config: training.TrainConfig, low: float, high: float, steps: int, dtype: torch.dtype) -> Curve:
    """Train `model` (which is spoilt by it) at rates from low to high, or until the loss is half as high again as its lowest."""
    optimizer, curve, device = training.build_optimizer(model, config), [], model.wpe.weight.device
    model.train()
    for step in trange(steps, desc="rates", unit="step"):
        rate = low * (high / low) ** (step / (steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        (batch,), supervised = training.draw(rows, step * config.batch_size, config, device)
        with autocast(device, dtype):
            loss = model(*batch.to(device)) / max(supervised, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((rate, loss.item()))
        if not loss.item() <= 1.5 * min(value for _, value in curve):  # nor is a NaN
            break
    return curve


def smoothed(losses: list[float], width: int = 5) -> list[float]:
    """The mean of the losses around each, fewer at the ends."""
    parts = (losses[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def proposed(curve: Curve) -> float:
    """A fifth of the rate at which the smoothed loss is lowest."""
    losses = smoothed([loss for _, loss in curve if math.isfinite(loss)])
    return curve[losses.index(min(losses))][0] / 5


def draw(curve: Curve, rate: float, path: Path) -> None:
    """The losses, the smoothed losses and the proposed rate, as a .png."""
    rates, losses = zip(*curve)
    with picture(path) as axes:
        axes.semilogx(rates, losses, color="#9db8d9", label="a step")
        axes.semilogx(rates, smoothed(list(losses)), color="#1f5fa8", label="smoothed")
        axes.axvline(rate, color="#d1495b", label=f"proposed: {rate:.1e}")
        axes.set(xlabel="learning rate", ylabel="loss, nats per target")
        axes.legend()


def main(trial: Settings) -> None:
    """Find a rate, then fine-tune at the default and at that rate."""
    model, tokenizer = trial.start(seed=0)
    rows = trial.rows(trial.parts[0], model, tokenizer)
    steps = max(20, len(rows) // trial.config.batch_size)  # one pass
    curve = sweep(model, rows, trial.config, trial.low, trial.high, steps, trial.dtype)
    rate = proposed(curve)
    draw(curve, rate, trial.curve)
    print(f"{trial.curve}: the rate proposed is {rate:.2g}")
    compare(trial, {f"at {trial.learning_rate:.2g}": trial.arm, f"at {rate:.2g}": lambda seed: trial.arm(seed, learning_rate=rate)})


if __name__ == "__main__":
    run(Settings, main, __doc__)
