"""Decoding beside Hugging Face's generate: tokens per second of the whole call, prompt included, at GPT-2 small's shape.

    python benchmarks/decode.py                      batch 1 and 8, prompts of 64 and 512 tokens, fp32, bf16 and int8
    python benchmarks/decode.py --compile            the compiled variant too (half a minute before the first token)

hf         transformers' GPT2LMHeadModel.generate, greedy, with its cache
plain      our generate, the weights as they are
nanochat   our generate, the weights packed (packed.py), as sample.py and the server run it

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
from nanochat.packed import compile_decoding, pack  # noqa: E402
from nanochat.runtime import clock  # noqa: E402

VARIANTS = ["hf-fp32", "plain-fp32", "nanochat-fp32", "hf-bf16", "plain-bf16", "nanochat-bf16", "nanochat-int8"]
COMPILED = ["nanochat-bf16-compiled"]  # on a CPU float32 gains nothing: the packed weights are read as fast as memory allows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def main() -> None:
    """Read the flags, run all variants in turn, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a text")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=VARIANTS + COMPILED)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    names = args.variants or VARIANTS + (COMPILED if args.compile else [])
    makers = {name: prepare(name, device) for name in names}
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
            beside = "nanochat-bf16" if name == "nanochat-int8" else f"hf-{name.split('-')[1]}"
            ratio = median(a / b for a, b in zip(times[beside], times[name])) if beside in times else None
            speed = median(batch * args.tokens / t for t in times[name])
            results[setting][name] = {"tokens_per_second": round(speed, 1), "times": ratio and round(ratio, 2), "beside": beside}
            print(f"  {name:<24}{speed:8.1f} tokens/s" + (f"   {ratio:5.2f} times {beside}" if ratio else ""))
    record.save("decode", device, results)
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
    if compiled:
        compile_decoding(model)
    elif family == "nanochat":
        pack(model, "int8" if dtype == "int8" else "none")
    return partial(by_ours, model)


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
