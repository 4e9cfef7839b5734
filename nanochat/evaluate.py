"""How good a model is: loss, perplexity, bits per byte, and what its replies are like."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

from nanochat import processes
from nanochat.dialogue import Conversation, render_prompt
from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, IGNORED, Batch
from nanochat.runtime import autocast
from nanochat.tokenizer import Tokenizer


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, batches: Iterable[Batch], dtype: torch.dtype = torch.float32,
          total: int | None = None) -> dict[str, float]:
    """The mean over all supervised targets of `batches`, each counted once; total: how many there are, for the bar.

    Several processes, each called with the same batches, take turns and add up: all get the same mean.

    loss: nats per token. perplexity: e^loss. bits_per_byte: nats of all targets, control tokens
    included, over ln 2 · UTF-8 bytes of their text: it compares models with different tokenizers.
    """
    device = model.wte.weight.device
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    training = model.training
    model.eval()
    nats, tokens, text_bytes = 0.0, 0, 0
    for number, batch in enumerate(tqdm(batches, "evaluating", total, leave=False, unit="batch", delay=2, disable=None)):
        if number % processes.world_size() != processes.rank():
            continue
        batch = batch.to(device)
        with autocast(device, dtype):
            nats += model(*batch).item()
        targets = batch.targets[batch.targets != IGNORED]
        tokens += targets.numel()
        text_bytes += int(byte_lengths[targets].sum())
    model.train(training)
    nats, tokens, text_bytes = processes.sum_over_ranks(nats, tokens, text_bytes)
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
        if not self.replies:
            return "no replies: no conversation has a user turn"
        share, distinct, empty = sum(self.ended) / len(self.ended), len(set(self.replies)), self.replies.count("")
        return (
            f"{len(self.replies)} replies: {share:.0%} end by themselves, median length "
            f"{median(self.lengths):g} tokens, {distinct} distinct, {empty} empty"
        )


def greedy_replies(model: GPT, tokenizer: Tokenizer, conversations: list[Conversation], limit: int = 50,
                   max_new_tokens: int = 64, batch_size: int = 16) -> Replies:
    """Ask the first user turns of the conversations, the first `limit` different ones.

    At temperature 0, so that anybody gets the same; batch_size bounds the memory of the cache.
    """
    openings: dict[str, Conversation] = {}  # first user turn → it, after the system text if there is one
    for conversation in conversations:
        roles = [message["role"] for message in conversation]
        if "user" in roles:
            opening = conversation[: roles.index("user") + 1]
            openings.setdefault(opening[-1]["content"], [m for m in opening if m["role"] != "assistant"])
    prompts = list(openings)[:limit]
    ids = [render_prompt(openings[prompt], tokenizer)[-model.config.block_size :] for prompt in prompts]
    config = SampleConfig(max_new_tokens=max_new_tokens, temperature=0)
    new: list[list[int]] = []
    ended: list[bool] = []
    for start in tqdm(range(0, len(ids), batch_size), "replying", leave=False, unit="batch", delay=2, disable=None):
        rows, stopped = generate_ids(model, ids[start : start + batch_size], config, tokenizer.control.values())
        new, ended = new + rows, ended + stopped
    return Replies(prompts, [tokenizer.decode(row) for row in new], [len(row) for row in new], ended)
