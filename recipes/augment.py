"""Easy data augmentation: labelled texts once more, with a few words swapped, moved or left out.

A topic or a mood mostly survives small damage, so a damaged copy keeps its label and tells the classifier not to
lean on single words. Three of the paper's four operations need no dictionary: random deletion, random swap, and
random insertion, here of a word of the same text (the paper inserts synonyms). Each copy gets one of them, on a
share of its words. Both arms take the same number of steps.

    python recipes/augment.py

Source: Wei & Zou 2019 (EDA: easy data augmentation techniques for text classification).
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trial import Result, Trial, compare, run

from nanochat import InputError
from nanochat.classifier import Labelled


@dataclass
class Settings(Trial):
    """Flags of this recipe, after those of every trial."""

    data: str = "bbc"
    task: Literal["classify"] = "classify"
    block_size: int = 64
    steps: int = 120
    copies: int = 4
    """damaged copies of each text, beside itself"""
    share: float = 0.1
    """of the words of a copy that are damaged, one at least"""
    out: Path | None = None
    """keep the model of the first seed here"""

    def __post_init__(self):
        if self.copies < 1 or not 0 < self.share < 1:
            raise InputError(f"--copies is {self.copies}, must be at least 1; --share is {self.share}, must be between 0 and 1")
        super().__post_init__()


def delete(words: list[str], random: random.Random) -> list[str]:
    """Without one of the words, if there are several."""
    place = random.randrange(len(words))
    return words[:place] + words[place + 1 :] if len(words) > 1 else words


def swap(words: list[str], random: random.Random) -> list[str]:
    """With two of them in each other's place."""
    a, b = random.randrange(len(words)), random.randrange(len(words))
    words = list(words)
    words[a], words[b] = words[b], words[a]
    return words


def insert(words: list[str], random: random.Random) -> list[str]:
    """With one of them a second time, anywhere."""
    place = random.randrange(len(words) + 1)
    return [*words[:place], random.choice(words), *words[place:]]


def augment(examples: list[Labelled], copies: int, share: float, seed: int) -> list[Labelled]:
    """The texts, then their damaged copies, each with its text's label."""
    draw, found = random.Random(seed), list(examples)
    for text, label in examples:
        for _ in range(copies):
            words, operation = text.split(), draw.choice((delete, swap, insert))
            for _ in range(max(1, round(share * len(words)))):
                words = operation(words, draw)
            found.append((" ".join(words), label))
    return found


def main(trial: Settings) -> None:
    """Fine-tune on the texts, and on the texts with their copies."""

    def augmented(seed: int) -> Result:
        model, tokenizer = trial.start(seed)
        texts = augment(trial.parts[0], trial.copies, trial.share, seed)
        seconds = trial.fit(model, tokenizer, trial.rows(texts, model, tokenizer), seed)
        trial.keep(model, tokenizer)
        return trial.measure(model, tokenizer) | {"seconds": seconds}

    compare(trial, {"plain": trial.plain, "augmented": augmented})


if __name__ == "__main__":
    run(Settings, main, __doc__)
