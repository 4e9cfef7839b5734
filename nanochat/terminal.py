"""The chat as its user sees it: what is typed, the /commands, replies as they come, Ctrl-C.

At a terminal prompt_toolkit edits the line: history, Tab, Chinese and emoji at their width, and a
pasted text as one message with its line breaks. From a pipe each line with text is a message, and
standard output holds nothing but replies; all else that is to be said goes to standard error.

    > Hello                        what begins with / is a command; a message that does is typed //
    Hi! How are you?
    6 tokens, 61 tokens/s, ended by itself
"""

import os
import shlex
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanochat import InputError, formats
from nanochat.checkpoint import one_line, write_json
from nanochat.generate import Chat, SampleConfig
from nanochat.records import whole_pairs

COMMANDS = {  # name: (what follows it, what it does); Talk has a method for each
    "help": ("", "list the commands"),
    "undo": ("", "forget the last message and its reply"),
    "regenerate": ("", "another reply to the last message"),
    "reset": ("", "a new conversation, with the same system text"),
    "system": ("[TEXT]", 'show the system text, or begin anew with this one; "" is none'),
    "settings": ("[NAME VALUE …]", "show how replies are chosen, or change it: temperature 0.5 top_p 0.9"),
    "save": ("[FILE]", "write the conversation as JSON; without FILE, where it was saved or loaded"),
    "load": ("FILE", "go on with a conversation from a file"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
KEYS = "Alt+Enter or Ctrl+J begins a new line, Tab completes a command, ↑ brings back what was said."
ENDINGS = {"stop": "ended by itself", "length": "reached max_new_tokens", "cut": "cut"}
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # a terminal would obey them


class Talk:
    """A conversation and the commands that act on it, each a method that takes the text after its name."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.file: Path | None = None  # which /save may write over: the one that this conversation is from, or in

    def run(self) -> None:
        """Until Ctrl-D, /quit, a second Ctrl-C or the end of a pipe."""
        completions = [f"/{name}" for name in COMMANDS] + [f"/settings {field.name}" for field in fields(SampleConfig)]
        system = "".join(f"\nsystem text: {message['content']}" for message in self.chat.system)
        for text in said(f"Say something; /help lists the commands, Ctrl-C ends a reply, Ctrl-D the chat.{system}", completions):
            try:
                self.act(text)
            except InputError as error:
                note(f"error: {error}")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal():
                    raise
                print()

    def act(self, text: str) -> None:
        """Answer a message, or do what a command says."""
        if not text.startswith("/") or text.startswith("//"):
            return self.answer(self.chat.ask(text[1:] if text.startswith("//") else text))
        name, *rest = text[1:].split(maxsplit=1) or [""]
        if name not in COMMANDS:
            raise InputError(f"no command /{name}: there are {', '.join(f'/{name}' for name in COMMANDS)}; "
                             "a message that begins with / is typed with two, //")
        if rest and not COMMANDS[name][0]:
            raise InputError(f"/{name} takes nothing after it")
        getattr(self, name)(*rest)

    def answer(self, pieces: Generator[str]) -> None:
        """Show a reply as it comes, and then what is to be said of it; Ctrl-C ends the reply alone."""
        start, before = time.perf_counter(), self.chat.messages
        with closing(pieces):
            try:
                show(pieces)
            except KeyboardInterrupt:
                if not at_terminal():
                    raise
                print()
        if at_terminal():
            speed = self.chat.tokens / (time.perf_counter() - start)
            note(f"{self.chat.tokens:,} tokens, {speed:.{0 if speed >= 10 else 1}f} tokens/s, {ENDINGS[self.chat.finish]}")
        if self.chat.messages is before:
            note("(no reply: the conversation is as it was)")
        if self.chat.dropped:
            note(f"(the oldest {self.chat.dropped} messages no longer fit and were left out)")

    def help(self) -> None:
        """The commands and keys."""
        rows = {f"/{name} {after}": what for name, (after, what) in COMMANDS.items()}
        note("\n".join(f"{usage:<26}{what}" for usage, what in rows.items()) + f"\n{KEYS}")

    def undo(self) -> None:
        """Forget the last exchange."""
        self.need_exchange()
        note(f"forgotten: {one_line(self.chat.undo())[:60]}")

    def regenerate(self) -> None:
        """Another reply to the last message."""
        self.need_exchange()
        if self.chat.config.temperature == 0:
            note("at temperature 0 the same message gets the same reply; /settings temperature 0.8 changes that")
        self.answer(self.chat.ask_again())

    def reset(self) -> None:
        """Begin anew with the same system text."""
        self.begin(self.chat.system)

    def system(self, text: str = "") -> None:
        """Show the system text, or begin anew with this one."""
        if text:
            self.begin([] if text in ('""', "''") else [{"role": "system", "content": text}])
        note("".join(f"system text: {message['content']}" for message in self.chat.system) or "no system text")

    def begin(self, messages: formats.Conversation) -> None:
        """A conversation that is in no file."""
        self.chat.begin(messages)
        self.file = None
        note("a new conversation")

    def settings(self, text: str = "") -> None:
        """Change how replies are chosen, if that is asked, and show it."""
        self.chat.config = changed(self.chat.config, text)
        rows = vars(self.chat.config) | {"stop": " ".join(map(repr, self.chat.config.stop)) or "none"}
        note("\n".join(f"{name:<20}{value}" for name, value in rows.items()))

    def save(self, name: str = "") -> None:
        """Write the conversation, whole or not at all, over nothing but its own file."""
        self.need_exchange()
        file = name or self.file
        if not file:
            raise InputError("/save FILE: into which file?")
        with trouble_with(str(file)):
            path = Path(file).expanduser().resolve()
            if path.exists() and path != self.file:
                raise InputError(f"{path} exists, and is not this conversation: name another file")
            temporary = path.with_name(f".tmp-{path.name}")
            try:
                write_json(temporary, {"messages": self.chat.messages})
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        self.file = path
        note(f"saved {len(self.chat.exchanges)} messages in {path}")

    def load(self, name: str = "") -> None:
        """Go on with the first conversation of a file, in any format that `formats.read` takes."""
        if not name:
            raise InputError("/load FILE: from which file?")
        with trouble_with(name):
            path = Path(name).expanduser().resolve()
            conversations, _ = formats.read(path)
        messages = conversations[0]
        roles = [message["role"] for message in messages if message["role"] != "system"]
        if (roles[0], roles[-1]) != ("user", "assistant"):
            raise InputError(f"{path}: the first message is the {roles[0]}'s and the last the {roles[-1]}'s, must be the user's and the assistant's")
        self.chat.begin(messages)
        self.file = path if len(conversations) == 1 else None  # a data set is not written over
        note(f"{len(roles)} messages" + (f", the first of {len(conversations):,} conversations" if len(conversations) > 1 else ""))

    def quit(self) -> None:
        """As Ctrl-D does."""
        raise EOFError

    def need_exchange(self) -> None:
        """InputError if there is nothing to act on."""
        if not self.chat.exchanges:
            raise InputError("nothing has been said yet")


def changed(config: SampleConfig, text: str) -> SampleConfig:
    """The settings after a change such as "temperature 0.5 stop '###'"; InputError says what is allowed."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(config)}
    try:
        words = shlex.split(text)
    except ValueError:
        raise InputError(f"{text}: a quotation mark without its other one") from None
    values: dict = {}
    for name, *value in (words[i : i + 2] for i in range(0, len(words), 2)):
        if name not in kinds:
            raise InputError(f"no setting {name}: there are {', '.join(kinds)}")
        if not value:
            raise InputError(f"{name} has no value")
        if name == "stop":  # several are several pairs; an empty one is none
            values["stop"] = (*values.get("stop", ()), *filter(None, value))
            continue
        try:
            values[name] = kinds[name](value[0])
        except ValueError:
            raise InputError(f"{name} is {value[0]}, must be {'a whole number' if kinds[name] is int else 'a number'}") from None
    return replace(config, **values)


@contextmanager
def trouble_with(name: str) -> Iterator[None]:
    """Says in one line what is wrong with a file that the user names."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # no such folder; a NUL in the name; ~nobody
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


# ------------------------------------------------------------------ keyboard and screen


def at_terminal() -> bool:
    """Whether a person types and looks."""
    return all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))


def said(banner: str, completions: Iterable[str] = ()) -> Iterator[str]:
    """What a user says: at a terminal until Ctrl-D or a second Ctrl-C; from a pipe every line with text."""
    if not at_terminal():
        yield from filter(None, (line.strip("\ufeff \t\r\n") for line in sys.stdin))  # a BOM: from Windows' pipes
        return
    with keys_waiting(interrupt=False):  # while a prompt is made ready too: a signal raised in its midst can get lost
        note(banner)
        session, warned = line_editor(list(completions)), False
        while True:
            try:
                text = whole_pairs(session.prompt()).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                abandoned = session.default_buffer.text  # a line half typed: Ctrl-C begins a new one, as in a shell
                if warned and not abandoned:
                    raise
                warned = not abandoned
                if warned:
                    note("Ctrl-C once more, or Ctrl-D, ends it")
                continue
            warned = False
            if text:
                with keys_waiting(interrupt=True):
                    yield text


@contextmanager
def keys_waiting(interrupt: bool) -> Iterator[None]:
    """While this is open, what is typed waits, unseen, for the next prompt, Enter as Enter; Ctrl-C too, or it interrupts."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    flags = list(before)
    flags[0] &= ~termios.ICRNL  # which makes of Enter a Ctrl+J
    flags[3] = flags[3] & ~termios.ECHO & ~termios.ISIG | (termios.ISIG if interrupt else 0)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, flags)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def line_editor(completions: list[str]):
    """A PromptSession of prompt_toolkit, which is read only here: 0.2 s that a pipe does not wait for."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession("> ", key_bindings=keys, prompt_continuation="  ", completer=WordCompleter(completions, sentence=True),
                         complete_while_typing=False, complete_style=CompleteStyle.READLINE_LIKE)


def show(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come."""
    for piece in pieces:
        print(safe(piece), end="", flush=True)
    print()


def safe(text: str) -> str:
    """The text as standard output takes it: a terminal without the control characters, on which it would act."""
    return text.translate(CONTROL) if sys.stdout and sys.stdout.isatty() else text


def note(text: str) -> None:
    """Say something that is no reply: dim at a terminal, else on standard error."""
    if not at_terminal():
        print(text, file=sys.stderr, flush=True)
    elif os.environ.get("TERM") == "dumb":
        print(safe(text))
    else:
        print(f"\033[2m{safe(text)}\033[0m")
