"""Speculative decoding: a small model guesses a few tokens, the large one checks them all in a single pass.

The draft proposes k tokens, each drawn from its own distribution q; one pass of the target over them gives its p at all
k + 1 places. A token x is accepted with probability min(1, p(x) / q(x)); the first that is not is drawn again from
max(0, p − q), scaled to sum to 1; after k accepted ones the last p gives another for nothing. So the text has the very
distribution of the target alone; at temperature 0 it is the same text (where k + 1 tokens at once round otherwise than
one by one, nearly equal logits may swap). p and q are what temperature, top-k, top-p, min-p and repetition penalty leave.

    python recipes/speculative.py --target FOLDER --draft FOLDER --prompt TEXT [--draft-tokens 4] [--dtype bfloat16]

Measured on 2026-11-22, one of two cores of an AMD EPYC that others used too, torch 2.13.0 CPU: target 8 × 384 (17.4 million, 2.11
bits per byte of held-out Wikipedia), draft 1 × 128 (1.3 million, 2.15); three prompts at temperatures 0 and 0.8, 5 or 7 pairs each,
speed beside plain decoding as median (range). bf16: k = 2 1.15 (0.96–1.31), k = 4 1.00 (0.79–1.31); fp32: k = 2 0.99 (0.76–1.07),
k = 4 0.91 (0.77–1.09). Of the guesses 25–51 and 14–42 % were accepted: tiny models agree little, so at this size it hardly pays.
It pays where k + 1 tokens take as long as one. At GPT-2's size (random weights) 5 took 1.11 times as long in bf16, 1.98 in fp32
(33 ms for one), 2 × 256 as a draft 0.16: 2.3 tokens a pass, as here, would then be 1.3 times as fast in bf16, none in fp32.

Sources: Leviathan et al. 2023 (algorithm 1; the proof is its appendix A.1); Chen et al. 2023.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # where nanochat is not installed

from nanochat import InputError, checkpoint, runtime  # noqa: E402
from nanochat.classifier import GPTClassifier  # noqa: E402
from nanochat.generate import Reader, SampleConfig, fit, generate, newest, probabilities, stream_text  # noqa: E402
from nanochat.model import GPT  # noqa: E402


@torch.inference_mode()
def speculate(target: GPT, draft: GPT, prompt: list[int], config: SampleConfig, stop_ids: Iterable[int] = (),
              draft_tokens: int = 4, counts: Counter | None = None) -> Iterator[int]:
    """Continue a prompt as `generate(target, [prompt], …)` does, ids one by one, up to a stop id, with the draft's help; models in eval mode.

    counts: gets the tokens "proposed" and "accepted", and the "passes" of the target.
    """
    if draft.config.vocab_size != target.config.vocab_size:
        raise InputError(f"the draft has {draft.config.vocab_size:,} ids, the target {target.config.vocab_size:,}: they need one tokenizer")
    if not prompt:
        raise InputError("nothing to continue: a prompt needs at least one token")
    generator = torch.Generator(target.wpe.weight.device).manual_seed(config.seed % 2**63)
    reads, guesses, stop_ids, counts = Reader(target, 1), Reader(draft, 1), set(stop_ids), Counter() if counts is None else counts
    row, seen, left = list(prompt), list(prompt), config.max_new_tokens  # each model's own row: one block may be full before the other
    while left:
        row, seen = newest(row, target.config.block_size), newest(seen, draft.config.block_size)
        room = min(target.config.block_size - len(row), draft.config.block_size + 1 - len(seen))
        proposed, q = propose(guesses, seen, min(draft_tokens, room, left - 1), config, generator)
        new = verified(distributions(reads, row, proposed, config), q, proposed, generator)
        counts.update(proposed=len(proposed), accepted=len(new) - 1, passes=1)
        for token in new:
            if token in stop_ids:
                return
            yield token
        row, seen, left = row + new, seen + new, left - len(new)


def propose(reader: Reader, text: list[int], count: int, config: SampleConfig, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """`count` tokens that the draft would go on with, and the distributions q (count, V) that they were drawn from."""
    proposed, q = [], []
    for _ in range(count):
        seen = text + proposed
        q.append(probabilities(reader.logits([seen]), config, [seen]))
        proposed.append(int(torch.multinomial(q[-1], 1, generator=generator)))
    return proposed, torch.cat([torch.empty(0, reader.model.config.vocab_size, device=reader.cache.keys.device), *q])


def distributions(reader: Reader, text: list[int], proposed: list[int], config: SampleConfig) -> Tensor:
    """p (k + 1, V) of the token after the text, and after each of the k proposed ones: a single pass."""
    whole = text + proposed
    [known] = reader.rewind(0, [text[:-1]])  # what was rejected is forgotten
    x = reader.features(0, [whole[known:]])[0]  # (T, C)
    contexts = [text + proposed[:i] for i in range(len(proposed) + 1)]
    return probabilities(reader.model.head(x[-len(contexts) :]), config, contexts)


def verified(p: Tensor, q: Tensor, proposed: list[int], generator: torch.Generator) -> list[int]:
    """The proposed tokens up to the first that is not accepted, and one more: p (k + 1, V), q (k, V)."""
    k = len(proposed)
    at, u = (range(k), proposed), torch.rand(k, generator=generator, device=p.device)
    accepted = int((u * q[at] < p[at]).long().cumprod(0).sum())
    rest = p[accepted]
    if accepted < k and (residual := (rest - q[accepted]).clamp(min=0)).any():  # none: p = q up to rounding
        rest = residual  # multinomial scales it
    return proposed[:accepted] + [int(torch.multinomial(rest, 1, generator=generator))]


@dataclass
class Settings:
    """Flags of this recipe."""

    target: str
    """the model whose text is wanted"""
    draft: str
    """a smaller model with the same tokenizer"""
    prompt: str
    """what to answer (fine-tuned target) or to continue"""
    draft_tokens: int = 4
    """tokens that the draft guesses before each check"""
    pairs: int = 5
    """timed runs without and with the draft, in turn"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights"""
    sampling: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)


