"""Decoding beside Hugging Face's generate: tokens per second of the whole call, prompt included, at GPT-2 small's shape.

    python benchmarks/decode.py                      batch 1 and 8, prompts of 64 and 512 tokens, fp32, bf16 and int8
    python benchmarks/decode.py --device cuda        on a GPU
    python benchmarks/decode.py --gguf fp32=F32.gguf bf16=BF16.gguf int8=Q8.gguf       llama.cpp too

hf         transformers' GPT2LMHeadModel.generate, greedy, with its cache
plain      our generate, the weights as they are
nanochat   our generate, the weights packed (packed.py), as sample.py and the server run it
-compiled  with --compile instead, on a CPU from weights as they are: up to half a minute before the first round
llama.cpp  the package llama-cpp-python on files that its convert_hf_to_gguf.py made of a folder of ours of the same shape
           (--outtype f32, bf16, q8_0), greedy; several texts one after another, which is all that its Python API does

All take the same random weights and prompts and make the same number of tokens, in one process, in turn. A noisy
machine then slows all alike; ratios are medians over the rounds of (Hugging Face's seconds) / (ours in the same
round), at the same dtype; int8 is set beside our bf16.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers  # noqa: E402
import record  # noqa: E402

from nanochat import generate, runtime  # noqa: E402
from nanochat.generate import SampleConfig  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.packed import ready  # noqa: E402
from nanochat.runtime import clock  # noqa: E402

VARIANTS = ["hf-fp32", "plain-fp32", "nanochat-fp32", "nanochat-fp32-compiled", "hf-bf16", "plain-bf16", "nanochat-bf16",
            "nanochat-bf16-compiled", "nanochat-int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def main() -> None:
    """Read the flags, run all variants in turn, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a text")
    parser.add_argument("--gguf", nargs="+", metavar="DTYPE=FILE", default=[])
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=VARIANTS, help="default: all that run on the device")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    if args.variants is None:
        args.variants = [name for name in VARIANTS if device.type in ("cpu", "cuda") or "compiled" not in name]
    if not all("=" in gguf for gguf in args.gguf):
        parser.error("--gguf takes DTYPE=FILE, such as fp32=F32.gguf")
    makers = {name: prepare(name, device) for name in args.variants}
    makers |= {f"llama.cpp-{dtype}": of_llama_cpp(file) for dtype, file in (gguf.split("=", 1) for gguf in args.gguf)}
    names = list(makers)
    settings = [(batch, prompt) for batch in args.batch for prompt in args.prompt]
    seconds = {f"batch {batch}, prompt {prompt}": {name: [] for name in names} for batch, prompt in settings}
    with tqdm(total=len(settings) * len(names) * (args.rounds + 1), unit="call") as bar:
        for (batch, prompt), times in zip(settings, seconds.values()):
            prompts = torch.randint(50257, (batch, prompt), generator=torch.Generator().manual_seed(0)).tolist()
            for number in range(args.rounds + 1):  # the first is not counted: kernels are set up, code is compiled
                for name in names:
                    start = clock(device)
                    makers[name](prompts, args.tokens)
                    if number:
                        times[name].append(clock(device) - start)
                    bar.update()
    results = {}
    for (setting, times), (batch, _) in zip(seconds.items(), settings):
        print(setting)
        results[setting] = {}
        for name in names:
            beside = "nanochat-bf16" if "int8" in name else f"hf-{name.split('-')[1]}"
            ratio = median(a / b for a, b in zip(times[beside], times[name])) if beside in times else None
            speed = median(batch * args.tokens / t for t in times[name])
            results[setting][name] = {"tokens_per_second": round(speed, 1), "times": ratio and round(ratio, 2), "beside": beside}
            print(f"  {name:<24}{speed:8.1f} tokens/s" + (f"   {ratio:5.2f} times {beside}" if ratio else ""))
    record.save("decode", device, results, ("torch", "transformers", *["llama-cpp-python"] * bool(args.gguf)))
    first = next(iter(results))
    record.bars("decode", device, f"Decoding, GPT-2 small, {first}", "tokens/s", {n: r["tokens_per_second"] for n, r in results[first].items()})


def prepare(name: str, device: torch.device) -> Callable[[list[list[int]], int], None]:
    """The variant as a function of prompts and the number of new tokens."""
    family, dtype, *compiled = name.split("-")
    torch.manual_seed(0)
    if family == "hf":
        network = peers.gpt2_of_hugging_face(GPTConfig()).to(device, DTYPES[dtype]).eval()
        network.generation_config.eos_token_id = None
        network.generation_config.use_cache = network.config.use_cache = True
        return partial(by_hugging_face, network)
    model = GPT(GPTConfig()).to(device, DTYPES[dtype]).eval().requires_grad_(False)
    if family == "nanochat":
        ready(model, device, DTYPES[dtype], "int8" if dtype == "int8" else "none", bool(compiled))
    return partial(by_ours, model)


def of_llama_cpp(file: str) -> Callable[[list[list[int]], int], None]:
    """llama.cpp with a file of its own, with as many threads as we have."""
    from llama_cpp import Llama
    threads = torch.get_num_threads()
    return partial(by_llama_cpp, Llama(file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False))


def by_llama_cpp(llm, prompts: list[list[int]], tokens: int) -> None:
    """Greedy, one after another."""
    for prompt in prompts:
        llm.reset()
        assert sum(1 for _ in zip(range(tokens), llm.generate(prompt, temp=0))) == tokens


def by_hugging_face(network, prompts: list[list[int]], tokens: int) -> None:
    """Greedy, all of them at once."""
    inputs = torch.tensor(prompts, device=network.device)
    made = network.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, min_new_tokens=tokens,
                            max_new_tokens=tokens, pad_token_id=0)
    assert made.shape == (len(prompts), len(prompts[0]) + tokens)


def by_ours(model: GPT, prompts: list[list[int]], tokens: int) -> None:
    """Greedy, all of them at once."""
    new, _ = generate.generate_ids(model, prompts, SampleConfig(max_new_tokens=tokens, temperature=0))
    assert [len(row) for row in new] == [tokens] * len(prompts)


if __name__ == "__main__":
    runtime.run_as_script(main)
