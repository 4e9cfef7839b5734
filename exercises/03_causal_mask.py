"""Task 3. Who may see whom?

T new tokens follow S − T that a cache holds already (at first S = T). New token t stands at position S − T + t. It sees
the keys of all positions up to its own, and none after it.

    T = 2, S = 4:   True True True False
                    True True True True

    pytest exercises/03_causal_mask.py
"""

import torch
from torch import Tensor

from nanochat.model import attention_formula


def causal_mask(T: int, S: int) -> Tensor:
    """→ (T, S) bool: True where query t may see key s."""
    raise NotImplementedError("compare the positions of the queries, a column, with those of the keys, a row")


def test_causal_mask():
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]], "three tokens: a triangle"
    last = causal_mask(2, 4).tolist()
    assert last == [[True, True, True, False], [True] * 4], "the last query sees every key: are yours aligned at the end?"
    assert causal_mask(1, 9).all(), "one new token sees all before it"
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    whole = attention_formula(q, k, v, causal_mask(6, 6), 0.0)
    torch.testing.assert_close(attention_formula(q[:, :, 4:], k, v, causal_mask(2, 6), 0.0), whole[:, :, 4:])
