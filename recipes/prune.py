"""Pruning by depth: drop the blocks that the loss misses least, then fine-tune what is left for a short while.

Each block adds to the residual stream, so the network runs without any one of them; which one matters least is
found by trying each on the validation examples, one after the other (greedily). The plain arm drops the last blocks,
and both repair themselves for half as many steps as the fine-tune before took. What is left is an ordinary, smaller GPT.

    python recipes/prune.py

Measured on 2026-11-22, one core of an AMD EPYC, torch 2.13.0 CPU, three seeds, two of four blocks dropped: perplexity
164.2 ± 1.3 without the last two, 134.1 ± 0.8 without the chosen two, of all four 110.0 ± 0.3; repaired, 119.0 ± 0.3 and
117.0 ± 0.1 (−2.0 ± 0.2). With --drop 1 the choice is worth 6.0 ± 2.0 unrepaired, nothing after (+0.1 ± 0.7, repaired at 2e-3).

Sources: Men et al. 2024 (ShortGPT: redundant layers); Sajjad et al. 2023 (dropping layers, the last ones among them).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from trial import Result, Trial, compare, run

from nanochat import InputError, evaluate
from nanochat.model import GPT
from nanochat.rows import Rows
from nanochat.tokenizer import Tokenizer


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    drop: int = 2
    """blocks to leave out"""
    repair_rate: float = 5e-4
    """peak learning rate of the repair: the weights have been trained on these examples already"""
    out: Path | None = None
    """keep the pruned model of the first seed here"""


def drop_block(model: GPT, layer: int) -> None:
    """Leave one block out, in place."""
    model.h = nn.ModuleList(block for i, block in enumerate(model.h) if i != layer)
    model.config = replace(model.config, n_layer=len(model.h))


def losses_without(model: GPT, tokenizer: Tokenizer, rows: Rows, dtype: torch.dtype = torch.float32) -> list[float]:
    """The loss on `rows` without each of the blocks in turn."""
    blocks, losses = model.h, []
    for layer in range(len(blocks)):
        model.h = nn.ModuleList(block for i, block in enumerate(blocks) if i != layer)
        losses.append(evaluate.score(model, tokenizer, rows.batches(32), dtype)["loss"])
    model.h = blocks
    return losses


def main(trial: Settings) -> None:
    """Fine-tune, drop the last blocks or the chosen ones, repair, and compare."""
    whole = {}  # seed → the weights of the whole network after its fine-tune

    def all_blocks(seed: int) -> Result:
        """The fine-tune from which both others are cut; nothing is, so its scores stand in the lines "cut" too."""
        model, tokenizer = trial.start(seed)
        if not 0 < trial.drop < len(model.h):
            raise InputError(f"--drop is {trial.drop}, must be from 1 to {len(model.h) - 1}: the model has {len(model.h)} blocks")
        trial.fit(model, tokenizer, seed)
        whole[seed] = model.state_dict()
        after = trial.measure(model, tokenizer)
        return {f"{name}, cut": value for name, value in after.items()} | after

    def cut(seed: int, choose: bool) -> Result:
        """Without --drop blocks, the last ones or the chosen ones: scores before the repair ("cut") and after it."""
        model, tokenizer = trial.start(seed)
        model.load_state_dict(whole[seed])
        for _ in range(trial.drop):
            layer = len(model.h) - 1
            if choose:
                losses = losses_without(model, tokenizer, trial.rows(trial.parts[1], model, tokenizer), trial.dtype)
                layer = losses.index(min(losses))
                print(f"loss without block 0, 1, …: {', '.join(f'{loss:.3f}' for loss in losses)}; dropping {layer}")
            drop_block(model, layer)
        before = trial.measure(model, tokenizer)
        trial.fit(model, tokenizer, seed, max_steps=max(1, trial.steps // 2), learning_rate=trial.repair_rate)
        if choose:
            trial.keep(model, tokenizer)
        return {f"{name}, cut": value for name, value in before.items()} | trial.measure(model, tokenizer)

    compare(trial, {"all blocks": all_blocks, "without the last": lambda seed: cut(seed, False),
                    "without the least": lambda seed: cut(seed, True)})


if __name__ == "__main__":
    run(Settings, main, __doc__)
