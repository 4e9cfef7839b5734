"""Text out of a model: choosing the next token, decoding with a cache, streaming, chat turns.

The model gives logits; pure functions turn them into a choice; `generate` feeds the choice
back, reading each token once thanks to the cache. `stream_text` turns ids into text without
broken characters, and `Chat` keeps a conversation within the block.

Sources: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024;
repetition penalty, Keskar et al. 2019; their order and edges as in Hugging Face's generate.
"""

import codecs
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanochat import InputError
from nanochat.dialogue import opening, render_prompt, system_of
from nanochat.formats import Conversation
from nanochat.model import GPT
from nanochat.tokenizer import Tokenizer


@dataclass
class SampleConfig:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 200
    """longest text to generate, in tokens"""
    temperature: float = 0.8
    """0: always the likeliest token; 1: the model's own distribution; above: flatter"""
    top_k: int = 0
    """choose among the k likeliest tokens only (0: all)"""
    top_p: float = 0.95
    """choose among the likeliest tokens that together reach this probability (1: all)"""
    min_p: float = 0.0
    """drop tokens less likely than this share of the likeliest one (0: none)"""
    repetition_penalty: float = 1.0
    """divide the logits of tokens already in the text by this (1: off)"""
    stop: tuple[str, ...] = ()
    """end the text before any of these strings"""
    seed: int = 0
    """equal seeds give equal texts, of the same prompts side by side"""

    def __post_init__(self):
        bounds = {
            "max_new_tokens": (1, None),
            "temperature": (0, 100),
            "top_k": (0, None),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
        }
        wrong = []
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                limit = f"at least {low}" if high is None else f"from {low} to {high}"
                wrong.append(f"--{name.replace('_', '-')} is {value}, must be {limit}")
        if "" in self.stop:
            wrong.append("--stop has an empty string")
        if wrong:
            raise InputError("; ".join(wrong))


# ------------------------------------------------------------------ choosing the next token


