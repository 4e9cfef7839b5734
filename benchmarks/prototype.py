"""The yardstick of train.py's default: the first prototype, given the same seconds on the same text.

4 layers x 256, 4 heads, own BPE of 16,384, Muon (AdamW for the rest), B=4, T=256, bf16, random
crops, warm-up and cosine to 10 %, the allocator as it is; its rate is the best of 3e-3, 6e-3 and
1.2e-2. Evaluation is train.py's: all held-out titles, fp32.

    python benchmarks/prototype.py --seconds 300
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.wikipedia import prepare  # noqa: E402
from nanochat import corpus, evaluate  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402


def main() -> None:
    """Train for --seconds, then score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of training steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = corpus.prepare(prepare(), Path("out/corpus/prototype"), vocab_size=16384)
    tokenizer = Tokenizer.load(folder)
    train, val = (corpus.TokenStream(folder, split, tokenizer, 256) for split in ("train", "val"))
    stream = torch.cat([train.batch([i]).inputs[0] for i in range(len(train))])
    model = GPT(GPTConfig(tokenizer.vocab_size, 256, n_layer=4, n_head=4, n_embd=256)).train()
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if not (name.startswith("h.") and p.dim() == 2)]
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    seconds, step = 0.0, 0
    with tqdm(total=args.seconds, unit="s") as bar:
        while seconds < args.seconds:
            started = time.perf_counter()
            done = seconds / args.seconds
            factor = min((step + 1) / 30, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
            starts = torch.randint(len(stream) - 257, (4,))
            rows = torch.stack([stream[s : s + 257] for s in starts])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * factor
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            seconds += time.perf_counter() - started
            bar.update(time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    scores = evaluate.score(model, tokenizer, val.batches(4))
    print(f"{step} steps in {seconds:.0f} s, {step * 1024 / len(stream):.2f} epochs: "
          f"{scores['bits_per_byte']:.4f} bits per byte on the held-out titles, fp32")  # fmt: skip


if __name__ == "__main__":
    main()
