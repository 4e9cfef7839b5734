"""Worked answers to the ten tasks, by the names of their functions. Look here last: a wrong answer of your own teaches more.

tests/test_exercises.py puts each into its task and runs the task's test.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from nanochat.model import GPT, IGNORED
from nanochat.tokenizer import Tokenizer


def count_parameters(vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    """A block: attention 3C² + 3C and C² + C, MLP 4C² + 4C and 4C² + C, two layer norms of 2C: 12C² + 13C."""
    C = n_embd
    return (vocab_size + block_size) * C + n_layer * (12 * C * C + 13 * C) + 2 * C


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """torch.var would divide by C − 1 unless it is told not to."""
    x = x - x.mean(dim=-1, keepdim=True)
    return gain * x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() + bias


def causal_mask(T: int, S: int) -> Tensor:
    """A column of positions beside a row of positions: broadcasting makes the table."""
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def merge_step(tokens: list[bytes]) -> tuple[tuple[bytes, bytes], list[bytes]]:
    """max and Counter keep the order in which pairs were first seen, so of equals the first wins."""
    counts = Counter(zip(tokens, tokens[1:]))
    pair = max(counts, key=counts.get)
    after, i = [], 0
    while i < len(tokens):
        found = tuple(tokens[i : i + 2]) == pair
        after.append(b"".join(pair) if found else tokens[i])
        i += 2 if found else 1
    return pair, after


def learning_rate(step: int, max_steps: int, warmup_steps: int) -> float:
    """Through (−1, 0) and (warmup_steps, 1); then through (warmup_steps, 1) and (max_steps, 0)."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (max_steps - step) / (max_steps - warmup_steps)


def top_k(logits: Tensor, k: int) -> Tensor:
    """masked_fill makes a new tensor; masked_fill_ would change the one that came in."""
    least = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def inputs_and_targets(start: int, turns: list[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """The mask is made in the same pass as the ids: nothing has to be searched for afterwards."""
    ids, learned = [start], [False]
    for role, turn in turns:
        ids += turn
        learned += [False] + [role == "assistant"] * (len(turn) - 1)
    return ids[:-1], [i if is_learned else IGNORED for i, is_learned in zip(ids[1:], learned[1:])]


@torch.no_grad()
def perplexity_and_bits_per_byte(model: GPT, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """gather takes from each row of log-probabilities that of its target."""
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text])
    log_p = model(ids[None, :-1])[0].log_softmax(dim=-1)  # (T, V)
    nats = -log_p.gather(1, ids[1:, None]).sum().item()
    return math.exp(nats / (len(ids) - 1)), nats / math.log(2) / len(text.encode("utf-8"))


def merged(W: Tensor, A: Tensor, B: Tensor, alpha: float, sign: int = 1) -> Tensor:
    """W x + s B (A x) = (W + s B A) x: the product of matrices is associative."""
    return W + sign * alpha / A.size(0) * B @ A


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The cache gives each new token its position and the keys and values of all before it."""
    cache, new, unread = model.new_cache(1), [], prompt
    for _ in range(count):
        x = model.features(torch.tensor([unread]), cache=cache)  # (1, T, C)
        unread = [model.head(x[0, -1]).argmax().item()]
        new += unread
    return new
