"""What the benchmarks set beside nanochat: Hugging Face's GPT-2 of the same shape, and attention as nanoGPT computes it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model import GPTConfig
from nanochat.training import TrainConfig


def gpt2_of_hugging_face(config: GPTConfig) -> nn.Module:
    """GPT2LMHeadModel with random weights, without dropout. Its token ids matter to generation only."""
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds, and memory, that only this peer needs

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    ))


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """training.build_optimizer's AdamW, for either network: matrices of the blocks decay, the rest does not."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if ".h." in f".{name}" and p.dim() == 2 else others).append(p)
    groups = [{"params": matrices, "weight_decay": TrainConfig.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, TrainConfig.beta2), fused=True)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """In place of model.attention: the fused kernel for everything."""
    causal = mask is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
