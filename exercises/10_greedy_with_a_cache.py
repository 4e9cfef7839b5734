"""Task 10. Generate with a KV cache.

Always take the likeliest next token, and let the network read each token once: the whole prompt first, then one token at
a time. `model.features(tokens (B, T), cache=cache)` reads tokens behind those that the cache holds and gives their vectors
(B, T, C); `model.head` makes logits of vectors. The last token that is chosen need not be read any more.

    pytest exercises/10_greedy_with_a_cache.py
"""

import torch

from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, GPTConfig


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The `count` ids that follow the prompt, each the likeliest after all before it."""
    raise NotImplementedError("cache = model.new_cache(1); read the prompt; then, as often as needed, argmax, append, read that one id")


def test_greedy():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    read, features = [], model.features

    def counted(tokens, **named):
        read.append(tokens.size(1))
        return features(tokens, **named)

    model.features = counted
    prompt = [3, 1, 4, 1, 5, 9]
    ids = greedy(model, prompt, 8)
    del model.features
    expected = generate_ids(model, [prompt], SampleConfig(max_new_tokens=8, temperature=0))[0][0]
    assert len(ids) == 8 and ids[0] == expected[0], "the first new id comes from the vector of the prompt's last token"
    assert ids == expected, f"{ids}, should be {expected}: does every chosen id go into the cache, once?"
    assert sum(read) <= len(prompt) + 8, f"{sum(read)} tokens were read for a prompt of 6 and 8 new ones: each is read once"
