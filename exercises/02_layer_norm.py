"""Task 2. Write layer norm.

Of each vector of C numbers on its own: take off their mean, divide by their standard deviation, multiply by a learned
gain, add a learned bias. The variance is the mean square (divided by C, not by C − 1), and ε is added to it before the
root. (Ba et al. 2016, equations 3 and 4.)

Use sums, means and roots of tensors; not torch.nn.functional.layer_norm.

    pytest exercises/02_layer_norm.py
"""

import torch
from torch import Tensor


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """x (..., C), gain and bias (C,) → (..., C)."""
    raise NotImplementedError("mean and variance over the last dimension, with keepdim=True")


def test_layer_norm():
    torch.manual_seed(0)
    x, gain, bias = 3 + torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)
    plain = layer_norm(x, torch.ones(8), torch.zeros(8))
    assert plain.shape == x.shape
    assert plain.mean(-1).abs().max() < 1e-5, "each vector must have mean 0: over which dimension is yours?"
    assert (plain.square().mean(-1) - 1).abs().max() < 1e-3, "the mean square must be 1: torch's var and std divide by C − 1"
    same = layer_norm(torch.ones(1, 8), gain, bias)
    torch.testing.assert_close(same, bias[None], msg="eight equal numbers become the bias; 0 / 0 would not: where is ε?")
    torch.testing.assert_close(layer_norm(x / 1000, gain, bias), torch.nn.functional.layer_norm(x / 1000, (8,), gain, bias),
                               msg="wrong for small numbers: ε is added to the variance, under the root")
