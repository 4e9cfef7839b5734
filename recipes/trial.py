"""What the recipes share: flags, a few training examples, the plain fine-tune, and a table of arms.

A recipe changes one thing about a fine-tune. So each script trains both ways on the same few examples, for the
same number of steps, once for each seed (order of the examples, new heads, noise), and takes of every run the
weights of its best validation step. The table is about held-out examples that no run has seen: mean ± standard
deviation over the seeds, and the difference of the last two arms, which are compared seed by seed.
"""

import math
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
    """training examples; a tenth of --data, up to 100, chooses the best step, and up to 250 others are for the table"""
    turns: int = 4
    """chat: messages of each conversation that are kept, from its beginning"""
    block_size: int = 128
    """longest row, in tokens"""
    steps: int = 80
    """optimizer steps of each run, two epochs of the default data; the best of its four evaluations counts"""
    batch_size: int = 8
    """rows a step"""
    learning_rate: float = 2e-3
    """peak rate, of Muon for the matrices and AdamW for the rest"""
    seeds: int = 3
    """runs of each arm"""

    def __post_init__(self):
        least = {"examples": 1, "turns": 2, "block_size": 16, "steps": 1, "seeds": 1}
        if wrong := [f"--{name.replace('_', '-')} is {getattr(self, name)}, must be at least {low}"
                     for name, low in least.items() if getattr(self, name) < low]:
            raise InputError("; ".join(wrong))
        if (out := getattr(self, "out", None)) and out.exists():
            raise InputError(f"--out {out} exists already: name a new folder")
        self.device = runtime.pick_device()
        self.dtype = runtime.pick_dtype("auto", self.device)
        self.config(seed=0)  # which checks the rest
        self.learner = tasks.TASKS[self.task]()

    def config(self, seed: int) -> training.TrainConfig:
        """How every arm is trained."""
        return training.TrainConfig(batch_size=self.batch_size, max_steps=self.steps, learning_rate=self.learning_rate, optimizer="muon",
                                    warmup_steps=min(20, self.steps // 4), keep=1, seed=seed)

    @cached_property
    def parts(self) -> tuple[list, list, list]:
        """Training, validation and test examples."""
        examples = self.learner.read(find(self.data))[0]
        if self.task == "chat":
            cut = (conversation[: self.turns] for conversation in examples)
            examples = [messages for messages in cut if any(message["role"] == "assistant" for message in messages)]
        train, val, test = splits.split(examples, (0.5, 0.1, 0.4))
        if len(train) < self.examples or not val or not test:
            raise InputError(f"--data {self.data}: {len(examples):,} examples are too few for --examples {self.examples} and as many held out")
        return train[: self.examples], val[:100], test[:250]

    def start(self, seed: int) -> tuple[GPT, Tokenizer]:
        """The model that an arm begins with, and its tokenizer with the chat tokens."""
        torch.manual_seed(seed)  # of a new label head
        model, tokenizer = checkpoint.load(self.init)
        tokenizer = tokenizer.for_chat()
        if tokenizer.vocab_size > model.config.vocab_size:
            model.grow(tokenizer.vocab_size)
        return self.learner.prepare(model, self.parts[0], False).to(self.device), tokenizer

    def rows(self, examples: list, model: GPT, tokenizer: Tokenizer) -> Rows:
        """What is learned of the examples, or scored."""
        return self.learner.rows(examples, model, tokenizer, min(self.block_size, model.config.block_size))

    def fit(self, model: GPT, tokenizer: Tokenizer, rows: Rows, seed: int, val: Rows | None = None, **config) -> float:
        """Train in place by the core's own loop, end with the weights of the best validation step; → seconds of training.

        val: if the validation rows are not the ordinary ones; config: settings of TrainConfig that differ.
        """
        val, best = val or self.rows(self.parts[1], model, tokenizer), {"loss": math.inf}

        def evaluation() -> Result:
            scores = evaluate.score(model, tokenizer, val.batches(32), self.dtype)
            if scores["loss"] < best["loss"]:
                best.update(loss=scores["loss"], weights={name: w.detach().clone() for name, w in model.state_dict().items()})
            return {"val_loss": scores["loss"]}

        settings = replace(self.config(seed), **config)
        with tempfile.TemporaryDirectory() as out:
            progress = training.train(model, tokenizer, rows, settings, out=Path(out), settings={}, device=self.device,
                                      dtype=self.dtype, evaluate=evaluation, sample=dict)
        model.load_state_dict(best["weights"])
        return progress.seconds

    def measure(self, model: GPT, tokenizer: Tokenizer, rows: Rows | None = None) -> Result:
        """What the table says of a model, by default on the test examples, in fp32."""
        rows = rows or self.rows(self.parts[2], model, tokenizer)
        if self.task == "chat":
            return {"perplexity": evaluate.score(model, tokenizer, rows.batches(32))["perplexity"]}
        result = evaluate.measure_classifier(model, self.parts[2], rows, 32)
        return {"accuracy": result["accuracy"], "macro F1": result["macro_f1"]}

    def plain(self, seed: int, **config) -> Result:
        """The arm that others are compared with: an ordinary fine-tune of all weights."""
        model, tokenizer = self.start(seed)
        seconds = self.fit(model, tokenizer, self.rows(self.parts[0], model, tokenizer), seed, **config)
        return self.measure(model, tokenizer) | {"seconds": seconds}

    def keep(self, model: GPT, tokenizer: Tokenizer) -> None:
        """With --out, write the model there, once: sample.py chats with it, finetune.py goes on from it."""
        if (out := getattr(self, "out", None)) and not out.exists():
            settings = asdict(self)
            print(f"wrote {runs.save(out, self.steps, model, tokenizer, settings=settings, results={})}", file=sys.stderr)


def compare(trial: Trial, arms: dict[str, Callable[[int], Result]]) -> None:
    """Run every arm with every seed and print the table."""
    results: dict[str, list[Result]] = {name: [] for name in arms}
    for seed in range(trial.seeds):
        for name, arm in arms.items():
            print(f"\n——— {name}, seed {seed}", file=sys.stderr)
            results[name].append(arm(seed))
    print("\n".join(table(results)))


def table(results: dict[str, list[Result]]) -> list[str]:
    """Arm → a result for each seed, as lines: mean ± standard deviation, and the difference of the last two arms."""
    def shown(values: list[float], sign: str = "") -> str:
        return f"{mean(values):{sign}.4g} ± {stdev(values) if len(values) > 1 else 0:.2g}"
    names, lines = list(results), []
    lines.append(f"{'':<22}" + "".join(f"{name:>20}" for name in [*names, "difference"]))
    for metric in results[names[-1]][0]:
        columns = [[result[metric] for result in results[name]] for name in names]
        differences = [b - a for a, b in zip(*columns[-2:])]
        lines.append(f"{metric:<22}" + "".join(f"{shown(column):>20}" for column in columns) + f"{shown(differences, '+'):>20}")
    return lines


def run(settings: type[Trial], main: Callable[[Trial], None], about: str) -> None:
    """A recipe's script: parse its flags, run it; wrong input is one line and exit code 2."""
    runtime.run_as_script(lambda: main(tyro.cli(settings, description=about, config=(tyro.conf.FlagCreatePairsOff,))))
