"""Whatever format a user's file of conversations has → messages.

A conversation is a list of {"role", "content"} messages. Each record of a file says by its own names
which format it has, so that formats may be mixed in one file:

    {"messages": [{"role", "content"}, …]}              as OpenAI's fine-tuning takes it
    {"conversations": [{"from", "value"}, …]}           ShareGPT: human, gpt, system; role and content will do
    {"instruction", "input", "output"}                  Alpaca; system, and history [[said, reply], …], may be there
    {"prompt", "completion"}, {"question", "answer"}    and the like: one prompt, one reply; system may be there
    columns of these names in a .csv or .tsv            the same
    .txt                                                a line a turn, the user first; blank lines between conversations
"""

import reprlib
from collections.abc import Iterator
from pathlib import Path

from nanochat import InputError, records
from nanochat.records import whole_pairs
from nanochat.tokenizer import ROLES

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Conversation = list[Message]

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system"}
OPENAI_ROLES = {role: role for role in ROLES} | {"developer": "system"}
PROMPTS = ("prompt", "question", "query", "instruction", "input", "user", "问题", "提问", "用户")
REPLIES = ("completion", "answer", "response", "reply", "output", "assistant", "回答", "答案", "回复", "助手")
SYSTEMS = ("system", "系统")
HOW_TO_NAME = ('name the one that the user says "prompt" and the reply "completion"; a third may be "system", '
               'all others are left aside')


def read(path: str | Path) -> tuple[list[Conversation], list[str]]:
    """Conversations of a file, and one line "file:line: reason" for each record left out.

    Raises InputError if the file is empty, is not UTF-8, or has no usable conversation.
    """
    found = _blocks(records.read_text(path)) if Path(path).suffix.lower() == ".txt" else records.read(path)
    return records.converted(path, found, normalise, "conversation")


def _blocks(text: str) -> Iterator[tuple[int, object]]:
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


def normalise(record: object) -> Conversation:
    """One record of a file → its conversation; InputError says what is wrong with it.

    Consecutive messages of one role are joined by a newline. A usable conversation has a reply, no message of
    user or assistant without text before the last reply, and its system message, if there is one, first; a blank one is none.
    """
    if not isinstance(record, dict):
        raise InputError(f"a record is {type(record).__name__}, must be an object with messages")
    messages: Conversation = []
    for role, content in _turns(record):
        if role == "system" and not content.strip():
            continue
        content = whole_pairs(content)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    if any(message["role"] == "system" for message in messages[1:]):
        raise InputError("a system message must be the first one")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no assistant message, so nothing to learn from")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        del messages[-1]
    for role in ("assistant", "user"):  # learned, it would teach to say nothing, or to answer it
        blank = [not message["content"].strip() for message in messages if message["role"] == role]
        if any(blank):
            raise InputError(f"{role} message {blank.index(True) + 1} of {len(blank)} is empty")
    return messages


def _turns(record: dict) -> list[tuple[str, str]]:
    """(role, content) pairs of a record, by the format that its names tell."""
    if "conversations" in record:
        turns = record["conversations"]
        keys = ("role", "content") if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0] else ("from", "value")
        return _with_system(record, _listed(turns, *keys, SHAREGPT_ROLES))
    if "messages" in record:
        return _with_system(record, _listed(record["messages"], "role", "content", OPENAI_ROLES))
    fields = records.named(record)
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):  # as trl takes them
        return _listed(fields["prompt"] + fields["completion"], "role", "content", OPENAI_ROLES)
    asked, replied = ([name for name in names if name in fields] for names in (PROMPTS, REPLIES))
    if alpaca := asked in (["instruction"], ["instruction", "input"]):
        asked = ["instruction"]
    if not (len(asked) == len(replied) == 1):
        raise InputError(f"keys are {reprlib.repr(list(record))}, must be {_must_be(asked, replied)}")
    system = next((fields[name] for name in SYSTEMS if fields.get(name)), "")
    history = fields.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise InputError(f"history is {reprlib.repr(history)}, must be a list of [said, reply] pairs")
    prompt, more = fields[asked[0]], (fields.get("input") or "") if alpaca else ""
    texts = [("system", system), *((role, text) for pair in history for role, text in zip(("user", "assistant"), pair)),
             ("user", prompt), ("user", more), ("assistant", fields[replied[0]])]
    for role, text in texts:
        if not isinstance(text, str):
            raise InputError(f"the {role}'s text is {type(text).__name__}, must be text")
    if not (prompt + more).strip():
        raise InputError(f"{asked[0]} is empty")
    return [(role, text) for role, text in texts if text or role == "assistant"]


def _with_system(record: dict, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns, after the system text that stands beside them, if one does."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip():
        return turns
    if turns and turns[0][0] == "system" and turns[0][1].strip():
        raise InputError("it has a system message, and a system text beside the messages; keep one")
    return [("system", system), *turns]


def _must_be(asked: list[str], replied: list[str]) -> str:
    """What the names of a record should have been."""
    if len(asked) > 1 or len(replied) > 1:
        return f"one prompt and one reply, and {' and '.join(asked if len(asked) > 1 else replied)} say the same: rename one of them"
    return f'"messages", "conversations", or a prompt and a reply: {HOW_TO_NAME}'


def _listed(turns: object, role_key: str, text_key: str, names: dict[str, str]) -> list[tuple[str, str]]:
    """(role, content) pairs of a list of turns; names: what a role is called there → here."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError("messages must be a list of objects")
    pairs = []
    for turn in turns:
        role, content = turn.get(role_key), turn.get(text_key)
        if role not in list(names):  # in a list: a role of the wrong type has no hash
            raise InputError(f"role {reprlib.repr(role)}, must be one of {list(names)}")
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise InputError(f"{text_key} of a {role} message is {type(content).__name__}, must be text")
        if names[role] == "assistant" and turn.get("weight") not in (None, 1):
            raise InputError(f"weight {reprlib.repr(turn['weight'])} of a reply: here every reply is learned from; leave out the weight, or the record")
        pairs.append((names[role], content))
    return pairs
