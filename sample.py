"""Complete a prompt, or chat in the terminal, from any checkpoint.

    python sample.py                                          chat with out/finetuned
    python sample.py --prompt "Hello, how are you?"           one question to it
    python sample.py --checkpoint gpt2 --prompt "Once upon"   a base model continues the text
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

import tyro

from nanochat import InputError, checkpoint, generate, runtime
from nanochat.dialogue import Conversation
from nanochat.generate import Chat, SampleConfig
from nanochat.model import GPT
from nanochat.runtime import DTYPES, argument_text
from nanochat.tokenizer import Tokenizer


@dataclass
class Settings:
    """Without --prompt: a chat, if the checkpoint was fine-tuned on dialogue."""

    checkpoint: str = "out/finetuned"
    """run folder, Hugging Face GPT-2 folder, gpt2 … gpt2-xl, or nanoGPT's ckpt.pt"""
    prompt: str | None = None
    """what to answer (fine-tuned model) or to continue (base model)"""
    raw: bool = False
    """continue --prompt as plain text even with a fine-tuned model"""
    system: str = ""
    """system text at the start of a chat with a fine-tuned model"""
    num_samples: int = 1
    """independent answers to --prompt"""
    device: str = "auto"
    """cuda, cpu, cuda:1, …"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights"""
    sampling: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    settings.system = argument_text(settings.system)
    settings.prompt = None if settings.prompt is None else argument_text(settings.prompt)
    settings.sampling.stop = tuple(map(argument_text, settings.sampling.stop))
    if settings.num_samples < 1:
        raise InputError(f"--num-samples is {settings.num_samples}, must be at least 1")
    device = runtime.pick_device(settings.device)
    model, tokenizer = checkpoint.load(settings.checkpoint)
    model.to(device, DTYPES[settings.dtype])
    chats = tokenizer.chat_template is not None and not settings.raw
    if settings.prompt is None and not chats:
        raise InputError("--prompt is missing: only a model fine-tuned on dialogue chats, and not with --raw")
    if settings.prompt is None:
        return talk(Chat(model, tokenizer, settings.sampling, settings.system))
    if chats:
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        answer([*system, {"role": "user", "content": settings.prompt}], model, tokenizer, settings)
    else:
        complete(settings.prompt, model, tokenizer, settings)


def talk(chat: Chat) -> None:
    """Read lines from the terminal, or a pipe, and answer each until the end of the input."""
    if sys.stdin.isatty():
        print("Chat with the model; an empty line or Ctrl-D ends it.")
    while True:
        try:
            text = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return print()
        if not text.strip():
            return
        try:
            show(chat.ask(text.strip()))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if chat.dropped:
            print(f"(the oldest {chat.dropped} messages no longer fit and were left out)", file=sys.stderr)


def answer(messages: Conversation, model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    """Print --num-samples replies to one user turn."""
    limit = settings.sampling.max_new_tokens
    prompt, _ = generate.fit(messages, tokenizer, model.config.block_size, limit)
    print_continuations("", prompt, model, tokenizer, settings)


def complete(text: str, model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    """Print the text and --num-samples continuations of it."""
    prompt = tokenizer.encode(text) or [tokenizer.end_of_text]
    if len(prompt) > model.config.block_size:
        kept = model.config.block_size // 2
        print(f"--prompt has {len(prompt):,} tokens; only its last {kept:,} are read", file=sys.stderr)
    print_continuations(text, prompt, model, tokenizer, settings)


def print_continuations(before: str, prompt: list[int], model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    if settings.num_samples == 1:
        print(before, end="", flush=True)
        return show(generate.stream(model, tokenizer, prompt, settings.sampling))
    prompts = [prompt] * settings.num_samples
    for number, text in enumerate(generate.texts(model, tokenizer, prompts, settings.sampling), start=1):
        print(f"--- {number}\n{before}{text}")


def show(pieces) -> None:
    """Print pieces of text as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    runtime.run_as_script(main)
