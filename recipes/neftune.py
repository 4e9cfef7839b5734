"""NEFTune: noise on the token vectors in training, so that a fine-tune learns less of its examples by heart.

Each vector of a row of T tokens gets uniform noise from −a to a, a = alpha / √(T·C): the noise of a whole row
has a length near alpha / √3, however long the row is. A forward hook on the token table adds it in training and
nowhere else; the loop, the checkpoints and the model stay as they are.

    python recipes/neftune.py

Source: Jain et al. 2023 (NEFTune: noisy embeddings improve instruction finetuning), algorithm 1.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from trial import Result, Trial, compare, run

from nanochat.model import GPT


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    alpha: float = 5.0
    """size of the noise; the paper tries 5, 10 and 15"""
    out: Path | None = None
    """keep the model of the first seed here"""


def add_noise(model: GPT, alpha: float) -> None:
    """From now on the token vectors (B, T, C) are noisy, in place; only in training."""

    def noisy(table: torch.nn.Module, inputs: tuple[Tensor], vectors: Tensor) -> Tensor:
        T, C = vectors.shape[-2:]
        noise = torch.empty_like(vectors).uniform_(-1, 1) * alpha / math.sqrt(T * C)
        return vectors + noise if table.training else vectors

    model.wte.register_forward_hook(noisy)


def main(trial: Settings) -> None:
    """Fine-tune without and with noise."""

    def noisy(seed: int) -> Result:
        model, tokenizer = trial.start(seed)
        add_noise(model, trial.alpha)
        seconds = trial.fit(model, tokenizer, trial.rows(trial.parts[0], model, tokenizer), seed)
        trial.keep(model, tokenizer)
        return trial.measure(model, tokenizer) | {"seconds": seconds}

    compare(trial, {"plain": trial.plain, "NEFTune": noisy})


if __name__ == "__main__":
    run(Settings, main, __doc__)
