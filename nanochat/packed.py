"""Weights laid out for decoding: the same products, nearer to the speed at which memory can be read.

A token made for one text is a product of each matrix with a single row, over before the matrix has
come from memory: its bytes are the time. On a CPU, F.linear reaches a third of the memory's
bandwidth with one row. `pack` lays every matrix out anew, and lets go of the original (where
single rows of the token table cannot be found in the head's layout, it stays beside it):

    float32     a slice a thread, each transposed, all multiplied at once by torch.bmm
    bfloat16    oneDNN's own blocked layout
    int8        oneDNN's or FBGEMM's, with a scale for each output: a quarter of float32's bytes

int8 rounds each weight to one of 255 steps of its row's largest; the fastest CPU kernel rounds
the inputs of a product likewise, for that call. `python -m nanochat.evaluate` says what it costs.
"""

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanochat import InputError
from nanochat.model import GPT


def ready(model: GPT, device: torch.device, dtype: torch.dtype, quantize: str = "none", compile: bool = False) -> GPT:
    """A loaded model, in place, as sample.py and the server run it: moved, of this type, packed or compiled.

    Raises InputError where compiling gains nothing.
    """
    if compile and device.type == "cpu" and (quantize != "none" or dtype != torch.bfloat16):
        raise InputError("--compile on a CPU is of use to --dtype bfloat16 alone: packed, float32 and int8 are as fast without")
    model.to(device, dtype)
    if quantize != "none" or not compile:
        pack(model, quantize)
    return compile_decoding(model) if compile else model


@torch.no_grad()
def pack(model: GPT, quantize: Literal["none", "int8"] = "none", blocks: bool = True) -> GPT:
    """Lay out a model's weights, in place, where and as it will run: it can be neither trained nor moved afterwards.

    On a GPU only int8 changes anything. Equal to the plain model but for rounding (int8: tests/test_packed.py has the error).
    """
    if quantize == "none" and model.wpe.weight.device.type != "cpu":
        return model
    for block in model.h if blocks else ():
        for part in (block.attn, block.mlp):
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, packed(child.weight, child.bias, quantize))
    if not hasattr(model, "labels"):  # a classifier has a small head of its own
        model.wte = Table(model.wte.weight, quantize)
        model.head = model.wte.head.forward
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's memory, which then is given back whole
    return model


def packed(weight: Tensor, bias: Tensor | None, quantize: str) -> nn.Module:
    """The fastest module that gives x Wᵀ + b for a weight (N, K) where it lies; F.linear where nothing better runs."""
    kinds = {"int8": (Int8OneDNN, Int8), torch.float32: (Sliced,), torch.bfloat16: (Blocked,)}
    for kind in kinds.get(weight.dtype if quantize == "none" else quantize, ()):
        try:
            layer = kind(weight, bias)
            layer(weight.new_zeros(1, weight.size(1)))  # most of these kernels are private to torch: are they there, do they run?
            return layer
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    return Plain(weight, bias)


class Plain(nn.Module):
    """x Wᵀ + b, as F.linear computes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Sliced(nn.Module):
    """float32: W's rows in as many slices as there are threads, each transposed; every thread reads one from end to end."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        n, self.N = torch.get_num_threads(), weight.size(0)
        short = -self.N % n
        self.slices = rearrange(F.pad(weight, (0, 0, 0, short)), "(n N) K -> n K N", n=n).contiguous()
        self.biases = None if bias is None else rearrange(F.pad(bias, (0, short)), "(n N) -> n 1 N", n=n).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.size(-1)).expand(self.slices.size(0), -1, -1)
        y = torch.bmm(rows, self.slices) if self.biases is None else torch.baddbmm(self.biases, rows, self.slices)
        return rearrange(y, "n B N -> B (n N)")[:, : self.N].reshape(*x.shape[:-1], self.N)


class Blocked(nn.Module):
    """bfloat16: oneDNN's blocks, which torch.compile's freezing uses too."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.blocks, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (N, K) → whole numbers from −127 to 127, and a scale (N, 1) for each row: W ≈ numbers · scale."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8(nn.Module):
    """The definition, in the dtype of x. On a GPU it saves memory; compiled, time as well."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        (self.numbers, self.scale), self.bias = int8(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8OneDNN(nn.Module):
    """Int8 on a CPU, but each call's inputs are rounded to 8 bits too: the product is one of whole numbers.

    All rows of a call share 255 steps, so each is first scaled to the same size. A text's rounding still
    depends a little on what is computed beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        if weight.device.type != "cpu":
            raise NotImplementedError
        numbers, scale = int8(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the removal of such tensors; Int8 will take over then
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            tensor = torch._make_per_channel_quantized_tensor(numbers, scale[:, 0].double(), zeros, 0)
            self.ours = torch.ops.quantized.linear_prepack(tensor, None)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        if x.numel() == x.size(-1):  # a single row
            y = torch.ops.quantized.linear_dynamic(x32, self.ours, False)
        else:
            size = x32.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
            y = torch.ops.quantized.linear_dynamic(x32 / size, self.ours, False) * size
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Table(nn.Module):
    """The token table: as the head, laid out like any other weight, and to look rows up in."""

    def __init__(self, table: Tensor, quantize: str):
        super().__init__()
        self.dtype, self.head = table.dtype, packed(table, None, quantize)
        self.rows, self.scale = int8(table) if quantize == "int8" else (table, None)
        if isinstance(self.head, Sliced):
            self.rows = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.rows is None:
            slices = self.head.slices  # (n, C, V/n)
            return slices[tokens // slices.size(2), :, tokens % slices.size(2)]
        rows = F.embedding(tokens, self.rows)
        return rows if self.scale is None else (rows * F.embedding(tokens, self.scale)).to(self.dtype)


def compile_decoding(model: GPT) -> GPT:
    """Compile the step of one new token a row, in place; prompts are read as before. The first steps then take half a minute.

    On a CPU (bfloat16) the weights of the blocks become constants, which the compiler lays out itself, as `Blocked` does.
    On a GPU the step is recorded as a CUDA graph, for which the cache must lie still: all of it is read, behind a mask.
    """
    cuda = model.wpe.weight.device.type == "cuda"
    if not cuda:
        pack(model.requires_grad_(False), blocks=False)
    plain, fast = model.blocks, torch.compile(model.blocks, options={"triton.cudagraphs": cuda})

    def blocks(x: Tensor, mask: Tensor | None, caches: list | None) -> Tensor:
        """GPT.blocks: compiled for one new token a row, else plain."""
        if not caches or x.size(1) > 1:
            return plain(x, mask, caches)
        if not cuda:
            with torch._inductor.config.patch(freezing=True):  # a setting of each thread
                return fast(x, mask, caches)
        for cache in caches:
            torch._dynamo.mark_static_address(cache.keys)
            torch._dynamo.mark_static_address(cache.values)
        mask = (torch.arange(model.config.block_size, device=x.device) <= caches[0].positions[:, :, None])[:, None]
        return fast(x, mask, [cache._replace(end=model.config.block_size) for cache in caches]).clone()  # out of the graph's memory

    model.blocks = blocks
    return model
