"""One training step (forward, backward, clipping, AdamW, zero_grad) beside plain PyTorch and Hugging Face.

    python benchmarks/train_step.py --shape 124M             GPT-2 small; also 6x384 and default (train.py's)
    python benchmarks/train_step.py --shape 124M --memory    peak memory of a step, each variant in its own process

plain      our GPT as nanoGPT would run it: F.scaled_dot_product_attention, all logits at once, one cross-entropy
hf         transformers' GPT2LMHeadModel with its own loss, dropouts 0 (it predicts T - 1 of T tokens)
nanochat   model(inputs, targets) as training.py calls it; compiled by rehearsal.compiled, as --compile does

All take the same random tokens and the same optimizer, in one process, in turn: variant A, B, C, …, A, B, C, …
A noisy machine then slows all alike; ratios are medians over the rounds of (reference's seconds) /
(variant's seconds in the same round). fp32 is without TF32. The share of peak is 3 · forward_flops
over the FLOP/s that a large square product of the same type reached between the steps.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers  # noqa: E402
import record  # noqa: E402

from nanochat import InputError, rehearsal, runtime  # noqa: E402
from nanochat.model import GPT, Batch, GPTConfig, forward_flops  # noqa: E402
from nanochat.runtime import clock  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {"plain": "plain PyTorch", "hf": "Hugging Face", "nanochat": "nanochat"}
SHAPES = {  # the network, then rows and tokens of a step on a CPU and on a GPU
    "124M": (dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768), {"cpu": (2, 512), "cuda": (32, 1024)}),
    "6x384": (dict(vocab_size=512, n_layer=6, n_head=6, n_embd=384), {"cpu": (16, 256), "cuda": (16, 256)}),
    "default": (dict(vocab_size=8192, n_layer=4, n_head=4, n_embd=256), {"cpu": (8, 256), "cuda": (8, 256)}),
}
VARIANTS = ["plain-fp32", "plain-bf16", "plain-bf16-compiled", "hf-fp32", "hf-fp32-compiled", "hf-bf16", "hf-bf16-compiled",
            "nanochat-fp32", "nanochat-fp32-compiled", "nanochat-bf16", "nanochat-bf16-compiled"]
ON_CUDA = ["nanochat-fp16", "nanochat-fp16-compiled"]
OF_MEMORY = ["hf-bf16", "hf-bf16-compiled", "nanochat-bf16", "nanochat-bf16-compiled", "nanochat-bf16-recompute"]
WARM_UP = 3  # rounds that are not counted
RATE = 1e-4


def main() -> None:
    """Read the flags; time, or measure memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--batch-size", type=int, help="rows a step")
    parser.add_argument("--tokens", type=int, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant that count, at least 2")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS + ON_CUDA)}; for memory also nanochat-bf16-recompute")
    parser.add_argument("--reference", default="plain-fp32", metavar="NAME", help="the variant that the others are divided by")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-kept-memory", action="store_true", help="leave the CPU's allocator, glibc, as it is")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the peak of one variant, here and now
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    known = VARIANTS + ON_CUDA + (["nanochat-bf16-recompute"] if args.memory or args.one else [])
    if unknown := set(args.variants or []) - set(known):
        raise InputError(f"--variants: {', '.join(unknown)}: must be of {', '.join(known)}")
    if args.rounds < 2:
        raise InputError(f"--rounds is {args.rounds}, must be at least 2")
    sizes, steps = SHAPES[args.shape]
    rows, tokens = (4, 1024) if args.memory else steps[device.type]
    args.batch_size, args.tokens = args.batch_size or rows, args.tokens or tokens
    if not (args.memory or args.no_kept_memory):  # with --memory each process decides
        runtime.keep_freed_memory()
    config = GPTConfig(block_size=args.tokens, **sizes)
    if args.one:
        print(json.dumps(peak_memory(args.variants[0], config, args.batch_size, device)))
    elif args.memory:
        compare_memory(args, device)
    else:
        compare_time(args, config, device)


# ------------------------------------------------------------------ the variants


