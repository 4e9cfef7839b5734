"""The terminal chat: its commands from a pipe, and its keys in a real (pseudo-)terminal."""

import io
import itertools
import json
import multiprocessing
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat import formats, generate, runs, runtime, terminal
from nanochat.dialogue import render_prompt
from nanochat.generate import Chat, SampleConfig
from nanochat.model import GPT
from nanochat.terminal import COMMANDS, Talk

ROOT = Path(__file__).parent.parent
PROMPT = "\x1b[?2004h"  # prompt_toolkit asks the terminal for pastes in brackets
KEYS = {"enter": "\r", "alt-enter": "\x1b\r", "ctrl-c": "\x03", "ctrl-d": "\x04", "ctrl-j": "\n", "up": "\x1b[A", "tab": "\t"}


@pytest.fixture
def chat(make_model, tokenizer):
    """chat(says=text, **settings) → a Chat with a model that says the first token of `says` for ever; without, random text."""

    def make(says: str = "", system: str = "", block_size: int = 128, **settings) -> Chat:
        model = make_model(vocab_size=tokenizer.vocab_size, block_size=block_size, noise=0.5)
        if says:
            with torch.no_grad():
                model.ln_f.weight.zero_()
                model.ln_f.bias.fill_(1.0)
                model.wte.weight[tokenizer.encode(says)] = 5.0
        return Chat(model, tokenizer, SampleConfig(**{"max_new_tokens": 4, "temperature": 1} | settings), system)

    return make


@pytest.fixture
def piped(monkeypatch, capsys):
    """piped(talk, line, …) → (stdout, stderr) of a talk with these lines from a pipe."""

    def run(talk: Talk, *lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        talk.run()
        return capsys.readouterr()

    return run


class Terminal:
    """A terminal in which `child` runs in a process of its own, and whose keys are pressed by `type`."""

    def __init__(self, child: Callable[[], None], **environment: str):
        pty = pytest.importorskip("pty", reason="no terminals of this kind here")
        self.screen = b""
        self.process, self.master = pty.fork()
        if self.process == 0:
            os.environ.update({"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"} | environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            code = 0
            try:
                runtime.run_as_script(child)
            except SystemExit as end:
                code = end.code
            sys.stdout.flush()
            os._exit(code)

    def until(self, text: str, count: int = 1, start: int | None = None) -> str:
        """Read until `text` has come so often after the first `start` bytes of the screen, or from now on; → what came there."""
        start, deadline = len(self.screen) if start is None else start, time.monotonic() + 60
        while self.screen[start:].count(text.encode()) < count:
            assert time.monotonic() < deadline, self.screen[-2000:]
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 1 << 16)
        return self.screen[start:].decode(errors="replace")

    def type(self, *keys: str) -> None:
        """Press keys, by their names or as text."""
        for key in keys:
            os.write(self.master, KEYS.get(key, key).encode("utf-8", "surrogateescape"))

    def do(self, *keys: str, then: str = PROMPT) -> str:
        """Type, and read until the next prompt; → what was read."""
        self.type(*keys)
        return self.until(then)

    def code(self) -> int:
        """Read to the end; → the exit code."""
        try:
            while select.select([self.master], [], [], 60)[0] and (data := os.read(self.master, 1 << 16)):
                self.screen += data
            os.kill(self.process, signal.SIGKILL)  # it hangs, or is gone
        except OSError:  # how Linux ends a terminal
            pass
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def at_terminal(tmp_path):
    """at_terminal(chat, command …) → a Terminal in which the chat runs, at its first prompt."""

    def start(chat: Chat) -> Terminal:
        found = Terminal(Talk(chat).run)
        assert "Say something; /help" in found.until(PROMPT)
        return found

    return start


def said_in(path: Path) -> list[str]:
    """What was said in a saved conversation."""
    return [message["content"] for message in json.loads(path.read_text(encoding="utf-8"))["messages"]]


# what a chat remembers


@pytest.mark.parametrize("says", ["a", ""], ids=["aaa", "random"])
def test_a_second_turn_reads_only_what_is_new_and_says_what_a_fresh_chat_says(chat, tokenizer, monkeypatch, says):
    read, features = [], GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, tokens, **kwargs: read.extend(tokens[0].tolist()) or features(self, tokens, **kwargs))
    one = chat(says, temperature=0, max_new_tokens=8)
    first = "".join(one.ask("How many boats?"))
    known = list(one.reader.ids[0])
    read.clear()
    second = "".join(one.ask("And now?"))
    prompt = render_prompt(one.messages[:-1], tokenizer)
    kept = generate.shared_prefix(known, prompt)
    if says:  # all but the last token of the reply, which was chosen and not read; random bytes are other ids when read again
        assert kept == len(render_prompt(one.messages[:1], tokenizer)) + 7
    assert read[: len(prompt) - kept] == prompt[kept:]
    assert len(read) == len(prompt) - kept + one.tokens - (one.finish == "length")

    fresh = Chat(one.model, tokenizer, one.config)
    fresh.begin(one.messages[:2])
    assert one.messages[1]["content"] == first and "".join(fresh.ask("And now?")) == second != ""
    assert (fresh.tokens, fresh.finish) == (one.tokens, one.finish)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_reading_that_is_broken_off_leaves_nothing_half_known(chat, tokenizer, monkeypatch, kind):
    one, append = chat(temperature=0, max_new_tokens=8), generate.Reader.features
    "".join(one.ask("How many boats are there?"))
    kept = list(one.messages)

    def broken(reader, row, ids):
        append(reader, row, ids)
        raise kind

    monkeypatch.setattr(generate.Reader, "features", broken)
    one.undo()
    with pytest.raises(kind):
        "".join(one.ask("How odd is it to be the one who asks?"))
    monkeypatch.setattr(generate.Reader, "features", append)
    assert one.messages == []  # nothing was replied
    "".join(one.ask("How many boats are there?"))
    assert one.messages == kept


