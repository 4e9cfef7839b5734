"""The network: a decoder-only Transformer with the shape and the parameter names of GPT-2.

tokens (B, T) become vectors (B, T, C): one row of the token table plus one row of the
position table. Each of n_layer blocks adds to them twice: attention moves information
between positions (only from the past), the MLP works on each position alone. The final
layer norm and the token table, used a second time as the head, give logits (B, T, V).

Legend, with GPT-2 small's numbers:
    B batch    T time, tokens in a row (≤ block_size 1,024)    S keys seen, S ≥ T with a cache
    C width n_embd 768    H heads 12    D = C / H head width 64    V vocabulary 50,257

Sources: Radford et al. 2019 (GPT-2); Vaswani et al. 2017 (attention); parameter names and
numerics of Hugging Face's GPT2LMHeadModel, to which tests/test_model.py holds this file.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat import InputError

IGNORED = -100  # a target that is not learned from: the value that F.cross_entropy ignores too
LOSS_CHUNK = 1024  # rows of logits made at a time, 206 MB in fp32 at 50,257; without gradients each chunk is freed before the next
ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}
GPT2_SIZES = {  # name: (n_layer, n_head, n_embd)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass
class GPTConfig:
    """The shape of the network. The defaults are GPT-2 small: 124,439,808 parameters."""

    vocab_size: int = 50257  # V: rows of the token table
    block_size: int = 1024  # rows of the position table: the longest text seen at once, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    dropout: float = 0.0  # share of the embedding and of each residual branch zeroed in training
    attention_dropout: float = 0.0  # share of attention weights; on CPU it costs the fast kernel
    activation: str = "gelu_new"  # GPT-2's tanh form; "gelu" (erf) for nanoGPT's files
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}, must be from 1 to {most:,}"
            for name, most in {"vocab_size": 10**7, "block_size": 10**7, "n_layer": 1000, "n_head": 10**4, "n_embd": 10**6}.items()
            if not 1 <= getattr(self, name) <= most
        ]
        if not wrong and self.n_embd % self.n_head:
            wrong.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            wrong.append(f"activation is {self.activation!r}, must be one of {list(ACTIVATIONS)}")
        if wrong:
            raise InputError("model settings: " + "; ".join(wrong))


class Batch(NamedTuple):
    """The tensors of one forward pass in training."""

    inputs: Tensor  # (B, T) token ids
    targets: Tensor  # (B, T) the id that should follow each input, or IGNORED
    segments: Tensor | None = None  # (B, T) tokens see only tokens of their own segment

    def to(self, device: torch.device) -> "Batch":
        return Batch._make(None if x is None else x.to(device, non_blocking=True) for x in self)

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies while both go on."""
        return Batch._make(None if x is None else x.pin_memory() for x in self)


