"""Complete a prompt, or chat in the terminal, from any checkpoint.

    python sample.py                                          chat with out/finetuned
    python sample.py --prompt "Hello, how are you?"           one question to it
    python sample.py --checkpoint gpt2 --prompt "Once upon"   a base model continues the text
    python sample.py --checkpoint out/reviews --prompt "…"    a classifier gives the labels of the text
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import tyro

from nanochat import InputError, checkpoint, classifier, generate, packed, runtime, terminal
from nanochat.classifier import GPTClassifier
from nanochat.dialogue import opening
from nanochat.generate import Chat, SampleConfig
from nanochat.model import GPT
from nanochat.runtime import DTYPES, argument_text
from nanochat.tokenizer import Tokenizer

SAMPLES_AT_ONCE = 16  # of --num-samples: bounds the memory of the cache


@dataclass
class Settings:
    """Without --prompt: a chat, if the checkpoint was fine-tuned on dialogue."""

    checkpoint: str = "out/finetuned"
    """run folder, Hugging Face GPT-2 folder, gpt2 … gpt2-xl, or nanoGPT's ckpt.pt"""
    prompt: str | None = None
    """what to answer (fine-tuned model) or to continue (base model)"""
    raw: bool = False
    """continue --prompt as plain text even with a fine-tuned model"""
    system: str | None = None
    """system text at the start of a chat with a fine-tuned model; None: the checkpoint's own; "": none"""
    num_samples: int = 1
    """independent answers to --prompt"""
    device: str = "auto"
    """cuda, cpu, cuda:1, …"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights"""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights of a quarter of the size, faster, a little less exact"""
    compile: bool = False
    """compile the steps of one token: up to half a minute before the first token, faster from then on (on a CPU, for one text at a time)"""
    sampling: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)


def main() -> None:
    """Load a checkpoint; chat, answer or complete, as the settings and the checkpoint say."""
    # UseAppendAction: of `--stop a --stop b`, neither is lost
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
    settings = tyro.cli(Settings, description=__doc__, config=config)
    settings.system = None if settings.system is None else argument_text(settings.system)
    settings.prompt = None if settings.prompt is None else argument_text(settings.prompt)
    settings.sampling.stop = tuple(map(argument_text, settings.sampling.stop))
    if settings.num_samples < 1:
        raise InputError(f"--num-samples is {settings.num_samples}, must be at least 1")
    device = runtime.pick_device(settings.device)
    model, tokenizer = checkpoint.load(settings.checkpoint)
    classifies = isinstance(model, GPTClassifier)
    given, usual = (asdict(s) | asdict(s.sampling) for s in (settings, Settings()))
    of_text = [name for name in ("raw", "system", "num_samples", "compile", *asdict(SampleConfig())) if given[name] != usual[name]]
    if classifies and of_text:
        raise InputError(f"{settings.checkpoint} gives labels, not text: --{of_text[0].replace('_', '-')} is of no use to it")
    chats = tokenizer.chat_template is not None and not settings.raw
    if settings.prompt is None and not chats and not classifies:
        raise InputError("--prompt is missing: only a model fine-tuned on dialogue chats, and not with --raw")
    if settings.prompt is None and sys.stdin is None:  # closed, as by `<&-`
        raise InputError("--prompt is missing, and there is no standard input to chat through")
    if settings.prompt is None and settings.num_samples > 1:
        raise InputError(f"--num-samples is {settings.num_samples}, but --prompt is missing")
    if settings.system and not chats:
        raise InputError("--system is of use only to a model fine-tuned on dialogue, and not with --raw")
    if settings.system is None:
        settings.system = tokenizer.system if chats else ""
    packed.ready(model, device, DTYPES[settings.dtype], settings.quantize, settings.compile)
    if isinstance(model, GPTClassifier):
        return classify(model, tokenizer, settings.prompt)
    if settings.prompt is None:
        return terminal.Talk(Chat(model, tokenizer, settings.sampling, settings.system)).run()
    if chats:
        messages = [*opening(settings.system), {"role": "user", "content": settings.prompt}]
        prompt, _ = generate.fit(messages, tokenizer, model.config.block_size, settings.sampling.max_new_tokens)
        print_continuations("", prompt, model, tokenizer, settings)
    else:
        complete(settings.prompt, model, tokenizer, settings)


def classify(model: GPTClassifier, tokenizer: Tokenizer, text: str | None) -> None:
    """Print the labels of a text, likeliest first; without one, the likeliest label of each line of standard input."""
    for line in terminal.said("Type a text for its labels; Ctrl-D ends.") if text is None else [text]:
        rows = classifier.to_rows([(line, model.labels[0])], model.labels, tokenizer, model.config.block_size)
        found = sorted(zip(classifier.probabilities(model, rows, 1)[0].tolist(), model.labels), reverse=True)
        print("  ".join(f"{label} {probability:.1%}" for probability, label in found[:5]), flush=True)


def complete(text: str, model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    """Print the text and --num-samples continuations of it."""
    prompt = tokenizer.encode(text) or [tokenizer.end_of_text]
    if len(prompt) > model.config.block_size:
        kept = len(generate.newest(prompt, model.config.block_size))
        print(f"--prompt has {len(prompt):,} tokens; only its last {kept:,} are read", file=sys.stderr)
    print_continuations(text, prompt, model, tokenizer, settings)


def print_continuations(before: str, prompt: list[int], model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    if settings.num_samples == 1:
        print(terminal.safe(before), end="", flush=True)
        return terminal.show(generate.stream(model, tokenizer, prompt, settings.sampling))
    for start in range(0, settings.num_samples, SAMPLES_AT_ONCE):
        prompts = [prompt] * min(SAMPLES_AT_ONCE, settings.num_samples - start)
        config = replace(settings.sampling, seed=settings.sampling.seed + start)
        for number, text in enumerate(generate.texts(model, tokenizer, prompts, config), start=start + 1):
            print(terminal.safe(f"--- {number}\n{before}{text}"), flush=True)


if __name__ == "__main__":
    runtime.run_as_script(main)
