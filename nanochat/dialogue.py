"""Conversations: file formats → one template with its loss mask → windows → packed rows.

A conversation is a list of {"role", "content"} messages. `render_turn` turns one into ids and, in
the same pass, into the mask of what is learned: assistant text and its <|end|>, nothing else.
Training (`windows`) and chat (`render_prompt`) both join such turns, so a chat prompt is an exact
prefix of what was trained.

    <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello.<|end|> <|user|>…
                                                 ~~~~~~~~~~~~~ supervised

A conversation longer than the block becomes windows in which each reply is supervised exactly
once; several short windows share a row, kept apart by their segment numbers.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch

from nanochat import InputError
from nanochat.model import IGNORED, Batch
from nanochat.tokenizer import END_OF_TURN, ROLES, Tokenizer, not_utf8

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Conversation = list[Message]


def render(messages: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A whole conversation → (ids, supervised), of equal length: <|endoftext|>, then its turns."""
    ids, supervised = [tokenizer.end_of_text], [False]
    for message in messages:
        turn, mask = render_turn(message, tokenizer)
        ids += turn
        supervised += mask
    return ids, supervised


def render_turn(message: Message, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """One message → (ids, supervised): its role token, its text, <|end|>. THE chat template.

    supervised[i] says whether id i is a target: the assistant's text and the <|end|> after it.
    """
    role = tokenizer.control[f"<|{message['role']}|>"]
    said = [*tokenizer.encode(message["content"]), tokenizer.control[END_OF_TURN]]
    return [role, *said], [False] + [message["role"] == "assistant"] * len(said)


def render_prompt(messages: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant speaks: `render`, then the assistant's role token."""
    return render(messages, tokenizer)[0] + [tokenizer.control["<|assistant|>"]]


# ---------------------------------------------------------------------------- files


def read(path: Path) -> tuple[list[Conversation], list[str]]:
    """Conversations of a file, and one line "file:line: reason" for each record left out.

    .jsonl or .json: one record a line, or one array of records, each either
        {"messages": [{"role", "content"}, …]}          as OpenAI's fine-tuning takes it
        {"conversations": [{"from", "value"}, …]}       ShareGPT: human, gpt, system
    .txt: conversations between blank lines; each line a turn, the user first.

    Raises InputError if the file is empty, is not UTF-8, or has no usable conversation.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    if "\0" in text:
        raise InputError(f"{path}: has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8")
    records = _read_blocks(text) if path.suffix.lower() == ".txt" else _read_json(text)
    conversations, problems = [], []
    for line, record in records:
        try:
            conversations.append(normalise(record))
        except InputError as error:
            problems.append(f"{path}:{line}: {error}")
    if not conversations:
        reason = problems[0] if problems else f"{path}: empty"
        raise InputError(f"{reason} (no usable conversation in the file)")
    return conversations, problems


def _read_json(text: str) -> Iterator[tuple[int, object]]:
    """(line number, record) pairs; a record that is not JSON becomes the error that it is."""
    if text.lstrip().startswith("["):  # one array: the n-th record is all that can be named
        line, records = _parse(text)
        yield from enumerate(records, start=1) if isinstance(records, list) else [(line, records)]
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line)[1]


def _parse(text: str) -> tuple[int, object]:
    """(line of the error if there is one, the JSON value or the error)."""
    try:
        return 1, json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno, InputError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return 1, InputError(f"not JSON: {error}")


def _read_blocks(text: str) -> Iterator[tuple[int, object]]:
    """Plain text: blank lines between conversations, speakers take turns, the user begins."""
    start, block = 1, []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            block.append(line.strip())
        else:
            if block:
                turns = zip(("user", "assistant") * len(block), block)
                yield start, {"messages": [{"role": r, "content": c} for r, c in turns]}
            start, block = number + 1, []


SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system"}


def normalise(record: object) -> Conversation:
    """One record of a file → its conversation; InputError says what is wrong with it.

    Consecutive messages of one role are joined by a newline. A usable conversation has a reply
    and, if it has a system message, has it first.
    """
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict):
        raise InputError(f"a record is {type(record).__name__}, must be an object with messages")
    if "conversations" in record:
        turns, role_key, text_key, names = record["conversations"], "from", "value", SHAREGPT_ROLES
    elif "messages" in record:
        turns, role_key, text_key, names = record["messages"], "role", "content", {r: r for r in ROLES}
    else:
        raise InputError(f'keys are {reprlib.repr(list(record))}, must have "messages" or "conversations"')
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError("messages must be a list of objects")
    messages: Conversation = []
    for turn in turns:
        role, content = turn.get(role_key), turn.get(text_key)
        if role not in list(names):  # in a list: a role of the wrong type has no hash
            raise InputError(f"role {reprlib.repr(role)}, must be one of {list(names)}")
        if not isinstance(content, str):
            raise InputError(f"{text_key} of a {role} message is {type(content).__name__}, must be text")
        if messages and messages[-1]["role"] == names[role]:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": names[role], "content": content})
    if any(message["role"] == "system" for message in messages[1:]):
        raise InputError("a system message must be the first one")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise InputError("no assistant message, so nothing to learn from")
    return messages


def split(conversations: list[Conversation], shares: Sequence[float] = (0.9, 0.05, 0.05)) -> list[list[Conversation]]:
    """Train, validation and test conversations, by a hash of their text.

    The hash, not the place in the file, decides: equal conversations fall on the same side, and
    adding some moves none. Sets are therefore near their shares, not exactly at them.
    """
    parts: list[list[Conversation]] = [[] for _ in shares]
    for conversation in conversations:
        text = json.dumps(conversation, ensure_ascii=False, sort_keys=True)
        draw = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
        for part, share in zip(parts, shares):
            if draw < share or part is parts[-1]:
                part.append(conversation)
                break
            draw -= share
    return parts


# ---------------------------------------------------------------------------- windows and rows


@dataclass
class Window:
    """A piece of a conversation that fits the block."""

    ids: list[int]  # at most block_size + 1: each id but the last is an input, each but the first a target
    supervised: list[bool]


@dataclass
class Cuts:
    """What did not fit and was shortened; nothing is cut silently."""

    replies: int = 0  # longer than the block: prompt and end are lost, and no <|end|> is invented
    prompts: int = 0  # the message before a reply, of which only the newest part fits
    systems: int = 0  # a system text over half the block: only its beginning is kept

    def __str__(self) -> str:
        return f"{self.replies} replies, {self.prompts} prompts, {self.systems} system texts cut to fit the block"


def windows(messages: Conversation, tokenizer: Tokenizer, block_size: int, cuts: Cuts) -> Iterator[Window]:
    """Turns of a conversation, in windows in which each reply is supervised exactly once.

    A conversation that fits is one window. Of a longer one, the first window takes the turns
    that fit; each later one takes new turns up to 3/4 of the block (at least to the next reply)
    and fills the rest with the turns before them, as context without loss. <|endoftext|> and
    the system text begin every window. Turns stay whole, but for those that `cuts` counts.
    """
    head = [tokenizer.end_of_text]
    turns = [render_turn(message, tokenizer) for message in messages]
    if messages[0]["role"] == "system":
        system = turns.pop(0)[0]
        if len(system) > block_size // 2:
            system = system[: block_size // 2 - 1] + system[-1:]
            cuts.systems += 1
        head += system
    room = block_size + 1 - len(head)
    before = [0, *accumulate(len(ids) for ids, _ in turns)]  # before[i]: tokens of turns[:i]
    reply_ends = [i + 1 for i, (_, mask) in enumerate(turns) if any(mask)]

    done = 0  # turns[:done] have been learned from
    while remaining := [end for end in reply_ends if end > done]:
        limit = before[done] + (room if done == 0 else room * 3 // 4)
        end = max((end for end in remaining if before[end] <= limit), default=remaining[0])
        start = next(i for i in range(end + 1) if before[end] - before[i] <= room)
        if start < done and any(turns[start][1]):
            start += 1  # context begins with the user, as a chat does
        context: list[int] = []
        if start == end:  # the reply alone is longer than the block: its beginning
            start, cuts.replies = end - 1, cuts.replies + 1
        elif 0 < start == end - 1:  # the prompt of the reply does not fit: its newest part
            prompt, space = turns[start - 1][0], room - (before[end] - before[start])
            context = prompt[:1] + prompt[1 - space :] if space > 2 else []
            cuts.prompts += 1
        ids, mask = head + context, [False] * (len(head) + len(context))
        for i in range(start, end):
            turn, supervised = turns[i]
            ids += turn
            mask += supervised if i >= done else [False] * len(turn)
        yield Window(ids[: block_size + 1], mask[: block_size + 1])
        done = end


@dataclass
class DialogueRows:
    """Rows of block_size inputs, ready to batch; `rows[i]` are the windows that share row i."""

    rows: list[list[Window]]
    block_size: int
    cuts: Cuts = field(default_factory=Cuts)

    @classmethod
    def build(cls, conversations: list[Conversation], tokenizer: Tokenizer, block_size: int,
              pack: bool = True) -> "DialogueRows":
        """Window every conversation; pack=False gives each window a row of its own, to compare."""
        cuts = Cuts()
        found = [w for c in conversations for w in windows(c, tokenizer, block_size, cuts)]
        return cls(best_fit(found, block_size) if pack else [[w] for w in found], block_size, cuts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, in order: equal only for equal windows with equal masks in equal rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            for window in row:
                digest.update(np.array([len(row), len(window.ids), *window.ids], "<i4").tobytes())
                digest.update(bytes(window.supervised))
        return digest.hexdigest()

    @property
    def supervised_tokens(self) -> int:
        return sum(sum(window.supervised) for row in self.rows for window in row)

    @property
    def input_tokens(self) -> int:
        return sum(len(window.ids) - 1 for row in self.rows for window in row)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows → Batch (B, T); T is the longest row, rounded up to a multiple of 64.

        Padding is id 0 in segment 0, its targets IGNORED; windows are segments 1, 2, …
        """
        rows = [self.rows[i] for i in indices]
        longest = max(sum(len(window.ids) - 1 for window in row) for row in rows)
        T = min(-(-longest // 64) * 64, self.block_size)
        inputs = torch.zeros(len(rows), T, dtype=torch.int64)
        targets = torch.full((len(rows), T), IGNORED)
        segments = torch.zeros(len(rows), T, dtype=torch.int64)
        for b, row in enumerate(rows):
            start = 0
            for number, window in enumerate(row, start=1):
                ids, supervised = torch.tensor(window.ids), torch.tensor(window.supervised)
                end = start + len(ids) - 1
                inputs[b, start:end] = ids[:-1]
                targets[b, start:end] = torch.where(supervised, ids, IGNORED)[1:]  # THE shift
                segments[b, start:end] = number
                start = end
        return Batch(inputs, targets, segments)

    def show(self, index: int, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
        """The text of a row, with what is supervised between `marks`: look before you train."""
        shown = []
        for window in self.rows[index]:
            for supervised, run in groupby(zip(window.ids, window.supervised), key=lambda pair: pair[1]):
                text = tokenizer.decode(token for token, _ in run)
                shown.append(marks[0] + text + marks[1] if supervised else text)
            shown.append("\n")
        return "".join(shown)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order: for evaluation."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))


def best_fit(found: list[Window], block_size: int) -> list[list[Window]]:
    """Pack windows into rows: longest first, each into the fullest row with room for it.

    (Best-fit decreasing: at most 11/9 of the fewest rows possible, Johnson 1973.)
    """
    rows: list[list[Window]] = []
    with_space: list[list[list[Window]]] = [[] for _ in range(block_size + 1)]  # [n]: rows with n places left
    for window in sorted(found, key=lambda w: -len(w.ids)):
        size = len(window.ids) - 1
        space = next((n for n in range(size, block_size) if with_space[n]), block_size)
        if space == block_size:
            rows.append([])
            with_space[space].append(rows[-1])
        row = with_space[space].pop()
        row.append(window)
        with_space[space - size].append(row)
    return rows