class GPT(nn.Module):
    """The whole network; the head is the token table `wte`, so the two cannot come apart."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.labels: list[str] | None = None  # of a classifier (classifier.py), whose head gives their scores instead of logits
        self.recompute = False  # in training keep only each block's input, and compute the rest again for the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.apply(self._init_weights)
        # Each block adds twice to the residual stream; scaled down, the 2·n_layer summands do not
        # let its variance grow with depth (GPT-2 paper, section 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor, *, segments: Tensor | None = None,
                 cache: "KVCache | None" = None) -> Tensor:
        """Everything but the head: tokens (B, T) → vectors (B, T, C).

        segments (B, T), of rows that several texts share: equal numbers see each other, and
        positions restart where the number changes.
        cache: keys and values of what each row has read before; `tokens` follow them.
        Raises ValueError when earlier and new tokens together exceed block_size.
        """
        if segments is not None and cache is not None:
            raise ValueError("segments are for rows without a cache")
        T = tokens.size(1)
        earlier = 0 if cache is None else cache.longest
        if earlier + T > self.config.block_size:
            raise ValueError(f"{earlier} + {T} tokens exceed block_size {self.config.block_size}")
        if cache is not None:
            positions, mask = cache.advance(T)
        elif segments is not None:
            positions, mask = segment_positions(segments), visible(segments)
        else:
            positions, mask = torch.arange(T, device=tokens.device), None

        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        return self.ln_f(self.blocks(x, mask, None if cache is None else cache.layers(positions)))

    def blocks(self, x: Tensor, mask: Tensor | None, caches: "Sequence[LayerCache | None] | None") -> Tensor:
        """Through one block after the other: (B, T, C) → (B, T, C)."""
        for block, cache in zip(self.h, caches or [None] * len(self.h)):
            if self.recompute and self.training:  # Chen et al. 2016; a third more work
                x = checkpoint(self.layer, block, x, mask, use_reentrant=False)
            else:
                x = self.layer(block, x, mask, cache)
        return x

    @staticmethod
    def layer(block: nn.Module, x: Tensor, mask: Tensor | None, cache: "LayerCache | None" = None) -> Tensor:
        """One block, by a name of its own: rehearsal.compiled compiles it once for all of them."""
        return block(x, mask, cache)

    def head(self, x: Tensor) -> Tensor:
        """Vectors (..., C) → logits (..., V), by the token table itself."""
        return F.linear(x, self.wte.weight)

    def forward(self, tokens: Tensor, targets: Tensor | None = None,
                segments: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets, the fp32 sum of the cross-entropy over supervised ones.

        A sum, not a mean: the loop divides once, by the supervised tokens of the whole step.
        """
        if targets is None:
            return self.head(self.features(tokens, segments=segments))
        return self.nll(tokens, targets, segments).sum()

    def nll(self, tokens: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each target, −ln p, in nats: fp32 (B, T), 0 where ignored.

        The head is the widest product of a small GPT, so it is computed for supervised
        positions only (and a few more, up to a multiple of 64), LOSS_CHUNK rows at a time.
        """
        places = supervised_places(targets)  # first: a GPU waits here for their number
        x = self.features(tokens, segments=segments).flatten(0, 1)  # (B·T, C)
        losses = [self.chunk_nll(x[rows], targets.flatten()[rows]) for rows in places.split(LOSS_CHUNK)]
        nll = at_least_fp32(x.new_zeros(x.size(0))).index_put((places,), torch.cat(losses))
        return nll.view_as(targets)

    def chunk_nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Vectors (N, C), targets (N,) → −ln p of each target, (N,)."""
        return F.cross_entropy(at_least_fp32(self.head(x)), targets, reduction="none")

    @torch.no_grad()
    def grow(self, vocab_size: int) -> None:
        """Give the token table rows up to vocab_size, in place.

        A new row starts as the mean of the old ones plus 1 % noise: its logit is then the mean
        logit, far below the likely ones. A random row would take much of the probability.
        """
        old = self.wte.weight
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(vocab_size - old.size(0), old.size(1), generator=generator)
        new = old.mean(0) + 0.01 * old.std(0, correction=0) * noise.to(old)
        self.wte.weight = nn.Parameter(torch.cat([old, new]))
        self.wte.num_embeddings = self.config.vocab_size = vocab_size

    @torch.no_grad()
    def cut(self, vocab_size: int) -> None:
        """Drop the rows of the token table from vocab_size on, in place: rows that have no id."""
        self.wte.weight = nn.Parameter(self.wte.weight[:vocab_size].clone())
        self.wte.num_embeddings = self.config.vocab_size = vocab_size

    @torch.inference_mode(False)  # normal tensors even there: code compiled for inference tensors would be compiled again for normal ones
    def new_cache(self, batch_size: int) -> "KVCache":
        """An empty cache on the device of the weights, in their dtype; on a CPU at least fp32, which attention reads faster there."""
        c, like = self.config, self.wpe.weight
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        keys = like.new_zeros(shape, dtype=dtype)
        return KVCache(keys, torch.zeros_like(keys), torch.zeros(batch_size, dtype=torch.int64))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a layer norm, each added to the stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: "LayerCache | None") -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class CausalSelfAttention(nn.Module):
    """Each position asks (q) all positions up to itself (k) and gathers what they offer (v)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: "LayerCache | None") -> Tensor:
        """x (B, T, C) → (B, T, C); mask: who may see whom; cache: earlier keys and values, to which these are added."""
        H = self.config.n_head
        q, k, v = rearrange(self.c_attn(x), "B T (three H D) -> three B H T D", three=3, H=H)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        dropout = self.config.attention_dropout if self.training else 0.0
        y = attention(q.to(k.dtype), k, v, mask, dropout).to(q.dtype)  # (B, H, T, D)
        y = self.c_proj(rearrange(y, "B H T D -> B T (H D)"))
        return F.dropout(y, self.config.dropout, self.training)


class MLP(nn.Module):
    """Two layers on each position alone: C → 4C → C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x)))
        return F.dropout(x, self.config.dropout, self.training)


