"""How good a model is: loss, perplexity, bits per byte, and what its replies are like."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from nanochat.dialogue import Conversation, render_prompt
from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, IGNORED, Batch
from nanochat.runtime import autocast
from nanochat.tokenizer import Tokenizer


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The mean over all supervised targets of `batches`, each counted once.

    loss: nats per token. perplexity: e^loss. bits_per_byte: nats of all targets, control tokens
    included, over ln 2 · UTF-8 bytes of their text: it compares models with different tokenizers.
    """
    device = model.wte.weight.device
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    training = model.training
    model.eval()
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, dtype):
            nats += model(*batch).item()
        targets = batch.targets[batch.targets != IGNORED]
        tokens += targets.numel()
        text_bytes += int(byte_lengths[targets].sum())
    model.train(training)
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": nats / (math.log(2) * max(text_bytes, 1)),
    }


@dataclass
class Replies:
    """Greedy replies to the first user turns of held-out conversations."""

    prompts: list[str]
    replies: list[str]
    lengths: list[int]  # tokens
    ended: list[bool]  # by the model's own <|end|>, within the limit

    def __str__(self) -> str:
        share, distinct, empty = sum(self.ended) / len(self.ended), len(set(self.replies)), self.replies.count("")
        return (
            f"{len(self.replies)} replies: {share:.0%} end by themselves, median length "
            f"{median(self.lengths):g} tokens, {distinct} distinct, {empty} empty"
        )


def greedy_replies(model: GPT, tokenizer: Tokenizer, conversations: list[Conversation],
                   max_new_tokens: int = 64) -> Replies:  # fmt: skip
    """Ask the first user turn of each conversation; temperature 0, so that anybody gets the same."""
    prompts = [[m for m in c[:2] if m["role"] != "assistant"] for c in conversations]
    ids = [render_prompt(prompt, tokenizer)[-model.config.block_size :] for prompt in prompts]
    config = SampleConfig(max_new_tokens=max_new_tokens, temperature=0)
    new, ended = generate_ids(model, ids, config, tokenizer.control.values())
    return Replies(
        [prompt[-1]["content"] for prompt in prompts],
        [tokenizer.decode(row) for row in new],
        [len(row) for row in new],
        ended,
    )