def test_a_chat_counts_the_tokens_of_a_reply_and_says_what_ended_it(chat, tokenizer):
    endless = chat(says="a", temperature=0, max_new_tokens=7)
    "".join(endless.ask("Hi"))
    assert (endless.tokens, endless.finish) == (7, "length")
    pieces = endless.ask("Hi")
    next(pieces), next(pieces)
    pieces.close()
    assert (endless.tokens, endless.finish) == (2, "cut") and endless.messages[-1]["content"] == "aa"
    endless.config.stop = ("aaa",)
    "".join(endless.ask("Hi"))
    assert endless.finish == "stop"
    silent = chat(temperature=0)
    with torch.no_grad():
        silent.model.ln_f.weight.zero_()
        silent.model.ln_f.bias.fill_(1.0)
        silent.model.wte.weight[tokenizer.control["<|end|>"]] = 5.0
    assert "".join(silent.ask("Hi")) == "" and (silent.tokens, silent.finish, silent.messages) == (0, "stop", [])


# commands, from a pipe


def test_commands_act_and_standard_output_holds_replies_alone(chat, piped, tmp_path):
    talk = Talk(chat(says="a", system="Be kind."))
    out, err = piped(talk, "Hi", "/settings temperature 0.5 top_p 0.25 stop aaa stop 'b c'", "/help", "/system", "//usr", "/undo", "/quit", "never")
    assert out == "aaaa\n\n"  # the second reply stops before it begins
    assert talk.chat.config == SampleConfig(4, temperature=0.5, top_p=0.25, stop=("aaa", "b c"))
    assert all(f"/{name}" in err for name in COMMANDS) and "temperature         0.5\n" in err and "stop                'aaa' 'b c'\n" in err
    assert "system text: Be kind.\n" in err and "(no reply: the conversation is as it was)\n" in err and "forgotten: Hi\n" in err
    assert talk.chat.messages == [{"role": "system", "content": "Be kind."}] and "Say something" not in err and "tokens/s" not in err
    talk.chat.config = SampleConfig(4)
    out, err = piped(talk, "//usr/bin", "/settings stop x", "/settings stop ''", "/settings")
    assert [m["content"] for m in talk.chat.exchanges] == ["/usr/bin", "aaaa"]
    assert re.findall(r"^stop +(.*)$", err, re.M) == ["'x'", "none", "none"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("/bogus", "no command /bogus: there are /help, .*, /quit; a message that begins with / is typed with two, //"),
        ("/", "no command /: there are /help, .*"),
        ("/usr/bin is full", "no command /usr/bin: there are .*"),
        ("/undo 2", "/undo takes nothing after it"),
        ("/settings top_q 3", "no setting top_q: there are max_new_tokens, temperature, .*, seed"),
        ("/settings top_p 3", "--top-p is 3.0, must be from 0 to 1"),
        ("/settings top_k 3 temperature -1", "--temperature is -1.0, must be from 0 to 100"),
        ("/settings temperature nan", "--temperature is nan, must be from 0 to 100"),
        ("/settings max_new_tokens 1.5", "max_new_tokens is 1.5, must be a whole number"),
        ("/settings min_p x", "min_p is x, must be a number"),
        ("/settings top_k 3 seed", "seed has no value"),
        ("/settings stop 'x", "stop 'x: a quotation mark without its other one"),
        ("/save", r"/save FILE: into which file\?"),
        ("/save taken.txt", ".*/taken.txt exists, and is not this conversation: name another file"),
        ("/save no/folder/chat.json", "no/folder/chat.json: No such file or directory"),
        ("/save .", ".* exists, .*"),
        ("/save a\0b", "a\0b: .*"),
        ("/save ~nobody-of-this-name/chat.json", "~nobody.*: Could not determine home directory.*"),
        ("/load", r"/load FILE: from which file\?"),
        ("/load none.json", "none.json: No such file or directory"),
        ("/load .", r"\.: Is a directory"),
        ("/load taken.txt", r".*/taken.txt:1: .*no usable conversation.*"),
        ("/load half.json", ".*/half.json: the first message is the user's and the last the user's, must be the user's and the assistant's"),
        ("/load greeting.json", ".*/greeting.json: the first message is the assistant's and the last the assistant's, must be .*"),
        ("/load long.json", "system text and message have .* tokens with the template; at most .* fit"),
        ("QZ" * 5000, "the message has 10,0.. tokens with the template; at most 124 fit"),
    ],
    ids=lambda value: value[:24].replace("\0", "0"),
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(chat, piped, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    user, reply, system = ({"role": role, "content": "Hi"} for role in ("user", "assistant", "system"))
    Path("taken.txt").write_text("no chat", encoding="utf-8")
    for name, messages in {"half": [user, reply, user], "greeting": [reply], "long": [system | {"content": "QZ" * 99}, user, reply]}.items():
        Path(f"{name}.json").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    files, talk = sorted(tmp_path.iterdir()), Talk(chat(says="a"))
    piped(talk, "Hi")
    before, config = list(talk.chat.messages), talk.chat.config
    out, err = piped(talk, line)
    assert out == "" and re.fullmatch(f"error: {message}\n", err), err
    assert (talk.chat.messages, talk.chat.config, talk.file, sorted(tmp_path.iterdir())) == (before, config, None, files)
    assert Path("taken.txt").read_text(encoding="utf-8") == "no chat"


@pytest.mark.parametrize("name", ["undo", "regenerate", "save chat.json"])
def test_before_anything_is_said_there_is_nothing_to_undo_repeat_or_save(chat, piped, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert piped(Talk(chat(system="Be kind.")), f"/{name}") == ("", "error: nothing has been said yet\n") and not list(tmp_path.iterdir())


def test_regenerate_gives_another_reply_in_place_of_the_last(chat, piped):
    talk = Talk(chat(max_new_tokens=12))
    out, err = piped(talk, "Hi", "How are you?", "/regenerate", "/regenerate")
    first = talk.chat.messages[1]["content"]
    assert len(talk.chat.messages) == 4 and err == "" and out.startswith(first + "\n") and out.endswith(talk.chat.messages[-1]["content"] + "\n")
    replies = set()
    for _ in range(3):
        piped(talk, "/regenerate")
        replies.add(talk.chat.messages[-1]["content"])
    assert len(replies) == 3 and talk.chat.messages[2]["content"] == "How are you?"

    greedy = Talk(chat(temperature=0))
    out, err = piped(greedy, "Hi", "/regenerate")
    assert len(set(out.splitlines())) == 1 and err.startswith("at temperature 0 the same message gets the same reply")


def test_a_conversation_is_saved_loaded_and_gone_on_with(chat, piped, tokenizer, tmp_path):
    file, talk = tmp_path / "我 的.json", Talk(chat(says="a", system="你是助手。"))
    said = ["你好🙂", 'a "quote" \\ and \x00 a NUL', "third"]
    out, err = piped(talk, *said[:2], f"/save {file}", said[2], "/save")
    assert err.endswith(f"saved 4 messages in {file}\nsaved 6 messages in {file}\n") and list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": talk.chat.messages}
    assert said_in(file) == ["你是助手。", said[0], "aaaa", said[1], "aaaa", said[2], "aaaa"] and "你好🙂" in file.read_text(encoding="utf-8")
    assert formats.read(file) == ([talk.chat.messages], [])  # data to learn from

    other = Talk(chat(says="b"))
    out, err = piped(other, "Hello", f"/load {file}", "four", "/save", "/reset", f"/save {file}")
    assert err.splitlines() == ["6 messages", f"saved 8 messages in {file}", "a new conversation", "error: nothing has been said yet"]
    assert said_in(file) == [*(m["content"] for m in talk.chat.messages), "four", "bbbb"]
    _, err = piped(other, "new", "/save")
    assert err == "error: /save FILE: into which file?\n" and other.chat.system == talk.chat.system
    _, err = piped(other, f"/save {file}")
    assert "exists, and is not this conversation" in err and len(said_in(file)) == 9


def test_of_a_data_set_the_first_conversation_is_gone_on_with_and_it_is_not_written_over(chat, piped, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "你好", "completion": "您好"}\n{"prompt": "b", "completion": "c"}\n', encoding="utf-8")
    talk = Talk(chat(says="a"))
    _, err = piped(talk, f"/load {data}", "/save")
    assert err == "2 messages, the first of 2 conversations\nerror: /save FILE: into which file?\n"
    assert [m["content"] for m in talk.chat.messages] == ["你好", "您好"]


def test_a_save_that_fails_leaves_the_file_as_it_was(chat, piped, tmp_path, monkeypatch):
    file, talk = tmp_path / "chat.json", Talk(chat(says="a"))
    piped(talk, "Hi", f"/save {file}")
    before = file.read_bytes()

    def full(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(terminal, "write_json", full)
    _, err = piped(talk, "more", "/save")
    assert err == f"error: {file}: No space left on device\n" and file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_new_system_text_begins_a_new_conversation_and_a_reset_keeps_it(chat, piped):
    talk = Talk(chat(says="a", system="Be kind."))
    _, err = piped(talk, "Hi", "/reset", "/system", "Hi", "/system 你是 助手", "Hi", "/undo")
    assert err == "a new conversation\nsystem text: Be kind.\na new conversation\nsystem text: 你是 助手\nforgotten: Hi\n"
    assert talk.chat.messages == [{"role": "system", "content": "你是 助手"}]
    _, err = piped(talk, "/system " + "QZ" * 99)
    assert "at most 124 fit" in err and len(talk.chat.messages) == 1
    _, err = piped(talk, '/system ""', "/system")
    assert err == "a new conversation\nno system text\nno system text\n" and talk.chat.messages == []


def test_ctrl_c_in_a_pipe_ends_the_program(chat, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "features", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHi"))
    with pytest.raises(KeyboardInterrupt):
        Talk(chat()).run()


def test_ctrl_c_between_two_pieces_keeps_what_is_shown(chat, monkeypatch, capsys):
    def interrupted(pieces):
        print(next(pieces) + next(pieces), end="")
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "at_terminal", lambda: True)
    monkeypatch.setattr(terminal, "show", interrupted)
    talk = Talk(chat(says="a"))
    talk.act("Hi")
    assert re.fullmatch(r"aa\n\x1b\[2m2 tokens, [\d.,]+ tokens/s, cut\x1b\[0m\n", capsys.readouterr().out)
    assert talk.chat.messages[-1]["content"] == "aa"


# keys and screen


def test_a_chat_at_a_terminal_with_its_commands(chat, at_terminal, tmp_path):
    keyboard = at_terminal(chat(max_new_tokens=6))
    for text in ("你好🙂", "🙂🙂🙂", "one"):
        shown = keyboard.do(text, "enter")
        assert text in shown and re.search(r"\x1b\[2m6 tokens, [\d.]+ tokens/s, reached max_new_tokens\x1b\[0m", shown)
    shown = keyboard.do("/undo", "enter")
    assert "forgotten: one" in shown and "tokens/s" not in shown
    for name in ("first", "second"):
        keyboard.do(f"/save {tmp_path / name}", "enter")
        keyboard.do("/regen", "tab", "enter")
    one, two = said_in(tmp_path / "first"), said_in(tmp_path / "second")
    assert one[:3] == two[:3] and one[3] != two[3] and (one[0], one[2]) == ("你好🙂", "🙂🙂🙂")
    keyboard.do(f"/load {tmp_path / 'first'}", "enter")
    keyboard.do("", "enter")
    keyboard.do("   ", "enter")
    time.sleep(0.3)  # prompt_toolkit reads its history beside the keys
    keyboard.do(*["up"] * 8, "!", "enter")  # the history: spaces, /load, /regenerate, /save, /regenerate, /save, /undo, one
    keyboard.do(f"/save {tmp_path / 'third'}", "enter")
    third = said_in(tmp_path / "third")
    assert third[:4] == one and third[4] == "one!" and len(third) == 6
    keyboard.type("ctrl-d")
    assert keyboard.code() == 0 and b"Traceback" not in keyboard.screen


def test_a_pasted_text_and_alt_enter_make_one_message_with_its_lines(chat, at_terminal, tmp_path):
    keyboard = at_terminal(chat(says="a", block_size=256))
    keyboard.do("\x1b[200~first\r\n  second 行\rthird\n\x1b[201~", "enter")
    keyboard.do("a", "alt-enter", "b", "ctrl-j", "c", "enter")
    keyboard.do("\x1b[200~x\x00\x1b[31my\x1b[201~", "enter")  # control characters are text too
    keyboard.do("\x1b[200~no \udcff UTF-8\x1b[201~", "enter")
    keyboard.do(f"/save {tmp_path / 'chat.json'}", "enter")
    assert said_in(tmp_path / "chat.json")[::2] == ["first\n  second 行\nthird", "a\nb\nc", "x\x00\x1b[31my", "no \ufffd UTF-8"]
    assert "the message has 1" in keyboard.do(f"\x1b[200~{'QZ' * 6000}\x1b[201~", "enter")
    keyboard.type("/quit", "enter")
    assert keyboard.code() == 0


def test_ctrl_c_ends_a_reply_which_is_remembered_and_twice_at_the_prompt_the_chat(chat, at_terminal, tmp_path):
    keyboard = at_terminal(chat(says="a", max_new_tokens=10**8))
    keyboard.type("Hi", "enter")
    keyboard.until("aaaa")
    assert re.search(r"tokens, [\d.,]+ tokens/s, cut", keyboard.do("ctrl-c"))
    keyboard.do(f"/save {tmp_path / 'chat.json'}", "enter")
    said = said_in(tmp_path / "chat.json")
    assert said[0] == "Hi" and len(said[1]) > 3 and said[1] == "a" * len(said[1]) and said[1].encode() in re.sub(rb"[\r\n]", b"", keyboard.screen)
    assert "once more" not in keyboard.do("half a line", "ctrl-c")
    assert "Ctrl-C once more, or Ctrl-D, ends it" in keyboard.do("ctrl-c")
    for between in ["half a line", "ctrl-c"], ["/help", "enter"]:  # two in a row count, at an empty prompt
        keyboard.do(*between)
        assert "once more" in keyboard.do("ctrl-c")
    keyboard.type("ctrl-c")
    assert keyboard.code() == 130 and b"Traceback" not in keyboard.screen and b"finish" not in keyboard.screen


def test_what_is_typed_during_a_reply_waits_for_the_prompt(chat, at_terminal, tmp_path, monkeypatch):
    talking, typed, calls = chat(says="a", max_new_tokens=500), multiprocessing.Event(), itertools.count()
    features = talking.model.features
    monkeypatch.setattr(talking.model, "features",
                        lambda *args, **more: (next(calls) < 100 or typed.wait(60)) and features(*args, **more))
    keyboard = at_terminal(talking)
    start = len(keyboard.screen)
    keyboard.type("Hi", "enter")
    keyboard.until("aaaa")
    keyboard.type("next", "enter")
    typed.set()  # the reply does not end before
    shown = keyboard.until("tokens/s", 2, start)
    assert shown.index("next") > shown.index("tokens/s") and "a" * 500 in shown
    keyboard.do(f"/save {tmp_path / 'chat.json'}", "enter", then="saved 4")
    assert said_in(tmp_path / "chat.json")[::2] == ["Hi", "next"]
    keyboard.type("/quit", "enter")
    assert keyboard.code() == 0


def test_what_a_model_says_does_not_act_on_the_terminal(chat, at_terminal):
    for sign in "\x1b", "\r", "\x07":
        keyboard = at_terminal(chat(says=sign, temperature=0))
        assert "\ufffd\ufffd\ufffd\ufffd\r\n" in keyboard.do("Hi", "enter")
        keyboard.type("ctrl-d")
        assert keyboard.code() == 0
    assert terminal.safe("a\x1b[2J") == "a\x1b[2J"  # what is no terminal gets what was said


def test_a_dumb_terminal_in_a_locale_without_utf8(chat, tokenizer, tmp_path):
    """The whole of sample.py, as a user starts it; its system text is the checkpoint's own."""
    model, tokenizer.system = chat(says="a").model.float(), "你是助手。"
    try:
        runs.save(tmp_path / "run", 1, model, tokenizer, settings={}, results={})
    finally:
        del tokenizer.system
    flags = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", "run", "--max-new-tokens", "100000000"]
    keyboard = Terminal(lambda: (os.chdir(tmp_path), os.execv(sys.executable, flags)), TERM="dumb", LC_ALL="C", PYTHONUTF8="0")
    assert "system text: 你是助手。" in keyboard.until("> ")
    keyboard.type("你好🙂", "enter")
    keyboard.until("aaa")
    keyboard.type("ctrl-c")
    keyboard.until("> ")
    keyboard.type("/save chat.json", "enter")
    keyboard.until("chat.json\r\n> ")
    for _ in range(20):  # each pressed just as the prompt appears: none gets lost
        keyboard.type("half a line", "ctrl-c")
        keyboard.until("\n> ")
    keyboard.type("ctrl-c")
    keyboard.until("\n> ")
    keyboard.type("ctrl-c")
    assert keyboard.code() == 130 and said_in(tmp_path / "chat.json")[:2] == ["你是助手。", "你好🙂"]
    screen = keyboard.screen.decode()
    assert "> 你好🙂" in screen and "\x1b[2m" not in screen and screen.endswith("interrupted\r\n") and "Traceback" not in screen