def attention_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q kᵀ / √D) v, written out (Vaswani et al. 2017, equation 1).

    q (B, H, T, D), k and v (B, H, S, D) → (B, H, T, D). mask: True where query t may see key s,
    broadcast to (B, H, T, S); None: each query sees the keys up to its own.
    √D: a sum of D products of unit size has variance D; without it the softmax saturates.
    """
    if mask is None:
        T, S = q.size(-2), k.size(-2)
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)  # e^−∞ is a weight of 0
    scores = (q / math.sqrt(q.size(-1))) @ k.mT + bias  # (B, H, T, S)
    weights = scores.softmax(dim=-1, dtype=scores.dtype)  # with a dtype, or autocast would make them fp32
    return F.dropout(weights, dropout) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q kᵀ / √D) v by torch's fused kernel, which never holds the (T, S) table of weights (Dao et al. 2022).

    Without a mask: texts from their start (T = S), which is all that `is_causal` serves, since it aligns
    query 0 with key 0; or a single new query (T = 1), which sees every key. Other masks are made by `visible`
    (packed rows) and `up_to` (KVCache.advance). On a CPU in bf16 the formula makes a training step up to a quarter faster, while the
    table is small, and is used. test_fused_attention_equals_the_formula holds the two equal.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.size(-2) <= 512:
        return attention_formula(q, k, v, mask, dropout)
    causal = mask is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def visible(segments: Tensor) -> Tensor:
    """segments (B, T) → mask (B, 1, T, T): each token sees those up to itself, of its own segment."""
    T = segments.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]


def up_to(positions: Tensor, S: int) -> Tensor:
    """positions (B, T) → mask (B, 1, T, S): each token sees the keys from position 0 to its own."""
    return (torch.arange(S, device=positions.device) <= positions[:, :, None])[:, None]


def segment_positions(segments: Tensor) -> Tensor:
    """segments (B, S) → positions (B, S) that restart at 0 where the number changes: [1, 1, 1, 2, 2] → [0, 1, 2, 0, 1]."""
    index = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def supervised_places(targets: Tensor) -> Tensor:
    """(B, T) → (N,): where in B·T the supervised targets stand, in order; then some ignored ones, up to a multiple of 64.

    A CPU makes and keeps a kernel for each number of rows that a product has met, 5 MB each: with
    the exact number of each batch, fine-tuning a small model grew to gigabytes.
    """
    supervised = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    ignored = (targets.flatten() == IGNORED).nonzero().squeeze(1)
    return torch.cat([supervised, ignored[: -len(supervised) % 64]])


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32 for half-precision tensors; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class KVCache:
    """Keys and values of the tokens that each row has read, so that each token is computed once.

    Rows differ in length: what lies beyond a row's own is never seen, and is written over (it must
    be finite, though: a weight of 0 times NaN is NaN). It cannot slide past block_size: keys carry
    their absolute position. generate.py then keeps the newest half and reads it again from
    position 0.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor):
        self.keys, self.values = keys, values  # (n_layer, B, H, block_size, D)
        self.lengths = lengths  # (B,) tokens that each row has read; on the CPU, where it is asked for

    def rows(self, start: int, stop: int) -> "KVCache":
        """Some of the rows, in the same memory: to read with one is to read with both."""
        return KVCache(self.keys[:, start:stop], self.values[:, start:stop], self.lengths[start:stop])

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def advance(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Count T more tokens in each row → their positions (B, T), and which keys they see: (B, 1, T, S) or None.

        None where `attention` needs no mask: texts from their start (its is_causal says the
        same), or one new token in rows of equal length.
        """
        positions = self.lengths[:, None] + torch.arange(T)
        alike = bool((self.lengths == self.lengths[0]).all())
        self.lengths += T  # in place: `rows` shares them
        from_the_start = T == self.longest
        mask = None
        if not (alike and (T == 1 or from_the_start)):
            mask = up_to(positions, self.longest).to(self.keys.device)
        return positions.to(self.keys.device), mask

    def layers(self, positions: Tensor) -> "list[LayerCache]":
        """The part of each layer, about to take new tokens at these positions."""
        row = torch.arange(len(positions), device=positions.device)[:, None]
        return [LayerCache(self.keys[i], self.values[i], row, positions, self.longest) for i in range(len(self.keys))]


class LayerCache(NamedTuple):
    """Keys and values of one layer, about to take those of T new tokens."""

    keys: Tensor  # (B, H, block_size, D)
    values: Tensor
    row: Tensor  # (B, 1) 0 … B - 1: beside positions, one place for each new token
    positions: Tensor  # (B, T)
    end: int  # how many columns to read: to the last of them

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) at their positions; return all keys and values (B, H, S, D), without gradient."""
        self.keys[self.row, :, self.positions] = rearrange(k.detach(), "B H T D -> B T H D").to(self.keys.dtype)
        self.values[self.row, :, self.positions] = rearrange(v.detach(), "B H T D -> B T H D").to(self.keys.dtype)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]


