"""Adversarial training: each batch is learned as it is, and with its token vectors pushed where that hurts most.

With g the gradient of the loss by the token vectors of a row, the worst small push of length ε is, to first order,

    r = ε · g / ‖g‖        and what is learned is the mean of loss(vectors) and loss(vectors + r)

The pair stands in the model's forward, where the core's loop finds it; weights, checkpoints and evaluation are as
ever. A step costs two and a half ordinary ones.

    python recipes/fgm.py
    python recipes/fgm.py --task classify --data bbc --block-size 64 --steps 120

Source: Miyato et al. 2017 (adversarial training methods for semi-supervised text classification), equation 5.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from trial import Result, Trial, compare, run

from nanochat import InputError
from nanochat.model import GPT


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    epsilon: float = 0.5
    """length of the push of a row; the vectors of a row of 128 tokens have a length of some 5 to 10 together"""
    out: Path | None = None
    """keep the model of the first seed here"""

    def __post_init__(self):
        if self.epsilon <= 0:
            raise InputError(f"--epsilon is {self.epsilon}, must be above 0")
        super().__post_init__()


def worst_push(gradient: Tensor, epsilon: float) -> Tensor:
    """r = ε g / ‖g‖, for each row of (B, T, C)."""
    return epsilon * gradient / gradient.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def make_adversarial(model: GPT, epsilon: float) -> None:
    """In training, the loss of the model is from now on the mean of the plain and the pushed one; in place."""
    plain, state = model.forward, {"vectors": None, "push": 0.0}

    def pushed(table: torch.nn.Module, inputs: tuple[Tensor], vectors: Tensor) -> Tensor:
        state["vectors"] = vectors
        return vectors + state["push"]

    def forward(tokens: Tensor, targets: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        loss = plain(tokens, targets, segments)
        if not model.training or targets is None:
            return loss
        (gradient,) = torch.autograd.grad(loss, state["vectors"], retain_graph=True)
        state["push"] = worst_push(gradient, epsilon)
        try:
            return (loss + plain(tokens, targets, segments)) / 2
        finally:
            state.update(push=0.0, vectors=None)

    model.wte.register_forward_hook(pushed)
    model.forward = forward


def main(trial: Settings) -> None:
    """Fine-tune without and with the push."""

    def adversarial(seed: int) -> Result:
        model, tokenizer = trial.start(seed)
        make_adversarial(model, trial.epsilon)
        seconds = trial.fit(model, tokenizer, trial.rows(trial.parts[0], model, tokenizer), seed)
        trial.keep(model, tokenizer)
        return trial.measure(model, tokenizer) | {"seconds": seconds}

    compare(trial, {"plain": trial.plain, "adversarial": adversarial})


if __name__ == "__main__":
    run(Settings, main, __doc__)
