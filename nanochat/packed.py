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

Compiled, the weights of a CPU's model stay as they are: the compiler writes loops that read them at
the memory's speed (`row_product`), for one text at a time.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanochat import InputError
from nanochat.model import GPT, at_least_fp32, up_to


def ready(model: GPT, device: torch.device, dtype: torch.dtype, quantize: Literal["none", "int8"] = "none", compile: bool = False) -> GPT:
    """A loaded model, in place, as sample.py and the server run it: moved, of this type, packed, perhaps compiled.

    Raises InputError where compiling gains nothing, or the compiler does not work.
    """
    if compile and device.type not in ("cuda", "cpu"):
        raise InputError(f"--compile is for cuda and cpu, not for {device.type}")
    if compile and device.type == "cpu" and quantize != "none":
        raise InputError("--compile on a CPU is for --quantize none: int8 is faster without (benchmarks/README.md)")
    if device.type != "cpu":
        model.to(device, dtype)
    pack(model, "plain" if compile and device.type == "cpu" else quantize, dtype)
    return compile_decoding(model) if compile else model


@torch.no_grad()
def pack(model: GPT, quantize: Literal["none", "int8", "plain"] = "none", dtype: torch.dtype | None = None) -> GPT:
    """Lay out a model's weights, in place, where it will run: it can be neither trained nor moved afterwards.

    One matrix after another takes its dtype and its layout and lets go of the original: beside the pages of
    the file, which the system may drop, there are never two whole models in memory. On a GPU only int8 changes
    the layout. "plain": F.linear's, for the compiler. Equal to the plain model but for rounding
    (int8: tests/test_packed.py has the error).
    """
    new_layout = quantize != "none" or model.wpe.weight.device.type == "cpu"
    for block in model.h if new_layout else ():
        for name, child in list(block.named_modules()):
            if type(child) is nn.Linear:
                block.set_submodule(name, packed(child.weight.to(dtype), child.bias.to(dtype), quantize))
    if new_layout and not model.labels:  # a classifier has a small head of its own
        table = Table(model.wte.weight.to(dtype), quantize)
        model.wte, model.head = table, table.head.forward  # type: ignore[assignment]  # in the table's place
    for parameter in model.to(dtype).parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)  # out of the file's memory, given back whole then
    return model


def packed(weight: Tensor, bias: Tensor | None, quantize: str) -> nn.Module:
    """The fastest module that gives x Wᵀ + b for a weight (N, K) where it lies; F.linear where nothing better runs."""
    kinds = {"int8": (DynamicInt8, Int8), torch.float32: (Sliced,), torch.bfloat16: (Blocked,)}
    for kind in kinds.get(weight.dtype if quantize == "none" else quantize, ()):
        try:
            layer = kind(weight, bias)
            layer(weight.new_zeros(1, weight.size(1)))  # most of these kernels are private to torch: are they there, do they run?
            return layer
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    return Plain(weight, bias)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """A single row x (..., K) times Wᵀ, W (N, K), in fp32 at least: the definition, for a compiler.

    It makes one loop of the sum, in which each weight is read once and nothing (N, K) is written down.
    as_strided, x repeated N times in the same memory, is of use for a side effect: the compiler then
    works x out beforehand, and not the layer norm that x comes from anew for each of the N sums.
    """
    rows = at_least_fp32(x).contiguous().as_strided(weight.shape, (0, 1))
    return (at_least_fp32(weight) * rows).sum(dim=1).view(*x.shape[:-1], -1)


class Plain(nn.Module):
    """x Wᵀ + b, as F.linear computes it; of a single row, in code that is compiled for a CPU, as the compiler does."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight.contiguous(), bias  # float16's kernel is many times slower on a transposed one

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.size(-1):
            y = row_product(x, self.weight)
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        return F.linear(x, self.weight, self.bias)


class Sliced(nn.Module):
    """float32: W's rows in as many slices as there are threads, each transposed; every thread reads one from end to end."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        n, self.N = torch.get_num_threads(), weight.size(0)
        short = -self.N % n
        self.slices = weight.new_zeros(n, weight.size(1), (self.N + short) // n)
        for own, rows in zip(self.slices, weight.split(self.slices.size(2))):
            own[:, : len(rows)] = rows.T
        self.biases = None if bias is None else rearrange(F.pad(bias, (0, short)), "(n N) -> n 1 N", n=n).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.size(-1)).expand(self.slices.size(0), -1, -1)
        y = torch.bmm(rows, self.slices) if self.biases is None else torch.baddbmm(self.biases, rows, self.slices)
        return rearrange(y, "n B N -> B (n N)")[:, : self.N].reshape(*x.shape[:-1], self.N)