class Variants:
    """Steps by name; `plain` and `nanochat` share one network and optimizer, the `hf` ones another: memory is bounded."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(0)
        tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.models: dict[bool, tuple] = {}  # whether it is Hugging Face's: (network, optimizer)

    def model(self, hugging_face: bool) -> tuple:
        """(network, optimizer), made at the first call and the same ones from then on."""
        if hugging_face not in self.models:
            torch.manual_seed(0)
            build = peers.gpt2_of_hugging_face if hugging_face else GPT
            model = build(self.config).to(self.device).train()
            self.models[hugging_face] = model, peers.adamw(model, RATE)
        return self.models[hugging_face]

    def step(self, name: str) -> Callable[[], float]:
        """The function that takes a step of the variant, compiled where it is to be, and gives its seconds."""
        family, short, *rest = name.split("-")
        dtype = DTYPES[short]
        compiling = "compiled" in rest
        model, optimizer = self.model(family == "hf")
        inputs, targets, _ = self.batch
        if "recompute" in rest:
            model.recompute = True
        network = model
        if compiling and family == "hf":
            network = torch.compile(model)
        elif compiling and family == "nanochat":
            network = rehearsal.compiled(model, optimizer, self.batch, dtype)
            if network is model:
                raise InputError(f"{name}: it did not compile (above)")
            for group in optimizer.param_groups:
                group["lr"] = RATE  # the trial step above took it away
        losses = {
            "plain": partial(with_fused_attention, torch.compile(all_at_once) if compiling else all_at_once, model, inputs, targets),
            "hf": lambda: network(input_ids=inputs, labels=inputs, use_cache=False).loss,
            "nanochat": lambda: network(*self.batch) / targets.numel(),
        }
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        return partial(one_step, losses[family], model, optimizer, scaler, self.device, dtype)


def one_step(loss_of, model, optimizer, scaler, device: torch.device, dtype: torch.dtype) -> float:
    """→ seconds. The loss does not outlive it, so that no step holds the memory of the one before."""
    start = clock(device)
    with runtime.autocast(device, dtype):
        loss = loss_of()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return clock(device) - start


def all_at_once(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss as nanoGPT computes it, while the fused kernel stands in for our attention."""
    logits = model.head(model.features(inputs))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def with_fused_attention(loss_of: Callable, *arguments) -> torch.Tensor:
    """loss_of(*arguments), attention by the fused kernel."""
    with patch("nanochat.model.attention", peers.fused_attention):
        return loss_of(*arguments)


def label(name: str) -> str:
    """The name of a variant, for people."""
    family, *rest = name.split("-")
    return " ".join([FAMILIES[family], *rest])


# ------------------------------------------------------------------ time


def compare_time(args: argparse.Namespace, config: GPTConfig, device: torch.device) -> None:
    """Steps of all variants in turn: a table, a file of results and a picture."""
    names = args.variants or VARIANTS + ON_CUDA * (device.type == "cuda")
    reference = args.reference if args.reference in names else names[0]
    kept = device.type == "cpu" and not args.no_kept_memory
    tokens = args.batch_size * args.tokens
    print(f"{args.shape}: {args.batch_size} rows of {args.tokens} tokens, {device}, {torch.get_num_threads()} threads, "
          f"{'freed memory is kept (runtime.keep_freed_memory), for all' if kept else 'the allocator as it is'}")

    variants = Variants(config, args.batch_size, device)
    steps, seconds = {}, {name: [] for name in names}
    for name in tqdm(names, "compiling and warming up", unit="variant", mininterval=0):
        steps[name] = variants.step(name)
        for _ in range(WARM_UP):
            steps[name]()
    size = 8192 if device.type == "cuda" else 2048
    products = {short: partial(product, *torch.randn(2, size, size, device=device).to(DTYPES[short]))
                for short in sorted({name.split("-")[1] for name in names})}
    flops = {short: [] for short in products}
    for multiply in products.values():
        multiply()
    with tqdm(total=args.rounds * len(names), unit="step", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for _ in range(args.rounds):
            for name in names:
                bar.set_description(name, refresh=False)
                seconds[name].append(steps[name]())
                bar.update()
            for short, multiply in products.items():
                flops[short].append(2 * size**3 / multiply())

    peak = {short: median(values) for short, values in flops.items()}
    variants = {}
    for name in names:
        ratios = [r / s for r, s in zip(seconds[reference], seconds[name])]
        speed = tokens / median(seconds[name])
        variants[label(name)] = {
            "milliseconds": 1000 * median(seconds[name]),
            "tokens_per_second": speed,
            "times_reference": median(ratios),
            "quartiles": quantiles(ratios, n=4)[::2],
            "share_of_peak": 3 * forward_flops(config) * speed / peak[name.split("-")[1]],
            "seconds": [round(s, 6) for s in seconds[name]],
        }
    print("matrix products: " + ", ".join(f"{value / 1e12:.3g} TFLOP/s in {short}" for short, value in peak.items()))
    table([["", "ms a step", "tokens/s", "times " + label(reference), "quartiles", "of peak"]] + [
        [name, f"{v['milliseconds']:,.1f}", f"{v['tokens_per_second']:,.0f}", f"{v['times_reference']:.2f}",
         "{:.2f} to {:.2f}".format(*v["quartiles"]), f"{v['share_of_peak']:.0%}"] for name, v in variants.items()])
    record.save(f"train_step-{args.shape}", device, {
        "shape": args.shape, "batch_size": args.batch_size, "tokens": args.tokens, "rounds": args.rounds, "kept_memory": kept,
        "reference": label(reference), "product_flops": peak, "variants": variants,
    })
    record.bars(f"train_step-{args.shape}", device, f"Training step, {args.shape}, {args.batch_size} x {args.tokens} tokens",
                "tokens per second", {name: v["tokens_per_second"] for name, v in variants.items()})


def product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of a @ b."""
    start = clock(a.device)
    a @ b
    return clock(a.device) - start


def table(lines: list[list[str]]) -> None:
    """Aligned columns: names to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(rest, widths[1:])]))


