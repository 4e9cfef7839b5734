"""Task 9. Fold a LoRA addition into its matrix.

A linear layer with LoRA gives W x + (alpha / rank) · B A x. That is one linear layer again; which matrix does it have?
(Hu et al. 2021, equation 3.) And how is it taken out again, so that another addition may come in its place?

    pytest exercises/09_lora_merge.py
"""

import torch
from torch import Tensor

from nanochat.lora import LoRALinear


def merged(W: Tensor, A: Tensor, B: Tensor, alpha: float, sign: int = 1) -> Tensor:
    """W (out, in), A (rank, in), B (out, rank) → W with the addition, (out, in); sign −1 takes it out."""
    raise NotImplementedError("the shapes allow one order of the product; the rank is a dimension of A")


def test_merged():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 10, bias=False, dtype=torch.float64)
    adapted = LoRALinear(linear, rank=3, alpha=12.0, dropout=0.0)
    adapted.lora_B.data = torch.randn(10, 3, dtype=torch.float64)
    W, A, B, x = linear.weight.data, adapted.lora_A.data, adapted.lora_B.data, torch.randn(6, dtype=torch.float64)
    before = W.clone()
    one = merged(W, A, B, 12.0)
    assert one.shape == W.shape
    assert torch.equal(W, before), "the matrix that came in was changed: make a new one"
    torch.testing.assert_close(one @ x, adapted(x).data, msg="not what the layer gives: is the scale alpha / rank?")
    torch.testing.assert_close(merged(one, A, B, 12.0, sign=-1), W, msg="taken out again, W must be left")