class Blocked(nn.Module):
    """bfloat16: oneDNN's blocks."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.blocks, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (N, K) → whole numbers from −127 to 127, and a scale (N, 1) for each row: W ≈ numbers · scale."""
    scale = torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True)).float().clamp(min=1e-12) / 127
    parts = zip(weight.split(16384), scale.split(16384))  # of a table: not all of it twice more in float32
    return torch.cat([(rows / steps).round().to(torch.int8) for rows, steps in parts]), scale


class Int8(nn.Module):
    """The definition, in the dtype of x. On a GPU it saves memory; compiled, time as well."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        (self.numbers, self.scale), self.bias = int8(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class DynamicInt8(nn.Module):
    """Int8 on a CPU, but each call's inputs are rounded to 8 bits too: the product is one of whole numbers.

    An x86 CPU without VNNI adds pairs of such products in 16 bits, which would overflow: there it is 7 bits.

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
            self.weight = torch.ops.quantized.linear_prepack(tensor, None)
        self.bias = bias
        self.seven_bits = torch.backends.quantized.engine != "qnnpack" and not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        if x.numel() == x.size(-1):  # a single row
            y = torch.ops.quantized.linear_dynamic(x32, self.weight, self.seven_bits)
        else:
            size = x32.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
            y = torch.ops.quantized.linear_dynamic(x32 / size, self.weight, self.seven_bits) * size
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Table(nn.Module):
    """The token table: as the head, laid out like any other weight, and to look rows up in."""

    rows: Tensor  # (V, C)
    scale: Tensor | None  # (V, 1), of int8

    def __init__(self, table: Tensor, quantize: str):
        super().__init__()
        self.dtype, self.head = table.dtype, packed(table, None, quantize)
        self.rows, self.scale = int8(table) if quantize == "int8" else (table, None)
        if isinstance(self.head, Sliced):
            del self.rows  # they are read from the head's layout

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.head, Sliced):
            slices = self.head.slices  # (n, C, V/n)
            return slices[tokens // slices.size(2), :, tokens % slices.size(2)]
        rows = F.embedding(tokens, self.rows)
        return rows if self.scale is None else (rows * F.embedding(tokens, self.scale)).to(self.dtype)


def compile_decoding(model: GPT) -> GPT:
    """Compile the step of one new token, in place; prompts are read as before. It takes up to half a minute, on a GPU for each number of texts.

    Raises InputError where it does not work. torch keeps the code of a few models a process; a further one runs uncompiled.
    """
    print("compiling the step of one token: half a minute the first time, less later", file=sys.stderr, flush=True)
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # one line says enough of a failure
    ends = r"L\['caches'\]\[\d+\]\.end"  # any number of earlier tokens, from the first code on
    try:
        (compile_as_graph if model.wpe.weight.device.type == "cuda" else compile_as_loops)(model.eval())
        cache = model.new_cache(1)
        with torch.inference_mode(), torch.compiler.config.patch(dynamic_sources=ends):  # type: ignore[attr-defined]
            for _ in range(min(3, model.config.block_size)):
                model.head(model.features(torch.tensor([[0]], device=cache.keys.device), cache=cache)[:, -1])
    except Exception as error:  # a missing compiler, one that torch does not know, … raise a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--compile does not work here: {reason}") from error
    return model


def compile_as_loops(model: GPT) -> None:
    """On a CPU: the step of a single text as the compiler's own loops (`row_product`). Several go through F.linear.

    So do a text's first token and the one that fills the block, each of which would be compiled by itself.
    """
    blocks, fast, head, fast_head = model.blocks, torch.compile(model.blocks), model.head, torch.compile(model.head)

    def blocks_of_one(x: Tensor, mask: Tensor | None, caches: Sequence | None) -> Tensor:
        """GPT.blocks: compiled for one new token of one text, else plain."""
        one = caches and x.size(0) * x.size(1) == 1 and 1 < caches[0].end < model.config.block_size
        return (fast if one else blocks)(x, mask, caches)

    def head_of_one(x: Tensor) -> Tensor:
        """GPT.head: compiled for one row, else plain."""
        return fast_head(x.flatten()).view(*x.shape[:-1], -1) if x.numel() == x.size(-1) else head(x)

    model.blocks, model.head = blocks_of_one, head_of_one


def compile_as_graph(model: GPT) -> None:
    """On a GPU: the step of one new token a row as a CUDA graph, for which the cache must lie still: all of it is read, behind a mask."""
    plain, fast = model.blocks, torch.compile(model.blocks, options={"triton.cudagraphs": True})

    def blocks(x: Tensor, mask: Tensor | None, caches: Sequence | None) -> Tensor:
        """GPT.blocks: compiled for one new token a row, else plain."""
        if not caches or x.size(1) > 1:
            return plain(x, mask, caches)
        for cache in caches:
            torch._dynamo.mark_static_address(cache.keys)
            torch._dynamo.mark_static_address(cache.values)
        mask = up_to(caches[0].positions, model.config.block_size)
        return fast(x, mask, [cache._replace(end=model.config.block_size) for cache in caches]).clone()  # out of the graph's memory

    model.blocks = blocks
