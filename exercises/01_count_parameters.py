"""Task 1. How many numbers does a GPT learn?

Count them from the shape alone. Read GPT, Block, CausalSelfAttention and MLP in nanochat/model.py, and note for
each part its matrices (V·C, C·3C, …) and its biases. The head is the token table again: it counts once.

Hint: `python -m nanochat.model` prints every tensor of GPT-2 with its size.

    pytest exercises/01_count_parameters.py
"""

import torch

from nanochat.model import GPT, GPTConfig


def count_parameters(vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    """V, block size, blocks, C → the number of parameters."""
    raise NotImplementedError("add up two tables, n_layer blocks and the last layer norm")


def test_count_parameters():
    one_block = count_parameters(0, 0, 1, 10) - count_parameters(0, 0, 0, 10)
    assert one_block == 1_330, f"a block of 10 channels has 12·10² weights and 13·10 biases and gains, 1,330, not {one_block:,}"
    assert count_parameters(50257, 1024, 12, 768) == 124_439_808, "GPT-2 small has 124,439,808; is the head counted twice?"
    for vocab_size, block_size, n_layer, n_embd in ((512, 64, 3, 48), (97, 24, 1, 36)):
        with torch.device("meta"):  # shapes without memory
            gpt = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head=1, n_embd=n_embd))
        assert count_parameters(vocab_size, block_size, n_layer, n_embd) == sum(p.numel() for p in gpt.parameters())
