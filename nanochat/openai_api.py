"""OpenAI's words: a request, checked, becomes texts to make; their tokens become an answer, whole or in chunks.

A request's fields stand in `ChatRequest` and `CompletionRequest`; `Served` turns one into an `Order`,
whose `Choice`s are the texts to make: a choice takes its tokens one by one and gives the text and
logprobs that are certain. Nothing here knows of connections or of threads; server.py does that.

What is refused rather than guessed: fields that would change the answer and are not supported,
names that nobody knows, and messages that do not fit (none is left out silently).

Source: OpenAI's API reference, chat completions and completions, 2025.
"""

import math
import re
import reprlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanochat.batching import Token
from nanochat.dialogue import opening, render_prompt, system_of
from nanochat.formats import OPENAI_ROLES, Conversation
from nanochat.generate import SampleConfig, TextStream
from nanochat.records import whole_pairs
from nanochat.tokenizer import Tokenizer

MOST_TOP = 20  # likeliest tokens beside each, at most
COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI has it


class Refused(Exception):
    """A request that gets no answer, with what OpenAI's error format says of it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        """{"error": …}, as OpenAI's clients read it."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# ------------------------------------------------------------------ requests


NEUTRAL: dict[str, list] = {  # fields that are not supported, and the values beside null that leave the answer as it is
    "presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}], "response_format": [{"type": "text"}],
    "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none", "auto"],
    "modalities": [[], ["text"]], "audio": [], "prediction": [], "reasoning_effort": ["none"], "verbosity": ["medium"],
    "web_search_options": [], "suffix": [""],
    "name": [], "refusal": [], "tool_calls": [[]], "annotations": [[]],  # of replies that clients send back
}


class Fields(BaseModel):
    """Types as JSON has them (no "1" for 1), and no name but these and NEUTRAL's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, given: object) -> object:
        """Without the fields that say nothing."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name not in NEUTRAL or value not in [None, *NEUTRAL[name]]}


Probability = Annotated[float, Field(ge=0, le=1)]
Words = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class RequestMessage(Fields):
    """Who says what."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]


class StreamOptions(Fields):
    """What a stream sends beside its chunks. Obfuscation, which pads them, is taken and not done."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Fields):
    """What both kinds of request have. null is as good as absent."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # absent: what SampleConfig has, as of the next four
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # these three are ours
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # absent: chance
    stop: Words | Annotated[list[Words], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # of no effect on the text
    user: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    # of no effect on the text
    store: bool | None = None
    metadata: dict | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] | None = None  # absent or empty: a new text
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None


EITHER = {  # what a field of several types may be
    "prompt": "text, a list of texts, a list of ids, or a list of lists of ids",
    "content": 'text, or a list of {"type": "text", "text": …} parts',
    "stop": "text, or a list of at most 4 texts, none of them empty",
}


def what_is_wrong(errors: Sequence[dict]) -> Refused:
    """The first of pydantic's complaints in a line, without what the user wrote but for names and numbers."""
    error = errors[0]
    place = [step for step in error["loc"] if step != "body"]
    if error["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {error['ctx']['error']}, at character {error['loc'][-1]}")
    if not place:
        return Refused(400, "the body must be a JSON object, with Content-Type: application/json")
    if error["type"] == "extra_forbidden" and place[-1] in NEUTRAL:
        message = f"{dotted(place)} is not supported with a value that would change the answer: leave it out"
    elif error["type"] == "extra_forbidden":
        message = f"{dotted(place)} is no field that is known here"
    elif error["type"] == "missing":
        message = f"{dotted(place)} is missing"
    elif either := next((i for i, step in enumerate(place, 1) if step in EITHER), None):
        place = place[:either]
        message = f"{dotted(place)} must be {EITHER[place[-1]]}"
    else:
        seen = error.get("input")
        seen = f" is {reprlib.repr(seen)}," if type(seen) in (int, float) else ""
        message = f"{dotted(place)}{seen} {re.sub('^.*? should', 'must', error['msg'])}"
    return Refused(400, message, param=dotted(place))


def dotted(place: list[str | int]) -> str:
    """["messages", 0, "role"] → messages[0].role, short and printable whatever a client calls its fields."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")
    return re.sub("[^ -~]", "?", text[:100])


# ------------------------------------------------------------------ from a request to texts to make


@dataclass
class Entry:
    """A token of an answer, for logprobs."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    start: int  # characters of the answer before it


