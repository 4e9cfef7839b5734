"""Draw the pictures of the tour, from the code that it explains.

    PYTHONPATH=. python docs/tour/pictures.py

No words in them but those of the code, so that they serve every language.
"""

import contextlib
import io
import re
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from nanochat.dialogue import to_rows  # noqa: E402
from nanochat.explore import look  # noqa: E402
from nanochat.model import GPT, IGNORED  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from nanochat.training import learning_rate_factor  # noqa: E402

HERE = Path(__file__).parent
LEARNED, READ, EMPTY = "#5b9bd5", "#d9d9d9", "#f4f4f4"


def lesson() -> tuple[GPT, Tokenizer]:
    """The model that part 1 of the tour trains: its first two blocks, run as they stand."""
    session: dict = {}
    page = (HERE.parent / "tour.md").read_text(encoding="utf-8")
    for code in re.findall(r"<!-- run.*? -->\n```python\n(.*?)```", page, re.DOTALL)[:2]:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, session)
    return session["model"], session["tokenizer"]


def draw_attention() -> None:
    """The causal mask, and what each head of the lesson's model looks at."""
    model, tokenizer = lesson()
    text = "on the bench sits"
    weights = look(model.eval(), tokenizer.encode(text)).weights  # (L, H, T, T)
    maps = {f"h.{i} head {j}": head for i, layer in enumerate(weights) for j, head in enumerate(layer)}
    T = len(text)
    fig, axes = plt.subplots(1, 1 + len(maps), figsize=(10.5, 2.5), layout="constrained")
    for ax, (name, values) in zip(axes, [("mask", torch.ones(T, T).tril()), *maps.items()]):
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9, family="monospace")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(range(T), text.replace(" ", "␣"), fontsize=7, family="monospace")
            axis.set_tick_params(length=0)
    fig.savefig(HERE / "attention.png", dpi=120)


def draw_schedule(max_steps: int = 784, warmup_steps: int = 20) -> None:
    """The share of the peak rate at each step of train.py's run in the README."""
    fig, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
    ax.plot([learning_rate_factor(step, max_steps, warmup_steps) for step in range(max_steps)], color=LEARNED)
    ax.set_xlabel("step", family="monospace")
    ax.set_ylabel("lr / peak_lr", family="monospace")
    ax.set_xticks([warmup_steps, 200, 400, 600, max_steps])
    ax.grid(alpha=0.3)
    fig.savefig(HERE / "schedule.png", dpi=100)


def draw_formats() -> None:
    """Bits of the three types: sign, exponent, fraction."""
    fig, ax = plt.subplots(figsize=(8, 1.8), layout="constrained")
    for y, (name, exponent, fraction) in enumerate((("float16", 5, 10), ("bfloat16", 8, 7), ("float32", 8, 23))):
        for bit in range(1 + exponent + fraction):
            letter, colour = ("s", READ) if bit == 0 else ("e", "#f4b183") if bit <= exponent else ("f", LEARNED)
            ax.add_patch(plt.Rectangle((bit, y), 0.92, 0.8, color=colour))
            ax.text(bit + 0.46, y + 0.38, letter, ha="center", va="center", fontsize=8, family="monospace")
        ax.text(-0.4, y + 0.38, name, ha="right", va="center", fontsize=9, family="monospace")
    ax.set(xlim=(-5, 32.2), ylim=(-0.1, 3))
    ax.axis("off")
    fig.savefig(HERE / "formats.png", dpi=100)


def draw_mask() -> None:
    """Inputs and targets of a conversation, as training gets them."""
    tokenizer = Tokenizer([]).for_chat()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    batch = to_rows([messages], tokenizer, block_size=16).batch([0])
    count = int(batch.segments.bool().sum()) + 2  # and two places of padding
    fig, ax = plt.subplots(figsize=(12, 1.5), layout="constrained")
    for y, (name, row) in enumerate((("targets", batch.targets[0]), ("inputs", batch.inputs[0]))):
        ax.text(-0.2, y + 0.4, name, ha="right", va="center", fontsize=9, family="monospace")
        for t in range(count):
            padding = not batch.segments[0, t]
            ignored = row[t] == IGNORED
            colour = EMPTY if padding else READ if ignored or name == "inputs" else LEARNED
            label = str(IGNORED) if ignored else "0" if padding else tokenizer.decode([int(row[t])])
            ax.add_patch(plt.Rectangle((t, y), 0.95, 0.8, color=colour))
            ax.text(t + 0.47, y + 0.4, label.replace("<|endoftext|>", "<|endof\ntext|>").replace("<|assistant|>", "<|assis\ntant|>"),
                    ha="center", va="center", fontsize=7 if len(label) > 4 else 10, family="monospace")
    ax.set(xlim=(-1.2, count), ylim=(-0.1, 1.9))
    ax.axis("off")
    fig.savefig(HERE / "mask.png", dpi=100)


if __name__ == "__main__":
    draw_attention()
    draw_schedule()
    draw_formats()
    draw_mask()