def main(settings: Settings) -> None:
    """Write the text with the draft's help, then time both ways in pairs."""
    if settings.draft_tokens < 1 or settings.pairs < 1:
        raise InputError(f"--draft-tokens {settings.draft_tokens} --pairs {settings.pairs}: both must be at least 1")
    (target, tokenizer), (draft, theirs) = (checkpoint.load(folder) for folder in (settings.target, settings.draft))
    if theirs.hash != tokenizer.hash:
        raise InputError(f"--draft {settings.draft} has another tokenizer than --target {settings.target}: train both with one")
    if isinstance(target, GPTClassifier) or isinstance(draft, GPTClassifier):
        raise InputError("a classifier gives labels, not text")
    device, dtype, config = runtime.pick_device(), runtime.DTYPES[settings.dtype], settings.sampling
    target, draft, stop = target.to(device, dtype), draft.to(device, dtype), set(tokenizer.control.values())
    text, counts = runtime.argument_text(settings.prompt), Counter()
    prompt = tokenizer.encode(text) or [tokenizer.end_of_text]
    if tokenizer.chat_template:
        prompt = fit([{"role": "user", "content": text}], tokenizer, target.config.block_size, config.max_new_tokens)[0]
    ids = speculate(target, draft, prompt, config, stop, settings.draft_tokens, counts)
    print(text * (not tokenizer.chat_template) + "".join(stream_text(tokenizer, ids, config.stop)))

    def speed(new: Iterable) -> float:
        """Tokens per second."""
        start = runtime.clock(device)
        return sum(1 for _ in new) / (runtime.clock(device) - start)

    runs = [(speed(generate(target, [prompt], config)), speed(speculate(target, draft, prompt, config, (), settings.draft_tokens)))
            for _ in range(settings.pairs)]  # without stop ids: both make as many tokens
    alone, helped = map(median, zip(*runs))
    print(f"{counts['accepted']} of {counts['proposed']} guesses accepted, {1 + counts['accepted'] / counts['passes']:.2f} tokens a pass of the target")
    print(f"{helped:.1f} tokens/s, alone {alone:.1f}: {median(b / a for a, b in runs):.2f} times as fast, median of {settings.pairs} pairs")


if __name__ == "__main__":
    runtime.run_as_script(lambda: main(tyro.cli(Settings, description=__doc__)))