def penalise_repetition(logits: Tensor, context: list[list[int]], penalty: float) -> Tensor:
    """Make the tokens of each row's context less likely: logit / penalty if positive, else · penalty."""
    logits = logits.clone()
    for row, seen in zip(logits, context):
        ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits.device)
        row[ids] = torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest of each row at −∞."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens up to and including the one that makes their sum reach p."""
    V = logits.size(-1)
    chances = logits.softmax(dim=-1)
    for k in (min(256, V), V):  # the likeliest few mostly reach it, which spares sorting all
        indices = logits.topk(k).indices  # of the logits: rounded, two chances may be equal
        ordered = chances.gather(-1, indices)
        if k == V or bool((ordered.sum(dim=-1) >= p).all()):
            break
    dropped = ordered.cumsum(dim=-1) - ordered >= p  # those before them reach it
    dropped[:, 0] = False  # p = 0 keeps one
    kept = logits.gather(-1, indices).masked_fill(dropped, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, kept)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep the tokens at least `share` times as likely as the likeliest."""
    chances = logits.softmax(dim=-1)
    return logits.masked_fill(chances < share * chances.amax(dim=-1, keepdim=True), -torch.inf)


def probabilities(logits: Tensor, config: SampleConfig, context: list[list[int]]) -> Tensor:
    """Logits (B, V) → the probability with which each token is chosen (B, V): 1 for the likeliest at temperature 0.

    Raises InputError for NaN, +∞, or a row of −∞ only.
    """
    logits = logits.float()
    if config.repetition_penalty != 1:
        logits = penalise_repetition(logits, context, config.repetition_penalty)
    largest = logits.amax(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged, or too large for --dtype float16")
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = (logits - largest) / max(config.temperature, 1e-30)  # at most 0, so that none becomes +∞
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    return logits.softmax(dim=-1)


def next_token(logits: Tensor, config: SampleConfig, context: list[list[int]], generator: torch.Generator) -> Tensor:
    """Logits (B, V) → one id per row (B,), drawn from `probabilities`."""
    chances = probabilities(logits, config, context)
    return torch.multinomial(chances, 1, generator=generator).squeeze(1) if config.temperature else chances.argmax(dim=-1)


# ------------------------------------------------------------------ decoding


class Reader:
    """What a model says after texts, with a cache: no id is read twice.

    It remembers which ids each row of the cache has read. A text that begins as its row
    did, such as a chat's next turn, is read on from there.
    """

    def __init__(self, model: GPT, rows: int):
        self.model, self.cache = model, model.new_cache(rows)
        self.ids: list[list[int]] = [[] for _ in range(rows)]  # what each row has read

    @torch.inference_mode()
    def logits(self, texts: list[list[int]]) -> Tensor:
        """Ids of texts, each of at most block_size → logits (B, V) of what may follow each.

        Rows with equally many unread ids are read together, however many each has read: in decoding it is one
        id a row. Otherwise each row is first read alone, up to its last id.
        """
        known = self.rewind(0, [text[:-1] for text in texts])  # the last id of each is read for its logits
        unread = {len(text) - n for text, n in zip(texts, known)}
        if len(unread) > 1:
            for row, text in enumerate(texts):
                self.read(row, text[:-1])
            known = [len(text) - 1 for text in texts]
        x = self.features(0, [text[n:] for text, n in zip(texts, known)])
        return self.model.head(x[:, -1])

    @torch.inference_mode()
    def read(self, row: int, text: list[int]) -> None:
        """Bring one row to have read `text`."""
        [known] = self.rewind(row, [text])
        if known < len(text):
            self.features(row, [text[known:]])

    def rewind(self, row: int, texts: list[list[int]]) -> list[int]:
        """Take each row from `row` on back to where its text begins to differ; → how many ids remain of each."""
        for r, text in enumerate(texts, start=row):
            self.cache.lengths[r] = shared_prefix(self.ids[r], text)
            self.ids[r] = self.ids[r][: self.cache.lengths[r]]
        return [len(self.ids[r]) for r in range(row, row + len(texts))]

    def features(self, row: int, new: list[list[int]]) -> Tensor:
        """Read new ids (B, T) in the rows from `row` on → vectors (B, T, C)."""
        tokens = torch.tensor(new, device=self.cache.keys.device)
        x = self.model.features(tokens, cache=self.cache.rows(row, row + len(new)))
        for r, ids in enumerate(new, start=row):  # only now: an interrupt before this leaves the row as it was
            self.ids[r] = self.ids[r] + ids
        return x

    def forget(self, rows: slice = slice(None)) -> None:
        """Begin anew, with nothing in the cache that is not finite: a weight of 0 times NaN is NaN."""
        for stored in (self.cache.keys, self.cache.values):
            stored[:, rows] = 0
        for row in range(len(self.ids))[rows]:
            self.ids[row] = []

    def swap(self, a: int, b: int) -> None:
        """Let two rows change places."""
        if a != b:
            self.ids[a], self.ids[b] = self.ids[b], self.ids[a]
            for stored in (self.cache.keys, self.cache.values):
                used = stored[..., : self.cache.longest, :]
                used[:, [a, b]] = used[:, [b, a]]
            self.cache.lengths[[a, b]] = self.cache.lengths[[b, a]]


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two texts have in common from their start."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], config: SampleConfig, stop_ids: Iterable[int] = (),
             reader: Reader | None = None) -> Iterator[list[int | None]]:
    """Continue each prompt; yields one list a step: each row's new id, or None once it has ended.

    A row ends with one of stop_ids, which is not yielded; the generator ends when all rows have, or after
    max_new_tokens. A row that outgrows block_size keeps its newest half, read again from position
    0. reader: one that knows the beginning of the prompts already.
    """
    if not prompts or not all(prompts):
        raise InputError("nothing to continue: a prompt needs at least one token")
    generator = torch.Generator(model.wpe.weight.device).manual_seed(config.seed % 2**63)  # what torch takes
    reader, stop_ids, ended = reader or Reader(model, len(prompts)), set(stop_ids), [False] * len(prompts)
    rows = [list(prompt) for prompt in prompts]
    training = model.training
    model.eval()
    try:
        for _ in range(config.max_new_tokens):
            rows = [newest(row, model.config.block_size) for row in rows]
            chosen = next_token(reader.logits(rows), config, rows, generator).tolist()
            for row, new in zip(rows, chosen):
                row.append(new)
            ended = [end or new in stop_ids for end, new in zip(ended, chosen)]
            yield [None if end else new for end, new in zip(ended, chosen)]
            if all(ended):
                return
    finally:
        model.train(training)


def newest(ids: list[int], block_size: int) -> list[int]:
    """The ids if they fit the block, else so many of the newest as fill half of it."""
    return ids if len(ids) <= block_size else ids[-max(1, block_size // 2) :]


def generate_ids(model: GPT, prompts: list[list[int]], config: SampleConfig,
                 stop_ids: Iterable[int] = ()) -> tuple[list[list[int]], list[bool]]:
    """All rows at once → (new ids of each row without the stop id, whether it ended by itself)."""
    new: list[list[int]] = [[] for _ in prompts]
    step: list[int | None] = []
    for step in generate(model, prompts, config, stop_ids):
        for ids, token in zip(new, step):
            if token is not None:
                ids.append(token)
    return new, [token is None for token in step]


# ------------------------------------------------------------------ text


class TextStream:
    """Ids → pieces of text, as early as they are certain.

    A token may end in the middle of a character: its bytes wait for the rest. The pieces
    together are tokenizer.decode(ids), up to where the first of the `stop` strings begins; text
    that may be the beginning of one waits too.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.waiting = ""
        self.stopped = False  # at a stop string: nothing more will come

    def add(self, token: int) -> str:
        """One id more → the text that it makes certain."""
        self.waiting += self.utf8.decode(self.tokenizer.decode_bytes([token]))
        certain = first_stop(self.waiting, self.stop)
        piece, self.waiting = self.waiting[:certain], self.waiting[certain:]
        self.stopped = self.waiting.startswith(self.stop)
        return piece

    def end(self) -> str:
        """What waited, now that no more ids come."""
        self.waiting += self.utf8.decode(b"", final=True)
        return self.waiting[: min((self.waiting.index(s) for s in self.stop if s in self.waiting), default=None)]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of text that a TextStream makes of ids, up to a stop string."""
    text = TextStream(tokenizer, stop)
    for token in ids:
        if piece := text.add(token):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, be it whole or cut off by the end of the text ("one En" for "End": 4); else len(text)."""
    return next((i for i in range(len(text)) for s in stop if s.startswith(text[i : i + len(s)])), len(text))