# ------------------------------------------------------------------ memory


def compare_memory(args: argparse.Namespace, device: torch.device) -> None:
    """The peak of each variant, in a process of its own: a table, a file of results and a picture."""
    names = args.variants or OF_MEMORY
    settings = [False, True] if device.type == "cpu" else [False]  # whether freed memory is kept: glibc's, so a CPU's
    here = ["--shape", args.shape, "--batch-size", str(args.batch_size), "--tokens", str(args.tokens), "--device", str(device)]
    found: dict[tuple[str, bool], dict] = {}
    with tqdm(total=len(names) * len(settings), unit="process", mininterval=0) as bar:
        for name in names:
            for keep in settings:
                bar.set_description(f"{name}{', kept' * keep}")
                flags = ["--one", "--variants", name, *here, *["--no-kept-memory"] * (not keep)]
                done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise InputError(f"{name}: exit code {done.returncode} (its words are above)")
                found[name, keep] = json.loads(done.stdout.splitlines()[-1])
                bar.update()
    base = "hf-bf16" if "hf-bf16" in names else names[0]
    results = {
        label(name) + ", kept memory" * keep: peaks | {
            "of_same_allocator": peaks["gb"] / found[base, keep]["gb"],
            "of_default_allocator": peaks["gb"] / found[base, False]["gb"],
        } for (name, keep), peaks in found.items()
    }
    print(f"{args.shape}, {args.batch_size} rows of {args.tokens} tokens: peak memory of 3 steps, {device}")
    table([["", "GB", "GB before", f"of {label(base)}, same allocator", "its default allocator"]] + [
        [name, f"{r['gb']:.2f}", f"{r['gb_before']:.2f}", f"{r['of_same_allocator']:.2f}", f"{r['of_default_allocator']:.2f}"]
        for name, r in results.items()])
    record.save(f"memory-{args.shape}", device, {
        "shape": args.shape, "batch_size": args.batch_size, "tokens": args.tokens, "base": label(base), "variants": results})
    title = f"Peak memory of a training step, {args.shape}, {args.batch_size} x {args.tokens} tokens"
    record.bars(f"memory-{args.shape}", device, title, "GB", {name: r["gb"] for name, r in results.items()})


def peak_memory(name: str, config: GPTConfig, batch_size: int, device: torch.device) -> dict[str, float]:
    """Peak of this process in three steps, compiling included; gb_before: what its imports took."""
    variants = Variants(config, batch_size, device)
    if name.startswith("hf"):
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    before = memory_peak(device)
    step = variants.step(name)
    for _ in range(3):
        step()
    return {"gb": memory_peak(device) / 1e9, "gb_before": before / 1e9}


def memory_peak(device: torch.device) -> int:
    """Bytes. Of a CPU: VmHWM of this process; getrusage's ru_maxrss begins at its parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    runtime.run_as_script(main)