class Choice:
    """One text in the making: `take` what its job sends, `reason` says when and why it ended."""

    def __init__(self, index: int, prompt: list[int], echo: str, config: SampleConfig, logprobs: bool, tokenizer: Tokenizer):
        self.index, self.prompt, self.echo, self.config, self.logprobs = index, prompt, echo, config, logprobs
        self.text = TextStream(tokenizer, config.stop)
        self.made = 0  # tokens
        self.given = 0  # characters, without the echo
        self.reason: str | None = None
        self.held: list[Entry] = []  # of text that is not certain yet

    def take(self, item: Token | str) -> tuple[str, list[Entry]]:
        """A token, or why there are no more → the text and the entries that are certain now."""
        if isinstance(item, str):
            piece = self.text.end()
            self.reason = item if piece == self.text.waiting else "stop"  # a stop string stood where a longer one might have begun
        else:
            self.made += 1
            before = self.given + len(self.text.waiting)
            piece = self.text.add(item.id)
            if self.logprobs:  # half a character that was never finished has become one of its own, before this token
                own = len(self.text.tokenizer.decode([item.id]))
                start = max(before, self.given + len(piece) + len(self.text.waiting) - own)
                self.held.append(Entry(item.id, item.logprob, item.top, start))
            if self.text.stopped:
                self.reason = "stop"
        self.given += len(piece)
        entries = [entry for entry in self.held if entry.start < self.given]
        self.held = self.held[len(entries):]
        return piece, entries