def stream(model: GPT, tokenizer: Tokenizer, prompt: list[int], config: SampleConfig) -> Iterator[str]:
    """Continue one prompt as pieces of text; any control token ends it."""
    ids = (new for [new] in generate(model, [prompt], config, tokenizer.control.values()) if new is not None)
    return stream_text(tokenizer, ids, config.stop)


def texts(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], config: SampleConfig) -> list[str]:
    """Continue several prompts together; the whole text of each, up to a control token or a stop string."""
    streams = [TextStream(tokenizer, config.stop) for _ in prompts]
    made, going = ["" for _ in prompts], [True for _ in prompts]
    for step in generate(model, prompts, config, tokenizer.control.values()):
        for i, token in enumerate(step):
            if token is None:
                going[i] = False
            elif going[i]:
                made[i] += streams[i].add(token)
                going[i] = not streams[i].stopped
        if not any(going):
            break
    return [text if one.stopped else text + one.end() for text, one in zip(made, streams)]


# ------------------------------------------------------------------ chat


class Chat:
    """A conversation with a model fine-tuned on dialogue.

    Each prompt fits the block with room for a reply; a reply that outgrows it goes on as
    `generate` says, forgetting the older half. What the model has read it does not read again,
    as long as the oldest exchanges still fit.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, config: SampleConfig, system: str = ""):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.reader = Reader(model, 1)
        self.asked = 0  # replies begun: each has a seed of its own, so that the same question may get another answer
        self.tokens, self.finish = 0, ""  # of the last reply: its length, and "stop" (by itself), "length" or "cut"
        self.begin(opening(system))

    def begin(self, messages: Conversation) -> None:
        """Go on from these messages: none, a system text alone, or whole exchanges. InputError if the system text leaves no room."""
        if system := system_of(messages):
            fit([*system, {"role": "user", "content": "?"}], self.tokenizer, self.model.config.block_size, self.config.max_new_tokens)
        self.messages = messages
        self.dropped = 0  # oldest messages left out of the last prompt for want of room

    @property
    def system(self) -> Conversation:
        """The system message, if there is one."""
        return system_of(self.messages)

    @property
    def exchanges(self) -> Conversation:
        """What was said after the system message: the user and the model in turn."""
        return self.messages[len(self.system) :]

    def ask(self, text: str) -> Generator[str]:
        """Say something; yields the reply in pieces and then remembers both.

        Of a reply that is not read to its end, what was read is remembered: the model knows what
        stands on the screen. Without a word of reply, and when InputError says that the text alone
        does not fit, the conversation is unchanged.
        """
        return self.reply([*self.messages, {"role": "user", "content": text}])

    def ask_again(self) -> Generator[str]:
        """Another reply to the last message, in place of its reply; there must be one."""
        return self.reply(self.messages[:-1])

    def undo(self) -> str:
        """Forget the last exchange; → what the user had said. There must be one."""
        said = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return said

    def reply(self, messages: Conversation) -> Generator[str]:
        """What the model says to `messages`, the last of which is the user's."""
        prompt, self.dropped = fit(messages, self.tokenizer, self.model.config.block_size, self.config.max_new_tokens)
        config = replace(self.config, seed=self.config.seed + self.asked)
        self.asked += 1
        pieces = []
        try:
            for piece in stream_text(self.tokenizer, self.new_ids(prompt, config), config.stop):
                pieces.append(piece)
                yield piece
        except BaseException:  # such as Ctrl-C
            self.finish = "cut"
            raise
        finally:
            if (text := "".join(pieces)).strip():  # an empty turn, which no training data has, would teach the next to be empty
                self.messages = [*messages, {"role": "assistant", "content": text}]

    def new_ids(self, prompt: list[int], config: SampleConfig) -> Iterator[int]:
        """The ids of a reply as they are chosen; keeps count of them, and of what ends it."""
        self.tokens, self.finish = 0, "stop"
        for [new] in generate(self.model, [prompt], config, self.tokenizer.control.values(), self.reader):
            if new is None:
                return
            self.tokens += 1
            yield new
        self.finish = "length"


def fit(messages: Conversation, tokenizer: Tokenizer, block_size: int, reply_tokens: int) -> tuple[list[int], int]:
    """The prompt ids of a chat, and how many of its oldest messages were left out to make room.

    Whole exchanges are dropped, oldest first; the system text and the newest message always stay.
    Room for the reply: reply_tokens, but no more than a quarter of the block.
    """
    if not messages[-1]["content"].strip():
        raise InputError("the message is empty")
    limit = block_size - min(reply_tokens, block_size // 4)
    system = system_of(messages)
    first = len(messages) - 1
    prompt = render_prompt(system + messages[first:], tokenizer)
    while first >= len(system) + 2:  # an exchange more: what the user said and its reply
        longer = render_prompt(system + messages[first - 2 :], tokenizer)
        if len(longer) > limit:
            break
        prompt, first = longer, first - 2
    if len(prompt) <= limit:
        return prompt, first - len(system)
    what = "system text and message have" if system else "the message has"
    raise InputError(f"{what} {len(prompt):,} tokens with the template; at most {limit:,} fit")
