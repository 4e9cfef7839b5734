"""Task 8. How good is a model at a text?

Let it read <|endoftext|> and the text, and ask at every position for what follows, at the last for <|endoftext|> again.
The loss is the mean of −ln p of these targets, in nats. Perplexity is e^loss: so many equally likely tokens would be as
hard. Bits per byte is the sum of −ln p (not the mean), in bits (divided by ln 2), over the bytes of the text in UTF-8; it
compares models whose tokenizers differ.

    pytest exercises/08_perplexity.py
"""

import math

import pytest
import torch

from nanochat import evaluate
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


@torch.no_grad()
def perplexity_and_bits_per_byte(model: GPT, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Of a text that fits the block. model(tokens (B, T)) → logits (B, T, V)."""
    raise NotImplementedError("ids = [end, *tokenizer.encode(text), end]; log_softmax of model(ids[:-1]) holds every −ln p")


def test_perplexity_and_bits_per_byte():
    torch.manual_seed(0)
    tokenizer = Tokenizer([])  # 256 bytes and <|endoftext|>
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.wte.weight.zero_()  # every token is as likely as any other
    perplexity, bits = perplexity_and_bits_per_byte(model, tokenizer, "mill")
    assert perplexity == pytest.approx(257), f"if all 257 ids are equally likely, perplexity is 257, not {perplexity:.1f}"
    assert bits == pytest.approx(5 * math.log2(257) / 4), "five targets, the last of them <|endoftext|>, over four bytes"
    with torch.no_grad():
        model.wte.weight.normal_(std=0.5)
    for text in ("The boats go to the sea.", "船去海边。"):
        rows = evaluate.text_rows([text], tokenizer, 64)
        expected = evaluate.score(model, tokenizer, rows.batches(1))
        perplexity, bits = perplexity_and_bits_per_byte(model, tokenizer, text)
        assert perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
        assert bits == pytest.approx(expected["bits_per_byte"], rel=1e-4), "a Chinese character is three bytes"
