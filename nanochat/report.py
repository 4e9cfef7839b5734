"""report.md and report.json: what a fine-tuned model learned from, how good it was before and after, where it still fails."""

import json
from pathlib import Path

import numpy as np

from nanochat import preview
from nanochat.checkpoint import write_json
from nanochat.metrics import picture

LOWER_IS_BETTER = {"loss": "nats per target", "perplexity": "", "perplexity_without_end": "of all but the end tokens", "bits_per_byte": "", "bits_per_character": ""}
HIGHER_IS_BETTER = {"accuracy": "share of targets that were the likeliest", "macro_f1": "mean over the labels"}
OF_REPLIES = {
    "ended": "replies that end by themselves", "median_tokens": "median length, tokens", "distinct": "different replies",
    "empty": "empty replies", "distinct_1": "distinct-1", "distinct_2": "distinct-2", "repetition_4": "repetition of 4-grams",
}


def write(out: Path, content: dict) -> None:
    """Write report.json, report.md and their pictures into `out`.

    content: "settings", "data" (preview.about), "run" (name → figure), "before" and "after" (what a task's `measure`
    gives; "before" may be None), "asked" (prompt → (reply before, reply after)).
    """
    data, after = content["data"], content["after"]
    draw_lengths(data["lengths"], data["block_size"], out / "lengths.png")
    pictures = ["![Tokens of the training examples](lengths.png)", "![Loss](loss.png)"]
    if "confusion" in after:
        draw_confusion(list(after["labels"]), np.array(after["confusion"]), out / "confusion.png")
        pictures.append("![What was taken for what](confusion.png)")
    write_json(out / "report.json", content)
    parts = [
        f"# Report of {out}",
        "## The data",
        code(preview.summary(data)),
        "## The run",
        table([["", ""], *([name, f"{value:,}" if isinstance(value, (int, float)) else value] for name, value in content["run"].items())]),
        "## Before and after, on the test split",
        table(compared(content["before"], after)),
        *(["## Labels", table(by_label(after["labels"]))] if "labels" in after else []),
        "## The same prompts before and after",
        table([["prompt", "before", "after"], *([prompt, *both] for prompt, both in content["asked"].items())]),
        "## Where it still fails",
        *map(failure, after["worst"]),
        "## Pictures",
        *pictures,
        "## Settings",
        code(json.dumps(content["settings"], indent=1, ensure_ascii=False, default=str)),
    ]
    (out / "report.md").write_bytes(("\n\n".join(parts) + "\n").encode("utf-8", "replace"))


def by_label(labels: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row for each label, under a row of titles."""
    return [["label", *next(iter(labels.values()))],
            *([label, *(f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in row.values())] for label, row in labels.items())]


def compared(before: dict | None, after: dict) -> list[list[str]]:
    """A row for each measure that the result has, under a row of titles."""
    rows = [["", "before", "after", ""]]
    for names, better in ((LOWER_IS_BETTER, "lower is better"), (HIGHER_IS_BETTER, "higher is better")):
        rows += [[name.replace("_", " "), *(figure(result, name) for result in (before, after)), f"{about}{', ' * bool(about)}{better}"]
                 for name, about in names.items() if name in after]
    for name, about in OF_REPLIES.items():
        if "replies" in after:
            rows.append([about, *(figure(result and result["replies"], name) for result in (before, after)),
                         f"of {after['replies']['replies']} greedy replies"])
    return rows


def figure(result: dict | None, name: str) -> str:
    """A number of a result as text; "–" where there is none."""
    return "–" if result is None or name not in result else f"{result[name]:.4g}"


def failure(worst: dict) -> str:
    """One of the worst examples: a conversation, or a text that was taken for another label."""
    if "messages" in worst:
        lines = "\n".join(f"{message['role']}: {message['content']}" for message in worst["messages"])
        return f"{worst['loss']:.2f} nats a token:\n\n{code(preview.shortened(lines, 1500))}"
    return f"{worst['label']}, taken for {worst['taken_for']} ({worst['probability']:.0%} sure):\n\n{code(preview.shortened(worst['text'], 600))}"


def code(text: str) -> str:
    """A block that is shown as it is, whatever it contains."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """A Markdown table, its first row the titles."""
    clean = [[" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [clean[0], ["---"] * len(clean[0]), *clean[1:]])


# ------------------------------------------------------------------ pictures


def draw_lengths(lengths: list[int], block_size: int, path: Path) -> None:
    """How long the training examples are, beside the block."""
    with picture(path) as axes:
        edges = 2.0 ** np.arange(np.floor(np.log2(max(min(lengths), 1))), np.ceil(np.log2(max(lengths))) + 1.5, 0.5)
        axes.hist(lengths, bins=edges, color="#1f5fa8", edgecolor="white")
        axes.axvline(block_size, color="#d1495b", label=f"block: {block_size} tokens")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="tokens", ylabel="training examples")
        axes.legend()


def draw_confusion(labels: list[str], counts: np.ndarray, path: Path) -> None:
    """counts[i, j]: texts of label i taken for j; the colour is their share of label i."""
    with picture(path, size=(min(3 + 0.6 * len(labels), 20), min(2.5 + 0.5 * len(labels), 18))) as axes:
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [preview.shortened(label, 30).replace("$", r"\$") for label in labels]  # between dollars would be a formula
        axes.set_xticks(range(len(labels)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), names)
        axes.set(xlabel="taken for", ylabel="label")
        if len(labels) <= 30:
            for i, j in np.ndindex(counts.shape):
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
