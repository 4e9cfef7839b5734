"""Task 6. Keep the k likeliest tokens.

Set all logits but the k largest of each row to −∞: e^−∞ is 0, so softmax gives what is left a sum of 1. If k is larger
than the vocabulary, all stay. The logits that were passed in must not change.

    pytest exercises/06_top_k.py
"""

import torch
from torch import Tensor

from nanochat.generate import keep_top_k


def top_k(logits: Tensor, k: int) -> Tensor:
    """logits (B, V) → (B, V), all but the k largest of each row at −∞."""
    raise NotImplementedError("logits.topk(k).values[:, -1:] is the smallest logit that stays, of each row")


def test_top_k():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [-5.0, -7.0, -6.0, -8.0]])
    before = logits.clone()
    kept = top_k(logits, 2)
    assert torch.equal(logits, before), "the logits that came in were changed: make new ones"
    assert (kept > -torch.inf).tolist() == [[False, True, True, False], [True, False, True, False]], "each row has its own two"
    torch.testing.assert_close(kept.softmax(-1).sum(-1), torch.ones(2))
    assert torch.equal(top_k(logits, 9), logits), "k above the vocabulary keeps all"
    torch.manual_seed(0)
    logits = torch.randn(3, 100)
    assert torch.equal(top_k(logits, 7), keep_top_k(logits, 7))
