"""Fine-tune a GPT, on conversations or on labelled texts: settings → examples → rows with a loss mask → train().

    python finetune.py                                            the pre-trained model, on the chitchat sample
    python finetune.py --init gpt2 --data my_dialogues.jsonl      GPT-2, on your own conversations
    python finetune.py --data my_dialogues.jsonl --show-batch     look at what will be learned, and stop
    python finetune.py --data my_dialogues.jsonl --method lora    learn a few percent of the weights
    python finetune.py --data my_reviews.tsv --task classify      learn to give a label to a text
"""

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from data import find
from nanochat import InputError, checkpoint, evaluate, lora, preview, processes, report, runs, runtime, splits, training
from nanochat.dialogue import shared_system, with_system
from nanochat.lora import LoRAConfig
from nanochat.model import GPT
from nanochat.records import print_left_out
from nanochat.resume import Progress
from nanochat.rows import Rows
from nanochat.tasks import TASKS, ChatTask, ClassifyTask
from nanochat.tokenizer import CHAT_TOKENS, Tokenizer
from nanochat.training import TrainConfig


@dataclass
class Settings:
    """Settings of a fine-tuning run; the defaults take minutes on a 2-core laptop."""

    data: str = "chitchat"
    """.jsonl, .json, .csv, .tsv or .txt; README.md lists the formats, which are told by their content; or a name in data/"""
    val_data: str | None = None
    """held-out examples, if not a tenth of --data; used for validation and test"""
    task: Literal["chat", "classify"] = "chat"
    """chat: learn the assistant's part of conversations; classify: learn the labels of texts"""
    method: Literal["full", "lora", "freeze"] = "full"
    """what learns: all weights; low-rank additions to them (--rank …); or only what --learn names"""
    learn: tuple[str, ...] = ("2",)
    """with --method freeze: so many last blocks, or parts of names (attn, ln_, h.0.); 0 is the new tokens' rows alone"""
    lora: tyro.conf.OmitArgPrefixes[LoRAConfig] = field(default_factory=LoRAConfig)
    balance: bool = False
    """classify: weigh the texts so that all labels count alike"""
    system: str = ""
    """chat: system text for the conversations that have none. The one that most begin with is saved, and chats begin with it"""
    init: str = "out/pretrained"
    """weights to start from: a run folder, a Hugging Face GPT-2 folder, gpt2 … gpt2-xl, nanoGPT's ckpt.pt"""
    out: Path = Path("out/finetuned")
    """run folder: checkpoints, metrics.jsonl, loss.png, report.md"""
    resume: bool = False
    """go on from the newest checkpoint in --out, with its settings, as if the run had never stopped"""
    overwrite: bool = False
    """delete what is in --out first"""
    block_size: int | None = None
    """longest row, in tokens; None: the model's"""
    dropout: float | None = None
    """of embeddings and residual branches; None: as in the model's file"""
    show_batch: bool = False
    """print what will be learned, how long the texts are, what is in two splits, and the first rows; and stop"""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(batch_size=4, optimizer="muon", learning_rate=2e-3, warmup_steps=20)
    )


def main() -> None:
    """Assemble a run, train, and compare the best checkpoint with the start on held-out examples."""
    parse = partial(tyro.cli, Settings, description=__doc__)
    settings = parse()
    settings, saved, state, device, dtype = training.set_up(settings, parse, minutes=5, writes=not settings.show_batch)
    config, task = settings.training, TASKS[settings.task]()
    check_flags(settings)
    parts = read_parts(settings, task)
    train_split, val_split, test_split = parts.values()

    if saved is None:
        model, tokenizer = start(settings, task, train_split)
    else:
        model, tokenizer = checkpoint.load(saved, merge=False)
        model = task.prepare(model, train_split, settings.balance)
    if settings.dropout is not None:
        model.config.dropout = replace(model.config, dropout=settings.dropout).dropout  # checked; one object, which all modules read
    choose_what_learns(model, tokenizer, settings)
    longest = model.config.block_size
    block_size = longest if settings.block_size is None else settings.block_size
    if block_size < 16 or (block_size > longest and saved is None):
        raise InputError(f"--block-size is {block_size}, must be at least 16 and at most the model's {longest}")
    block_size = min(block_size, longest)
    if settings.task == "chat":
        tokenizer.system = shared_system(train_split, tokenizer, block_size)
    train_rows, val_rows, test_rows = (task.rows(part, model, tokenizer, block_size) for part in parts.values())
    if not train_rows.supervised_tokens:
        raise InputError(f"--data {settings.data}: no token to learn from in blocks of {block_size}")
    if settings.show_batch:
        found = preview.about(parts, task.text, train_rows, task.describe(train_split, tokenizer))
        first = training.example_order(0, min(config.batch_size, len(train_rows)), len(train_rows), config.seed)
        marks = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
        print(preview.summary(found))
        print("\n".join(preview.show_row(train_rows.rows[i], tokenizer, model.labels, marks) for i in first))
        return
    share = train_rows.supervised_tokens / train_rows.input_tokens
    print(f"{train_rows.supervised_tokens:,} of {train_rows.input_tokens:,} training tokens are learned from "
          f"({share:.0%}); {train_rows.cuts}\nvalidation: {val_rows.cuts}; test: {test_rows.cuts}", file=sys.stderr)

    def evaluation() -> dict[str, float]:
        """What training looks at in between."""
        total = math.ceil(len(val_rows) / config.batch_size)
        scores = evaluate.score(model, tokenizer, val_rows.batches(config.batch_size), dtype, total)
        return {f"val_{key}": value for key, value in scores.items()}

    progress = training.train(
        model, tokenizer, train_rows, config, out=settings.out, settings=asdict(settings), device=device, dtype=dtype,
        evaluate=evaluation, sample=lambda: task.ask(model, tokenizer, val_split), held_out=val_rows.fingerprint, resume=state)
    conclude(settings, task, parts, model, tokenizer, train_rows, test_rows, progress, device)


