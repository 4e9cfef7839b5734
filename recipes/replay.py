"""Replay: rows of the pre-training text among the rows of dialogue, so that a model forgets less of what it knew.

A fine-tune on dialogues moves all weights towards dialogue, and the model gets worse at everything else. A share of
old rows in every epoch holds it: each is an ordinary row in which every token is a target. They come on top: the run
takes as many more steps as they fill, so that the dialogues are seen as often as without them.

    python recipes/replay.py

Measured on 2026-11-22, one core of an AMD EPYC, torch 2.13.0 CPU, three seeds: held-out Wikipedia 2.134 bits per byte
before, 2.390 ± 0.009 after a plain fine-tune, 2.312 ± 0.009 with replay; perplexity of dialogue 110.0 ± 0.3 and 110.2 ± 0.3.

Sources: Robins 1995 (rehearsal against catastrophic forgetting); Ouyang et al. 2022 (pre-training mix, PPO-ptx).
"""

import random
from dataclasses import dataclass
from pathlib import Path

from trial import Result, Trial, compare, run

from nanochat import InputError, evaluate
from nanochat.model import GPT
from nanochat.rows import Rows
from nanochat.sources import documents
from nanochat.tokenizer import Tokenizer


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    share: float = 0.25
    """of the rows that are old text"""
    corpus: Path = Path("out/corpus")
    """the text that --init was pre-trained on: the folder that train.py prepared, with train.jsonl and val.jsonl, or its parent"""
    text_rows: int = 100
    """rows of held-out text that are scored"""
    out: Path | None = None
    """keep the model of the first seed here"""

    def __post_init__(self):
        if not 0 < self.share < 1 or self.text_rows < 1:
            raise InputError(f"--share is {self.share}, must be between 0 and 1; --text-rows is {self.text_rows}, must be at least 1")
        folders = [path.parent for path in (*self.corpus.glob("train.jsonl"), *self.corpus.glob("*/train.jsonl"))]
        if len(folders) != 1:
            raise InputError(f"--corpus {self.corpus}: {len(folders)} folders there hold a prepared text, name the one of --init")
        self.corpus = folders[0]
        super().__post_init__()


def mixed(rows: Rows, old: Rows, share: float, seed: int) -> Rows:
    """All of `rows`, and so many of `old`, drawn at random, that these are `share` of the whole."""
    count = round(len(rows) * share / (1 - share))
    if count > len(old):
        raise InputError(f"--share {share} of old text needs {count:,} rows, the corpus has {len(old):,}")
    return Rows(rows.rows + random.Random(seed).sample(old.rows, count), rows.block_size)


def main(trial: Settings) -> None:
    """Fine-tune without and with replay, and score both on dialogue and on held-out text."""

    def text(split: str, tokenizer: Tokenizer) -> Rows:
        """All rows of a split of the corpus."""
        texts = (text for _, text in documents(trial.corpus / f"{split}.jsonl"))
        return evaluate.text_rows(texts, tokenizer, trial.block_size)

    def measure(model: GPT, tokenizer: Tokenizer) -> Result:
        """The scores of dialogue, and those of about --text-rows rows of held-out text."""
        old = text("val", tokenizer)
        old.rows = old.rows[:: -(-len(old) // trial.text_rows)]  # spread over all of it
        return trial.measure(model, tokenizer) | {"bits per byte of text": evaluate.score(model, tokenizer, old.batches(32))["bits_per_byte"]}

    def fine_tuned(seed: int) -> Result:
        """Without replay."""
        model, tokenizer = trial.start(seed)
        trial.fit(model, tokenizer, seed)
        return measure(model, tokenizer)

    def replayed(seed: int) -> Result:
        """With --share old rows, and as many more steps as they fill."""
        model, tokenizer = trial.start(seed)
        rows = mixed(trial.rows(trial.parts[0], model, tokenizer), text("train", tokenizer), trial.share, seed)
        trial.fit(model, tokenizer, seed, rows, max_steps=round(trial.steps / (1 - trial.share)))
        trial.keep(model, tokenizer)
        return measure(model, tokenizer)

    compare(trial, {"before": lambda seed: measure(*trial.start(seed)), "plain": fine_tuned, "replay": replayed})


if __name__ == "__main__":
    run(Settings, main, __doc__)
