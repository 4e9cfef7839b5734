"""Which GPT-2 fits which card, by which method of finetune.py: counted, not measured.

    python benchmarks/card_memory.py              prints the table; a CPU will do, in minutes
    python benchmarks/card_memory.py --check      on a GPU: real steps of each row, and what they allocate, beside

One row of 1,024 tokens a micro-step (--batch-size 1; --accumulate costs no more), bf16 autocast, AdamW. In bytes:

weights         4 a parameter (fp32), and 12 for each that learns: its gradient and AdamW's two averages
forward         what it keeps for its backward, with the bf16 copies of matrices: rehearsal.kept_for_backward counts it
                here for two layers and for three, and each more keeps as much as the third. A GPU keeps the same: at
                this length attention is fused on both. Dropout, which GPT-2's files ask for, adds a byte an element
backward        the gradient of fp32 logits, twice; and the token table's, where it learns, until its two uses are added
--recompute     keeps the input of each block; one block is made again at a time, and its gradients are as large;
                autocast holds its copies of what learns until the forward ends

To the sum come a tenth, for what the allocator rounds up and cannot reuse, and 0.5 GiB for the CUDA context; a desktop
takes more. A card's gigabytes are GiB. The rows of chat tokens learn in every method, so that even --method freeze
sends gradients through all blocks, and keeps what they need.
"""

import argparse
import sys
from functools import cache
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanochat import lora, rehearsal, runtime  # noqa: E402
from nanochat.lora import LoRAConfig  # noqa: E402
from nanochat.model import GPT, GPT2_SIZES, GPTConfig  # noqa: E402
from nanochat.tokenizer import CHAT_TOKENS  # noqa: E402
from nanochat.training import TrainConfig, build_optimizer  # noqa: E402

CARDS, CONTEXT, SLACK, GIB = (8, 12, 16, 24), 0.5, 1.1, 2**30
T = 1024  # tokens of a row
METHODS = {"full": "all weights", "lora": "LoRA, rank 16", "freeze": "the last two blocks"}


def main() -> None:
    """Count every row; with --check also measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=GPT2_SIZES, default=list(GPT2_SIZES), help="default: all")
    parser.add_argument("--check", action="store_true", help="run steps of each on the GPU: GiB counted and allocated")
    args = parser.parse_args()
    if args.check:
        runtime.pick_device("cuda")  # or one line that says that there is none
        print("| | what learns | `--recompute` | counted, GiB | allocated, GiB |\n|---|---|---|---|---|")
        for size, method, recompute in product(args.sizes, METHODS, (False, True)):
            counted, allocated = bytes_of_a_step(size, method, recompute) / GIB, measured(size, method, recompute)
            print(f"| {size} | {METHODS[method]} | {'yes' if recompute else 'no'} | {counted:.2f} | {allocated} |")
        return
    print("| | what learns | GiB | with `--recompute` | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for size, method in product(args.sizes, METHODS):
        plain, recomputed = (CONTEXT + SLACK * bytes_of_a_step(size, method, recompute) / GIB
                             for recompute in (False, True))
        fits = ["yes" if plain <= card else "`--recompute`" if recomputed <= card else "–" for card in CARDS]
        print(f"| {size} | {METHODS[method]} | {plain:.1f} | {recomputed:.1f} | " + " | ".join(fits) + " |", flush=True)


def build(size: str, method: str, n_layer: int | None = None, dropout: float = 0.0) -> GPT:
    """A model of that width as finetune.py prepares it, on the default device."""
    layers, heads, width = GPT2_SIZES[size]
    model = GPT(GPTConfig(50257 + len(CHAT_TOKENS), 1024, n_layer or layers, heads, width, dropout, dropout))
    if method == "lora":
        lora.add_lora(model, LoRAConfig(rank=16, alpha=32), len(CHAT_TOKENS))
    elif method == "freeze":
        lora.freeze(model, ("2",), len(CHAT_TOKENS))
    return model


def bytes_of_a_step(size: str, method: str, recompute: bool) -> float:
    """The most that tensors take at once."""
    with torch.device("meta"):
        model = build(size, method)
    V, C, n_layer = model.config.vocab_size, model.config.n_embd, model.config.n_layer
    logits, table, copies = 8 * V * T, 4 * V * C * (method == "full"), 0
    kept, a_block = kept_by_forward(size, method, n_layer, False)
    if recompute:
        kept, _ = kept_by_forward(size, method, n_layer, True)
        logits = max(logits, 2 * a_block)  # not at the same time
        copies = 2 * 12 * C * C * {"full": n_layer, "lora": 0, "freeze": 2}[method]  # a block has 12 C² weights
    else:
        kept += (2 * n_layer + 1) * T * C  # masks of dropout
    weights = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
    return weights + kept + max(logits + table, copies + 6 * V * T)  # a forward ends with logits in bf16 and fp32


@cache
def kept_by_forward(size: str, method: str, n_layer: int, recompute: bool) -> tuple[float, float]:
    """Bytes that a forward pass of one row keeps, of n_layer layers; and what each layer adds."""
    few = {}
    for layers in (2, 3):
        with torch.device("meta"):  # random weights would take longer to draw than all else
            model = build(size, method, layers)
        model.to_empty(device="cpu").apply(lambda part: [p.detach().zero_() for p in part.parameters(recurse=False)])
        model.recompute = recompute
        few[layers] = rehearsal.kept_for_backward(model, 1, T, torch.bfloat16)
    return few[2] + (n_layer - 2) * (few[3] - few[2]), few[3] - few[2]


def measured(size: str, method: str, recompute: bool) -> str:
    """GiB that a real step allocated at most, its gradients kept from an earlier micro-step; or that it did not fit."""
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.device("cuda"):
            model = build(size, method, dropout=0.1).train()
        model.recompute = recompute
        optimizer = build_optimizer(model, TrainConfig(optimizer="adamw"))
        tokens = torch.randint(model.config.vocab_size, (2, T), device="cuda")
        for _ in range(2):  # AdamW's averages are there from the second step on
            for _ in range(2):  # and gradients from the second micro-step on
                with runtime.autocast(tokens.device, torch.bfloat16):
                    loss = model(tokens[:1], tokens[1:])
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
    except Exception as error:
        if not runtime.out_of_memory(error):
            raise
        return "does not fit"


if __name__ == "__main__":
    runtime.run_as_script(main)