def forward_flops(config: GPTConfig, tokens: int = 1, supervised: int | None = None, T: int | None = None) -> int:
    """Of a forward pass of so many tokens in rows of T (block_size if not said); multiply-adds count as two.

    A token: 2·(weights in the blocks' products) + 4·n_layer·T·C for q kᵀ and the weighted sum of v
    (Chowdhery et al. 2022, appendix B). The head: 2·V·C for each of the supervised tokens, all if not said.
    Training costs three times this: backward is two products per forward one (recomputation not counted).
    """
    C, L = config.n_embd, config.n_layer
    a_token = 2 * L * 12 * C * C + 4 * L * (T or config.block_size) * C
    return tokens * a_token + (tokens if supervised is None else supervised) * 2 * config.vocab_size * C


def main() -> None:
    """Print every tensor of a GPT: shape, parameters, share; then FLOPs and memory."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.model", description=main.__doc__)
    parser.add_argument("name", nargs="?", default="gpt2", choices=GPT2_SIZES)
    for field in fields(GPTConfig):
        if field.type is int:
            parser.add_argument("--" + field.name.replace("_", "-"), type=int, metavar="N")
    args = vars(parser.parse_args())
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[args.pop("name")]))
    try:
        config = GPTConfig(**sizes | {name: value for name, value in args.items() if value is not None})
    except InputError as error:
        parser.error(str(error))
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    print(f"{'tensor':<28}{'shape':>16}{'parameters':>14}{'share':>8}")
    for name, p in model.named_parameters():
        print(f"{name:<28}{' x '.join(map(str, p.shape)):>16}{p.numel():>14,}{p.numel() / total:>8.2%}")
    print(f"{'total':<44}{total:>14,}")
    forward = forward_flops(config)
    print(f"\nforward  {forward / 1e6:,.1f} MFLOP per token at T = {config.block_size:,}")
    print(f"training {3 * forward / 1e6:,.1f} MFLOP per token")
    print(f"memory   {4 * total / 1e6:,.0f} MB of fp32 weights; AdamW training holds four such copies")


if __name__ == "__main__":
    main()
