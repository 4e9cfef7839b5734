"""Look before you train: what will be learned, in colour; how long the texts are; which held-out ones were seen in training.

`about_conversations` and `about_texts` count, `summary` says it in lines, `show_row` prints a row as the model gets it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from nanochat import splits
from nanochat.classifier import Labelled
from nanochat.formats import Conversation
from nanochat.rows import Rows, Window
from nanochat.tokenizer import ROLES, Tokenizer

BAR = 40  # characters of the longest bar of the histogram


def about_conversations(train: list[Conversation], tokenizer: Tokenizer) -> dict:
    """Messages and tokens of each role, and the tokens of each conversation, of the training split."""
    messages = [message for conversation in train for message in conversation]
    sizes = list(map(len, tokenizer.encode_batch([message["content"] for message in messages])))
    kinds = {role: {"messages": 0, "tokens": 0} for role in ROLES}
    for message, size in zip(messages, sizes):
        kinds[message["role"]]["messages"] += 1
        kinds[message["role"]]["tokens"] += size
    following = iter(sizes)
    lengths = [1 + sum(2 + next(following) for _ in conversation) for conversation in train]  # with the control tokens
    return {"roles": {role: counts for role, counts in kinds.items() if counts["messages"]}, "lengths": lengths}


def about_texts(train: list[Labelled], tokenizer: Tokenizer) -> dict:
    """Texts of each label, and the tokens of each text, of the training split."""
    lengths = [2 + len(ids) for ids in tokenizer.encode_batch([text for text, _ in train])]
    return {"labels": dict(Counter(label for _, label in train).most_common()), "lengths": lengths}


def about(parts: dict[str, list], text: Callable[[Any], str], rows: Rows, counted: dict) -> dict:
    """All that `summary` says, ready for report.json. parts: name → examples, of which the first is the training split."""
    (_, train), *others = parts.items()
    texts = list(map(text, train))
    return {
        "examples": {name: len(examples) for name, examples in parts.items()},
        "different": len(set(texts)),
        "seen_in_training": {name: splits.seen_in_training(texts, list(map(text, examples))) for name, examples in others},
        "supervised_tokens": rows.supervised_tokens,
        "input_tokens": rows.input_tokens,
        "windows": sum(map(len, rows.rows)),
        "rows": len(rows),
        "block_size": rows.block_size,
        "cut": str(rows.cuts),
        **counted,
    }


def summary(found: dict) -> str:
    """What `about` found, in lines for a terminal."""
    (first, count), *others = found["examples"].items()
    learned, tokens = found["supervised_tokens"], found["input_tokens"]
    lines = [
        f"{count:,} {first}, {', '.join(f'{n:,} {name}' for name, n in others)}"
        + (f"; {count - found['different']:,} of the {first} ones are repeated" if found["different"] < count else ""),
        *(f"of the {name} ones, {exact:,} are also among the {first} ones word for word, {near:,} nearly so"
          for name, (exact, near) in found["seen_in_training"].items()),
        f"{learned:,} of {tokens:,} {first} tokens are learned from ({learned / max(tokens, 1):.1%})",
        f"{found['windows']:,} windows in {found['rows']:,} rows of up to {found['block_size']:,} tokens, "
        f"{tokens / max(found['rows'] * found['block_size'], 1):.0%} full; {found['cut']}",
    ]
    for role, counts in found.get("roles", {}).items():
        lines.append(f"{role}: {counts['messages']:,} messages, {counts['tokens'] / counts['messages']:.1f} tokens each")
    for label, number in list(found.get("labels", {}).items())[:20]:
        lines.append(f"label {label}: {number:,} texts, {number / count:.1%}")
    if len(found.get("labels", {})) > 20:
        lines.append(f"… and {len(found['labels']) - 20:,} labels more, of fewer texts each")
    return "\n".join([*lines, "tokens of each:", *histogram(found["lengths"])])


def histogram(lengths: Sequence[int]) -> list[str]:
    """A line for each doubling of the length: how many are so long."""
    counts = Counter(max(length - 1, 0).bit_length() for length in lengths)
    most = max(counts.values(), default=1)
    return [f"{2 ** (size - 1) + 1 if size else 0:>9,} – {2**size:>7,} {'█' * -(-counts[size] * BAR // most)} {counts[size]:,}"
            for size in range(min(counts, default=0), max(counts, default=-1) + 1)]


def show_row(row: list[Window], tokenizer: Tokenizer, labels: Sequence[str] | None, marks: tuple[str, str]) -> str:
    """The windows that share a row, a line between them, what is learned between `marks`; of a classifier, the label."""
    shown = []
    for window in row:
        ids, supervised = (window.ids[:-1], window.supervised[:-1]) if labels else (window.ids, window.supervised)
        for learned, run in groupby(zip(ids, supervised), key=lambda pair: pair[1]):
            text = tokenizer.decode(token for token, _ in run)
            shown.append(marks[0] + text + marks[1] if learned else text)
        if labels:
            shown.append(f" → {marks[0]}{labels[window.ids[-1]]}{marks[1]}")
        shown.append("\n")
    return "".join(shown)


def shortened(text: str, limit: int = 200) -> str:
    """As much of a text as is shown."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