def check_flags(settings: Settings) -> None:
    """InputError for flags of another --task or --method."""
    usual = Settings()
    if settings.system and settings.task != "chat":
        raise InputError(f"--system is for --task chat, not {settings.task}")
    if settings.balance and settings.task != "classify":
        raise InputError(f"--balance is for --task classify, not {settings.task}")
    own = {"lora": (asdict(settings.lora), asdict(usual.lora)), "freeze": ({"learn": settings.learn}, {"learn": usual.learn})}
    for method, (given, default) in own.items():
        if settings.method != method and (changed := [name for name in given if given[name] != default[name]]):
            raise InputError(f"--{changed[0].replace('_', '-')} is for --method {method}, not {settings.method}")


def read_parts(settings: Settings, task: ChatTask | ClassifyTask) -> dict[str, list]:
    """Training, validation and test examples; InputError if one of the three would be empty."""
    examples, problems = task.read(processes.from_rank_0(lambda: find(settings.data)))
    if settings.val_data is None:
        train, val, test = splits.split(examples)
    else:
        held_out, more_problems = task.read(processes.from_rank_0(partial(find, settings.val_data)))
        train, val, test, problems = examples, held_out, held_out, problems + more_problems
    print_left_out(problems)
    parts = {"training": train, "validation": val, "test": test}
    if settings.system:
        parts = {name: with_system(part, runtime.argument_text(settings.system)) for name, part in parts.items()}
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items()) + f" {task.examples}"
    if not all(parts.values()):
        different = len(set(map(splits.text_of, examples)))
        raise InputError(f"{sizes} ({different:,} different in all): too few to hold some out; add some, or name held-out ones with --val-data")
    print(sizes, file=sys.stderr)
    return parts


def start(settings: Settings, task: ChatTask | ClassifyTask, train_split: list) -> tuple[GPT, Tokenizer]:
    """The model that the run begins with, before it is said what of it learns, and its tokenizer with the chat tokens."""
    model, tokenizer = checkpoint.load(settings.init)
    tokenizer = tokenizer.for_chat()
    if tokenizer.vocab_size > model.config.vocab_size:  # GPT-2's table has no rows for the chat tokens
        model.grow(tokenizer.vocab_size)
    return task.prepare(model, train_split, settings.balance), tokenizer


def choose_what_learns(model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    """Freeze, or add LoRA to, a model as --method says, unless it comes from a checkpoint that has LoRA already; in place."""
    new_rows = tokenizer.vocab_size - min(tokenizer.control[name] for name in CHAT_TOKENS)  # they are the last ones
    if settings.method == "lora" and not lora.is_adapted(model):
        lora.add_lora(model, settings.lora, new_rows)
    elif settings.method == "freeze":
        lora.freeze(model, settings.learn, new_rows)


def conclude(settings: Settings, task: ChatTask | ClassifyTask, parts: dict[str, list], model: GPT, tokenizer: Tokenizer,
             train_rows: Rows, test_rows: Rows, progress: Progress, device: torch.device) -> None:
    """Compare the best checkpoint with the start, on held-out examples; write report.md and print its main figures."""
    run = {
        "method": settings.method,
        "parameters that learn": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
        "steps": progress.step,
        "seconds of training": round(progress.seconds, 1),
        "peak memory, MB": round(runtime.peak_memory(device) / 1e6),
    }

    def outcome(tried: Any) -> tuple[dict, dict[str, str]]:
        """What a model does on the test split, and with the prompts of the validation split."""
        tried.to(device)
        return (task.measure(tried, tokenizer, parts["test"], test_rows, settings.training.batch_size),
                {} if processes.rank() else task.ask(tried, tokenizer, parts["validation"]))

    before: dict | None = None
    replies_before: dict[str, str] = {}
    if settings.task == "chat":  # a new label head knows nothing
        try:
            before, replies_before = outcome(start(settings, task, parts["training"])[0])
        except InputError as error:  # a resumed run, where --init no longer is
            print(f"{error}; so {settings.out / 'report.md'} cannot say how good the start was", file=sys.stderr)
    after, replies = outcome(checkpoint.load(settings.out)[0])
    if processes.rank():
        return
    best = checkpoint.locate(settings.out)
    run |= {"the best step": runs.step_of(best), "the best checkpoint, MB": round(sum(file.stat().st_size for file in best.iterdir()) / 1e6, 1)}
    report.write(settings.out, {
        "settings": asdict(settings),
        "data": preview.about(parts, task.text, train_rows, task.describe(parts["training"], tokenizer)),
        "run": run, "before": before, "after": after,
        "asked": {prompt: (replies_before.get(prompt, "–"), reply) for prompt, reply in replies.items()},
    })
    print("\n".join(f"  {prompt!r} → {reply!r}" for prompt, reply in replies.items()))
    print(task.details(after))
    print(f"{run['parameters that learn']:,} of {run['parameters']:,} parameters learned in {run['seconds of training']:.0f} s, "
          f"{run['peak memory, MB']:,} MB of memory at most, {run['the best checkpoint, MB']:,} MB a checkpoint, without what --resume needs")
    same = " (on --val-data, which also chose the best step)" if settings.val_data else ""
    print(f"test {task.headline(before) + ' before, ' if before else ''}{task.headline(after)} after{same}")
    print(f"wrote {settings.out / 'report.md'}; next: python sample.py --checkpoint {settings.out}")


if __name__ == "__main__":
    runtime.run_as_script(main)
