"""Fine-tune a GPT on dialogue: settings → conversations → rows with a loss mask → train().

    python finetune.py                                          the pre-trained model, on the chitchat sample
    python finetune.py --init gpt2 --data my_dialogues.jsonl    GPT-2, on your own conversations
"""

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from data import find
from nanochat import InputError, checkpoint, dialogue, evaluate, generate, processes, runtime, training
from nanochat.dialogue import DialogueRows
from nanochat.generate import SampleConfig
from nanochat.training import TrainConfig


@dataclass
class Settings:
    """Settings of a fine-tuning run; the defaults take minutes on a 2-core laptop."""

    data: str = "chitchat"
    """conversations: .jsonl or .json ("messages" or ShareGPT "conversations"), .txt (blank lines between), or a name in data/"""
    val_data: str | None = None
    """held-out conversations, if not a tenth of --data; used for validation and test"""
    init: str = "out/pretrained"
    """weights to start from: a run folder, a Hugging Face GPT-2 folder, gpt2 … gpt2-xl, nanoGPT's ckpt.pt"""
    out: Path = Path("out/finetuned")
    """run folder: checkpoints, metrics.jsonl, loss.png"""
    resume: bool = False
    """go on from the newest checkpoint in --out, with its settings, as if the run had never stopped"""
    overwrite: bool = False
    """delete what is in --out first"""
    block_size: int | None = None
    """longest row, in tokens; None: the model's"""
    dropout: float | None = None
    """of embeddings and residual branches; None: as in the model's file"""
    show_batch: bool = False
    """print the first rows with what is learned marked, and stop"""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(batch_size=4, optimizer="muon", learning_rate=2e-3, warmup_steps=20)
    )


def main() -> None:
    """Assemble a run, train, and try the best checkpoint on the test conversations."""
    parse = partial(tyro.cli, Settings, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    settings = parse()
    settings, step, resume, device, dtype = training.set_up(settings, parse, minutes=5)
    config = settings.training

    conversations, problems = dialogue.read(processes.from_rank_0(lambda: find(settings.data)))
    if settings.val_data is not None:
        held_out, more_problems = dialogue.read(processes.from_rank_0(lambda: find(settings.val_data)))
        problems += more_problems
        train_split, val_split, test_split = conversations, held_out, held_out
    else:
        train_split, val_split, test_split = dialogue.split(conversations)
    for problem in problems[:5]:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"left out {len(problems)} records in all", file=sys.stderr)
    check_sizes(train_split, val_split, test_split)

    model, tokenizer = checkpoint.load(step or settings.init)
    tokenizer = tokenizer.for_chat()
    if tokenizer.vocab_size > model.config.vocab_size:  # GPT-2's table has no rows for the chat tokens
        model.grow(tokenizer.vocab_size)
    if settings.dropout is not None:
        model.config.dropout = replace(model.config, dropout=settings.dropout).dropout
    block_size = model.config.block_size if settings.block_size is None else min(settings.block_size, model.config.block_size)
    if block_size < 16:
        raise InputError(f"--block-size is {block_size}, must be at least 16")
    train_rows, val_rows, test_rows = (
        DialogueRows.build(split, tokenizer, block_size) for split in (train_split, val_split, test_split)
    )
    share = train_rows.supervised_tokens / train_rows.input_tokens
    print(f"{train_rows.supervised_tokens:,} of {train_rows.input_tokens:,} training tokens are learned from "
          f"({share:.0%}); {train_rows.cuts}", file=sys.stderr)
    if not train_rows.supervised_tokens:
        raise InputError(f"--data {settings.data}: no token to learn from in blocks of {block_size}")
    if settings.show_batch:
        marks = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
        for index in training.example_order(0, min(config.batch_size, len(train_rows)), len(train_rows), config.seed):
            print(train_rows.show(index, tokenizer, marks))
        return

    def score(rows: DialogueRows, dtype=dtype) -> dict[str, float]:
        """Of all rows of a split."""
        total = math.ceil(len(rows) / config.batch_size)
        return evaluate.score(model, tokenizer, rows.batches(config.batch_size), dtype, total)

    def evaluation() -> dict[str, float]:
        """What training looks at in between."""
        return {f"val_{key}": value for key, value in score(val_rows).items()}

    def sample() -> str:
        """A reply of the model as it is now."""
        prompt = [{"role": "user", "content": "Hello, how are you?"}]
        ids = dialogue.render_prompt(prompt, tokenizer)
        reply = generate.texts(model, tokenizer, [ids], SampleConfig(max_new_tokens=40, temperature=0))[0]
        return f"Hello, how are you? → {reply}"

    model.to(device)
    if not resume:
        print(f"test perplexity before: {score(test_rows, torch.float32)['perplexity']:.2f}")
    training.train(model, tokenizer, train_rows, config, out=settings.out, settings=asdict(settings),
                   device=device, dtype=dtype, evaluate=evaluation, sample=sample, held_out=val_rows.fingerprint, resume=resume)

    model = checkpoint.load(settings.out)[0].to(device)  # the best
    after = score(test_rows, torch.float32)
    if processes.rank():  # the replies are few
        return
    replies = evaluate.greedy_replies(model, tokenizer, test_split)
    for prompt, reply in list(zip(replies.prompts, replies.replies))[:5]:
        print(f"  {prompt!r} → {reply!r}")
    print(replies)
    same = " (on --val-data, which also chose the best step)" if settings.val_data else ""
    print(f"test perplexity after: {after['perplexity']:.2f}{same}")
    print(f"wrote {settings.out}; next: python sample.py --checkpoint {settings.out}")


def check_sizes(train_split: list, val_split: list, test_split: list) -> None:
    """Say how many conversations there are of each kind; stop if there are none of one."""
    sizes = f"{len(train_split)} training, {len(val_split)} validation, {len(test_split)} test conversations"
    if not (train_split and val_split and test_split):
        raise InputError(f"{sizes}: too few to hold some out; add some, or name held-out ones with --val-data")
    print(sizes, file=sys.stderr)


if __name__ == "__main__":
    runtime.run_as_script(main)