@dataclass
class Order:
    """All texts of one request, and the words for its answer."""

    served: "Served"
    chat: bool
    choices: list[Choice]
    top: int | None  # likeliest tokens beside each; None: no logprobs
    prompt_tokens: int
    stream: bool
    usage_in_stream: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict:
        """Tokens read and made."""
        read, made = self.prompt_tokens, sum(choice.made for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def envelope(self, choices: list[dict], chunk: bool) -> dict:
        """What stands around the choices."""
        kind = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        return {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created,
                "model": self.served.name, "choices": choices}

    def answer(self, texts: list[str], entries: list[list[Entry]]) -> dict:
        """The whole answer."""
        choices = []
        for choice, text, found in zip(self.choices, texts, entries):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.chat else {"text": choice.echo + text}
            logprobs = self.logprobs(choice, found)
            choices.append({"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.reason})
        return self.envelope(choices, chunk=False) | {"usage": self.usage()}

    def opening(self, choice: Choice) -> dict | None:
        """The chunk before a text's first: who speaks, or the prompt that is echoed."""
        if self.chat:
            return self.chunk(choice, {"delta": {"role": "assistant", "content": "", "refusal": None}}, [], None)
        return self.chunk(choice, {"text": choice.echo}, [], None) if choice.echo else None

    def more(self, choice: Choice, piece: str, entries: list[Entry]) -> list[dict]:
        """The chunks for what a choice took: text, if there is any, and the end, if it is that."""
        chunks = []
        if piece or entries:
            said = {"delta": {"content": piece}} if self.chat else {"text": piece}
            chunks.append(self.chunk(choice, said, entries, None))
        if choice.reason:
            chunks.append(self.chunk(choice, {"delta": {}} if self.chat else {"text": ""}, [], choice.reason))
        return chunks

    def chunk(self, choice: Choice, said: dict, entries: list[Entry], reason: str | None) -> dict:
        """One chunk of a stream; beside a last chunk with the usage the others say that they have none."""
        logprobs = self.logprobs(choice, entries) if entries else None
        only = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope([only], chunk=True) | ({"usage": None} if self.usage_in_stream else {})

    def logprobs(self, choice: Choice, entries: list[Entry]) -> dict | None:
        """Tokens with their logprobs, in the words of chat or of completions."""
        if self.top is None:
            return None
        spell, decode = self.served.spell, self.served.tokenizer.decode_bytes
        if self.chat:
            def full(token: int, logprob: float) -> dict:
                return {"token": spell(token), "logprob": finite(logprob), "bytes": list(decode([token]))}

            content = [full(e.id, e.logprob) | {"top_logprobs": [full(*pair) for pair in e.top]} for e in entries]
            return {"content": content, "refusal": None}
        return {
            "tokens": [spell(e.id) for e in entries],
            "token_logprobs": [finite(e.logprob) for e in entries],
            "top_logprobs": [{spell(i): finite(p) for i, p in [*e.top, (e.id, e.logprob)]} for e in entries],
            "text_offset": [e.start for e in entries],
        }


def finite(logprob: float) -> float:
    """JSON has no −∞."""
    return logprob if math.isfinite(logprob) else -9999.0


class Served:
    """A model as its clients know it: a name, limits, and what their requests mean to it."""

    def __init__(self, name: str, tokenizer: Tokenizer, context: int, max_tokens: int, most_texts: int):
        self.name, self.tokenizer, self.context = name, tokenizer, context
        self.max_tokens, self.most_texts = max_tokens, most_texts
        self.stop_ids = frozenset(tokenizer.control.values())
        self.system = tokenizer.system
        self.created = int(time.time())

    def about(self) -> dict:
        """The model, as /v1/models shows it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "nanochat",
                "context": self.context, "max_tokens": min(self.max_tokens, self.context - 1),
                "chat": self.tokenizer.chat_template is not None, "system": self.system}

    def spell(self, token: int) -> str:
        """A token's text, or its bytes where they are no whole characters, as OpenAI spells them."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat(self, request: ChatRequest) -> Order:
        """A conversation → replies to make. Raises Refused."""
        self.check_name(request.model)
        if self.tokenizer.chat_template is None:
            message = f"{self.name} has no chat template: it only continues texts, at /v1/completions"
            raise Refused(400, message, param="model")
        if request.top_logprobs is not None and not request.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        prompt = render_prompt(self.conversation(request.messages), self.tokenizer)
        top = (request.top_logprobs or 0) if request.logprobs else None
        wanted, name = request.max_completion_tokens, "max_completion_tokens"
        if wanted is None:
            wanted, name = request.max_tokens, "max_tokens"
        return self.order(request, True, [(prompt, "")], wanted, name, self.max_tokens, top)

    def completion(self, request: CompletionRequest) -> Order:
        """Texts → continuations to make. Raises Refused."""
        self.check_name(request.model)
        n = request.n or 1
        if request.best_of not in (None, n):
            raise Refused(400, f"best_of is {request.best_of}, must be n ({n}) or left out", param="best_of")
        if request.echo and request.logprobs is not None:
            raise Refused(400, "echo with logprobs is not supported: leave one of them out", param="echo")
        prompts = [(ids, text if request.echo else "") for ids, text in self.prompts(request.prompt)]
        return self.order(request, False, prompts, request.max_tokens, "max_tokens", COMPLETION_TOKENS, request.logprobs)

    def check_name(self, name: str | None) -> None:
        """Whether this is the model that is asked for. Raises Refused."""
        if name not in (None, self.name):
            message = f"the model {reprlib.repr(name)} does not exist; here is {self.name!r}"
            raise Refused(404, message.encode("ascii", "replace").decode(), "model_not_found", "model")

    def conversation(self, messages: list[RequestMessage]) -> Conversation:
        """Messages as in training: the system text first, and what one role says in a row joined by a newline."""
        turns: Conversation = []
        for i, message in enumerate(messages):
            role = OPENAI_ROLES[message.role]
            text = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "\n" + text
            elif role == "system" and turns:
                raise Refused(400, f"messages[{i}]: a system message must come before all others", param=f"messages[{i}].role")
            else:
                turns.append({"role": role, "content": text})
        if not system_of(turns):
            turns = [*opening(self.system), *turns]
        elif not turns[0]["content"].strip():  # an empty one: none, not even the checkpoint's own
            turns.pop(0)
        if not turns or turns[-1]["role"] != "user":
            raise Refused(400, "the last message must be the user's", param="messages")
        if not turns[-1]["content"].strip():
            raise Refused(400, "the last message is empty", param="messages")
        return turns

    def prompts(self, prompt: str | list | None) -> list[tuple[list[int], str]]:
        """The field `prompt` in its four forms → (ids, text) of each. No text becomes a control id; a number may be one."""
        several = prompt if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) else [prompt or ""]
        if not several:
            raise Refused(400, "prompt is an empty list", param="prompt")
        found = []
        for one in several:
            ids = self.tokenizer.encode(one) if isinstance(one, str) else one
            if ids and max(ids) >= self.tokenizer.vocab_size:
                message = f"prompt has the id {reprlib.repr(max(ids))}; the ids are 0 … {self.tokenizer.vocab_size - 1}"
                raise Refused(400, message, param="prompt")
            text = whole_pairs(one) if isinstance(one, str) else self.tokenizer.decode(ids)
            found.append((ids or [self.tokenizer.end_of_text], text))
        return found

    def order(self, request: Sampling, chat: bool, prompts: list[tuple[list[int], str]], wanted: int | None, name: str,
              default: int, top: int | None) -> Order:
        """n texts for each (prompt, echo), of `wanted` tokens (the field `name`) or else `default`. Raises Refused."""
        if wanted is not None and wanted > self.max_tokens:
            message = f"{name} is {reprlib.repr(wanted)}, must be at most {self.max_tokens} (this server's --max-tokens)"
            raise Refused(400, message, param=name)
        n = request.n or 1
        if n * len(prompts) > self.most_texts:
            message = f"{n * len(prompts)} texts in one request, at most {self.most_texts} (this server's --queue)"
            raise Refused(400, message, param="n")
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        seed = secrets.randbits(62) if request.seed is None else request.seed
        given = request.model_dump(include={"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}, exclude_none=True)
        choices: list[Choice] = []
        for ids, echo in prompts:
            room = self.context - len(ids)
            if room < 1:
                what, param = ("the messages have", "messages") if chat else ("the prompt has", "prompt")
                message = f"{what} {len(ids)} tokens; this model's context is {self.context}, at least 1 of them for the answer"
                raise Refused(400, message, "context_length_exceeded", param)
            limit = min(wanted or default, self.max_tokens, room)
            for i in range(n):
                config = SampleConfig(max_new_tokens=limit, stop=stop, seed=seed + i, **given)
                choices.append(Choice(len(choices), ids, echo, config, top is not None, self.tokenizer))
        options = request.stream_options
        return Order(self, chat, choices, top, sum(len(ids) for ids, _ in prompts), bool(request.stream),
                     bool(request.stream and options and options.include_usage))

