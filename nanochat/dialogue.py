"""Conversations → one template with its loss mask → windows that fit the block.

`render_turn` turns a message into ids and, in the same pass, into the mask of what is learned: the
assistant's text and its <|end|>, nothing else. Training (`windows`) and chat (`render_prompt`) both
join such turns, so a chat prompt is an exact prefix of what was trained.

    <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello.<|end|> <|user|>…
                                                 ~~~~~~~~~~~~~ supervised

A conversation longer than the block becomes windows in which each reply is supervised exactly
once; rows.py packs several short ones into a row.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from nanochat.formats import Conversation, Message
from nanochat.rows import Rows, Window
from nanochat.tokenizer import END_OF_TURN, Tokenizer


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


def opening(system: str) -> Conversation:
    """How a conversation begins: with its system text, if there is one that is not blank."""
    return [{"role": "system", "content": system}] if system.strip() else []


def system_of(messages: Conversation) -> Conversation:
    """The system message that a conversation begins with, as a list: an empty one if there is none."""
    return [message for message in messages[:1] if message["role"] == "system"]


def with_system(conversations: list[Conversation], text: str) -> list[Conversation]:
    """The conversations, those without a system text with this one."""
    return [messages if system_of(messages) else [*opening(text), *messages] for messages in conversations]


def shared_system(conversations: list[Conversation], tokenizer: Tokenizer, block_size: int) -> str:
    """The system text with which most conversations begin, so that a chat should too; "" if there is none.

    "" as well for one of over half the block, which `windows` has cut.
    """
    begins = Counter("".join(message["content"] for message in system_of(messages)) for messages in conversations)
    [(text, count)] = begins.most_common(1)
    most = 2 * count > len(conversations)
    return text if most and len(render_turn({"role": "system", "content": text}, tokenizer)[0]) <= block_size // 2 else ""


# ---------------------------------------------------------------------------- windows


@dataclass
class Cuts:
    """What did not fit and was shortened; nothing is cut silently."""

    replies: int = 0  # longer than the block: prompt and end are lost, and no <|end|> is invented
    prompts: int = 0  # the message before a reply, of which at most the newest part fits
    systems: int = 0  # a system text over half the block: only its beginning is kept

    def __str__(self) -> str:
        return f"{self.replies} replies, {self.prompts} prompts, {self.systems} system texts cut to fit the block"


def to_rows(conversations: list[Conversation], tokenizer: Tokenizer, block_size: int, pack: bool = True) -> Rows:
    """Window every conversation, and pack the windows; their `source` is the conversation's place in the list."""
    cuts, found = Cuts(), []
    for source, messages in enumerate(conversations):
        for window in windows(messages, tokenizer, block_size, cuts):
            window.source = source
            found.append(window)
    return Rows.of(found, block_size, cuts, pack)


def windows(messages: Conversation, tokenizer: Tokenizer, block_size: int, cuts: Cuts) -> Iterator[Window]:
    """Turns of a conversation, in windows in which each reply is supervised exactly once.

    A conversation that fits is one window. Of a longer one, the first window takes the turns
    that fit; each later one takes new turns up to 3/4 of the block (at least to the next reply)
    and fills the rest with the turns before them, as context without loss. <|endoftext|> and
    the system text begin every window. Turns stay whole, but for those that `cuts` counts.

        a block of 100, turns of 20:    U1 A1* U2 A2*                     * learned from
                                              U2 A2  U3 A3*
                                                     U3 A3  U4 A4*
    """
    head = [tokenizer.end_of_text]
    turns = [render_turn(message, tokenizer) for message in messages]
    if system_of(messages):
        system = turns.pop(0)[0]
        if len(system) > block_size // 2:
            system = system[: block_size // 2 - 1] + system[-1:]
            cuts.systems += 1
        head += system
    room = block_size + 1 - len(head)  # one more than the block: the last id is a target only
    length = [0, *accumulate(len(ids) for ids, _ in turns)]  # length[i]: tokens of turns[:i]
    reply_ends = [i + 1 for i, (_, mask) in enumerate(turns) if any(mask)]

    done = 0  # turns[:done] have been learned from
    while remaining := [end for end in reply_ends if end > done]:
        limit = length[done] + (room if done == 0 else room * 3 // 4)
        end = max((end for end in remaining if length[end] <= limit), default=remaining[0])
        start = next(i for i in range(end + 1) if length[end] - length[i] <= room)
        if start < done and any(turns[start][1]):
            start += 1  # context begins with the user, as a chat does
        context: list[int] = []
        if start == end:  # the reply alone is longer than the block: its beginning
            start, cuts.replies = end - 1, cuts.replies + 1
        elif 0 < start == end - 1:  # the reply fits, the message before it does not: its newest part
            prompt, space = turns[start - 1][0], room - (length[end] - length[start])
            context = prompt[:1] + prompt[1 - space :] if space > 2 else []
            cuts.prompts += 1
        ids, mask = head + context, [False] * (len(head) + len(context))
        for i in range(start, end):
            turn, supervised = turns[i]
            ids += turn
            mask += supervised if i >= done else [False] * len(turn)
        yield Window(ids[: block_size + 1], mask[: block_size + 1])
        done = end
