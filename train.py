"""Pre-train a GPT on plain text: settings → token shards → model → train().

    python train.py                                   a small model on the Wikipedia sample, in minutes
    python train.py --data my_texts/ --max-minutes 60
    python train.py --preset gpt2 --data enwiki.xml.bz2         GPT-2 124M; with several GPUs through torchrun
    python train.py --init gpt2 --data corpus.txt     go on from GPT-2's weights
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import tyro

from data import find
from nanochat import InputError, checkpoint, corpus, evaluate, generate, processes, runtime, training
from nanochat.classifier import GPTClassifier
from nanochat.generate import SampleConfig
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training import TrainConfig

EVALUATION_TOKENS = 250_000  # of held-out text, the same ones each time, while training
FINAL_TOKENS = 10_000_000  # at the end, or all of it if there is less: of a whole Wikipedia it would take an hour


@dataclass
class Settings:
    """Settings of a pre-training run; the defaults take minutes on a 2-core laptop."""

    preset: Literal["laptop", "gpu-hour", "gpt2"] = "laptop"
    """minutes on a laptop, an hour on one GPU, or GPT-2's 124 million: settings that you do not give are the preset's; laptop's are shown below"""
    data: str = "wikipedia"
    """Wikipedia dump (.xml, .bz2, URL), text file or folder, .jsonl with "text", Hugging Face data set id, or a name in data/"""
    val_data: str | None = None
    """held-out text, if not a tenth of --data"""
    init: str | None = None
    """start from these weights and their tokenizer (gpt2, a Hugging Face folder, a run folder) instead of random ones"""
    out: Path = Path("out/pretrained")
    """run folder: checkpoints, metrics.jsonl, loss.png"""
    resume: bool = False
    """go on from the newest checkpoint in --out, with its settings, as if the run had never stopped"""
    overwrite: bool = False
    """delete what is in --out first"""
    vocab_size: int = corpus.VOCAB_SIZE
    """from scratch: ids of the tokenizer trained on the text, chat tokens included; rounded down to a multiple of 64"""
    block_size: int = 256
    """length of a training crop in tokens, at most the model's; from scratch also the model's"""
    n_layer: int = 4
    """from scratch: blocks"""
    n_head: int = 4
    """from scratch: attention heads; 64 channels each is usual"""
    n_embd: int = 256
    """from scratch: channels, a multiple of --n-head"""
    dropout: float | None = None
    """of embeddings and residual branches; None: 0 from scratch, else as in the file"""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(batch_size=8, optimizer="muon", learning_rate=4e-3, warmup_steps=20)
    )


# The runs that chose laptop's numbers stand in benchmarks/README.md. The other two have not been run. gpu-hour:
# the size that Hoffmann et al. 2022 advise for an hour at 110 TFLOP/s (about 20 tokens a parameter), 61 million.
# gpt2: batch, rate and length of the published reproductions of GPT-2.
PRESETS = {
    "laptop": Settings(),
    "gpu-hour": Settings(
        preset="gpu-hour", vocab_size=32768, block_size=1024, n_layer=8, n_head=10, n_embd=640,
        training=TrainConfig(batch_size=16, accumulate=8, optimizer="muon", learning_rate=2e-3, beta2=0.95, warmup_steps=200, max_minutes=60)),
    "gpt2": Settings(
        preset="gpt2", vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768,
        training=TrainConfig(batch_size=32, accumulate=16, learning_rate=6e-4, beta2=0.95, warmup_steps=700, max_steps=19_073)),
}


def main() -> None:
    """Assemble a run, train, and score the best checkpoint on held-out text."""
    parse = partial(tyro.cli, Settings, description=__doc__)
    parse = partial(parse, default=PRESETS[parse().preset])  # read once for the preset, then with its numbers as defaults
    settings, saved, state, device, dtype = training.set_up(parse(), parse, minutes=2.5)
    config = settings.training

    preset = PRESETS[settings.preset]
    sizes = [name for name in ("vocab_size", "n_layer", "n_head", "n_embd") if getattr(settings, name) != getattr(preset, name)]
    if settings.init is not None and sizes:
        raise InputError(f"--{sizes[0].replace('_', '-')} is for a model from scratch; --init {settings.init} has its own")
    if settings.block_size < 8:
        raise InputError(f"--block-size is {settings.block_size}, must be at least 8")

    # model and tokenizer: of a checkpoint, or new ones for the text
    source, val_source = processes.from_rank_0(
        lambda: [find(name) if name is not None else None for name in (settings.data, settings.val_data)])
    shape = {name: getattr(settings, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    GPTConfig(**shape, dropout=settings.dropout or 0)  # refuses what cannot be, before hours of preparing a corpus
    start = saved or settings.init
    block_size = settings.block_size
    if start is not None:
        model, tokenizer = checkpoint.load(start)
        if isinstance(model, GPTClassifier):
            raise InputError(f"--init {settings.init} is a classifier: its head gives labels, not text")
        if saved is None and block_size > model.config.block_size and block_size != preset.block_size:
            raise InputError(f"--block-size is {block_size}, must be at most {model.config.block_size}, that of --init {settings.init}")
        block_size = min(block_size, model.config.block_size)
    given = {"tokenizer": tokenizer} if settings.init is not None else {"vocab_size": settings.vocab_size}
    folder = corpus.folder_for(source, val_source, settings.out.parent / "corpus", **given)
    folder = processes.from_rank_0(lambda: corpus.prepare(source, folder, val_source=val_source, **given))
    if start is None:
        tokenizer = Tokenizer.load(folder)
        if "vocab_size" in sizes and Path(settings.data) == folder and tokenizer.vocab_size != settings.vocab_size // 64 * 64:
            print(f"{folder} has a tokenizer of its own, of {tokenizer.vocab_size:,} ids: --vocab-size is of no use", file=sys.stderr)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    if settings.dropout is not None:
        model.config.dropout = settings.dropout  # one object, which all modules read
    train_split, val_split = (
        corpus.TokenStream(folder, split, tokenizer, block_size) for split in ("train", "val")
    )

    def score(model: GPT, tokens: int, dtype: torch.dtype) -> dict[str, float]:
        """How well a model predicts the first `tokens` held-out tokens."""
        count = math.ceil(min(val_split.tokens - 1, tokens) / (config.batch_size * block_size))
        return evaluate.score(model, tokenizer, islice(val_split.batches(config.batch_size), count), dtype, count)

    def evaluation() -> dict[str, float]:
        """What training looks at in between."""
        return {f"val_{key}": value for key, value in score(model, EVALUATION_TOKENS, dtype).items()}

    def sample() -> dict[str, str]:
        """What the model as it is now makes of a beginning."""
        beginning = "The city of"
        return {beginning: "".join(generate.stream(model, tokenizer, tokenizer.encode(beginning), SampleConfig(max_new_tokens=40)))}

    training.train(model, tokenizer, train_split, config, out=settings.out, settings=asdict(settings),
                   device=device, dtype=dtype, evaluate=evaluation, sample=sample, held_out=val_split.fingerprint, resume=state)

    best, _ = checkpoint.load(settings.out)
    scores = score(best.to(device), FINAL_TOKENS, torch.float32)
    share = "whole" if val_split.tokens <= FINAL_TOKENS else f"its first {FINAL_TOKENS:,} tokens"
    print(f"held-out text, {share}, fp32, best checkpoint: {scores['bits_per_byte']:.4f} bits per byte, "
          f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.1f}")
    print(f"wrote {settings.out}; next: python finetune.py --init {settings.out}")


if __name__ == "__main__":
    runtime.run_as_script(main)
