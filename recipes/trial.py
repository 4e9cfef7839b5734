"""What the recipes share: flags, a few training examples, the plain fine-tune, and a table of arms.

A recipe changes one thing about a fine-tune: each script trains without and with it, on the same few examples, for the
same number of steps, once for each seed (order of the examples, new heads, noise); the best validation step counts. The
table is of held-out examples: mean ± standard deviation over the seeds, and the last two arms' difference, seed by seed.
"""

import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))  # for data/, which no package holds

from data import find  # noqa: E402
from nanochat import InputError, checkpoint, evaluate, runs, runtime, splits, tasks, training  # noqa: E402
from nanochat.model import GPT  # noqa: E402
from nanochat.rows import Rows  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402

Result = dict[str, float]
TURNS = 4  # messages of each conversation that are kept, from its beginning: whole ones take ten times as long


@dataclass
class Trial:
    """Settings of a trial; the defaults take minutes on one core."""

    init: str = "out/pretrained"
    """weights to start from, as finetune.py takes them; of a model that has not seen --data"""
    data: str = "chitchat"
    """conversations, or with --task classify labelled texts: a file, or a name in data/"""
    task: Literal["chat", "classify"] = "chat"
    """what is learned of them"""
    examples: int = 500
    """training examples; up to 100 others choose the best step, and up to 250 are for the table"""
    block_size: int = 128
    """longest row, in tokens"""
    steps: int = 80
    """optimizer steps of each run, two epochs of the default data; the best of its four evaluations counts"""
    learning_rate: float = 2e-3
    """peak rate, of Muon for the matrices and AdamW for the rest"""
    seeds: int = 3
    """runs of each arm"""

    def __post_init__(self):
        for name, least in {"examples": 1, "block_size": 16, "seeds": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be at least {least}")
        if (out := getattr(self, "out", None)) and out.exists():
            raise InputError(f"--out {out} exists already: name a new folder")
        checkpoint.locate(self.init)
        self.config = training.TrainConfig(batch_size=8, max_steps=self.steps, learning_rate=self.learning_rate, optimizer="muon",
                                           warmup_steps=min(20, self.steps // 4), keep=1)
        self.learner, self.device = tasks.TASKS[self.task](), runtime.pick_device()
        self.dtype = runtime.pick_dtype("auto", self.device)

    @cached_property
    def parts(self) -> tuple[list, list, list]:
        """Training, validation and test examples."""
        examples = self.learner.read(find(self.data))[0]
        if self.task == "chat":
            cut = (conversation[:TURNS] for conversation in examples)
            examples = [messages for messages in cut if any(message["role"] == "assistant" for message in messages)]
        random.Random(0).shuffle(examples)  # a file may be sorted by label
        train, val, test = splits.split(examples, (0.5, 0.1, 0.4))
        if len(train) < self.examples or not val or not test:
            raise InputError(f"--data {self.data}: {len(examples):,} examples are too few for --examples {self.examples} and as many held out")
        return train[: self.examples], val[:100], test[:250]

    def start(self, seed: int) -> tuple[GPT, Tokenizer]:
        """The model that an arm begins with, and its tokenizer with the chat tokens."""
        torch.manual_seed(seed)  # of what a recipe adds to it
        model, tokenizer = checkpoint.load(self.init)
        if (tokenizer := tokenizer.for_chat()).vocab_size > model.config.vocab_size:
            model.grow(tokenizer.vocab_size)
        return self.learner.prepare(model, self.parts[0] if self.task == "classify" else [], False).to(self.device), tokenizer

    def rows(self, examples: list, model: GPT, tokenizer: Tokenizer) -> Rows:
        """What is learned of the examples, or scored."""
        return self.learner.rows(examples, model, tokenizer, min(self.block_size, model.config.block_size))

    def fit(self, model: GPT, tokenizer: Tokenizer, seed: int, rows: Rows | None = None, **changes) -> None:
        """Train in place by the core's own loop, to the best validation step; rows: if not the ordinary ones; changes: as `arm`."""
        rows, val = rows or self.rows(self.parts[0], model, tokenizer), self.rows(self.parts[1], model, tokenizer)
        best = {"loss": math.inf, "weights": {}}

        def evaluation() -> Result:
            if (loss := evaluate.score(model, tokenizer, val.batches(32), self.dtype)["loss"]) < best["loss"]:
                best.update(loss=loss, weights={name: w.clone() for name, w in model.state_dict().items()})
            return {"val_loss": loss}

        with tempfile.TemporaryDirectory() as out:
            training.train(model, tokenizer, rows, replace(self.config, seed=seed, **changes), out=Path(out), settings={},
                           device=self.device, dtype=self.dtype, evaluate=evaluation, sample=dict)
        model.load_state_dict(best["weights"])

    def measure(self, model: GPT, tokenizer: Tokenizer, rows: Rows | None = None) -> Result:
        """What the table says of a model, in fp32; rows: if not those of the test examples."""
        rows = rows or self.rows(self.parts[2], model, tokenizer)
        if self.task == "chat":
            return {"perplexity": evaluate.score(model, tokenizer, rows.batches(32))["perplexity"]}
        result = evaluate.measure_classifier(model, self.parts[2], rows, 32)
        return {"accuracy": result["accuracy"], "macro F1": result["macro_f1"], "loss": result["loss"]}

    def arm(self, seed: int, **changes) -> Result:
        """The plain fine-tune, of all weights; changes: settings of TrainConfig that differ."""
        model, tokenizer = self.start(seed)
        self.fit(model, tokenizer, seed, **changes)
        return self.measure(model, tokenizer)

    def keep(self, model: GPT, tokenizer: Tokenizer, steps: int | None = None) -> None:
        """With --out, write the first model that comes there, as of so many steps: sample.py chats with it, finetune.py goes on from it."""
        if (out := getattr(self, "out", None)) and not out.exists():
            print(f"wrote {runs.save(out, self.steps if steps is None else steps, model, tokenizer, settings=asdict(self), results={})}", file=sys.stderr)


def compare(trial: Trial, arms: dict[str, Callable[[int], Result]]) -> None:
    """Run every arm with every seed, and print the table."""
    results: dict[str, list[Result]] = {name: [] for name in arms}
    for seed in range(trial.seeds):
        for name, arm in arms.items():
            print(f"——— {name}, seed {seed}", file=sys.stderr)
            results[name].append(arm(seed))
    print(" " * 22 + "".join(name.rjust(20) for name in [*results, "difference"]))
    for metric in [*results.values()][-1][0]:
        columns = [[result[metric] for result in found] for found in results.values()]
        columns.append([b - a for a, b in zip(*columns[-2:])])
        spread = [f" ± {stdev(column):.2g}" if len(column) > 1 else "" for column in columns]
        print(metric.ljust(22) + "".join(f"{mean(column):.4g}{sd}".rjust(20) for column, sd in zip(columns, spread)))


def run(settings: type[Trial], main: Callable[[Trial], None], about: str) -> None:
    """A recipe's script: parse its flags, run it; wrong input is one line and exit code 2."""
    runtime.run_as_script(lambda: main(tyro.cli(settings, description=about, config=(tyro.conf.FlagCreatePairsOff,))))
