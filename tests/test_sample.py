"""sample.py in one process and in a real terminal; and the command lines of all three scripts."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType

import pytest
import torch

import finetune
import sample as sample_script
import train
from nanochat import checkpoint, generate, runs, runtime
from nanochat.dialogue import render_prompt, shared_system, with_system
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train.py": train, "finetune.py": finetune, "sample.py": sample_script}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A folder with tiny run folders: chat answers "a" for ever, huge overflows, base and random are what they are."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)).eval()

    def save(name: str, tokenizer: Tokenizer = tokenizer) -> None:
        runs.save(folder / name, 1, model, tokenizer, settings={}, results={})

    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        save("random")
        save("base", Tokenizer(tokenizer.merges, list(tokenizer.control)))
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.encode("a")] = 5.0
        save("chat")
        model.ln_f.bias.fill_(3e38)
        save("huge")
    return folder


@pytest.fixture
def sample(saved, monkeypatch, capsys):
    """sample(flags …, stdin=…) → (exit code, stdout, stderr) of sample.py, run in this process."""

    def run(*flags, stdin: bytes = b"", terminal: bool = False):
        monkeypatch.chdir(saved)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        keyboard = io.BytesIO(stdin)
        keyboard.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(keyboard, encoding="ascii"))
        code = 0
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


# completing and answering


def test_raw_greedy_text_is_that_of_hugging_faces_generate(saved, sample, capsys):
    transformers = pytest.importorskip("transformers")
    folder = saved / "random" / "last"
    theirs, their_tokenizer = (
        kind.from_pretrained(folder) for kind in (transformers.GPT2LMHeadModel, transformers.AutoTokenizer)
    )
    capsys.readouterr()  # their progress bar
    for prompt in ("The miller's daughter", "小河流过", "a"):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=30)[0]
        # ours ends at a role's token too
        control = [i for i, token in enumerate(ids.tolist()) if token in their_tokenizer.all_special_ids]
        expected = their_tokenizer.decode(ids[: min(control, default=len(ids))])
        flags = ["--raw", "--temperature", 0, "--max-new-tokens", 30, "--prompt", prompt]
        code, out, err = sample("--checkpoint", "random", *flags)
        assert (code, out, err) == (0, expected + "\n", "")
        assert len(set(ids.tolist())) > 8  # it said something


def test_a_chat_checkpoint_answers_and_a_base_one_continues(sample):
    flags = ["--temperature", 0, "--max-new-tokens", 3, "--prompt", "Hi"]
    assert sample("--checkpoint", "chat", *flags) == (0, "aaa\n", "")
    assert sample("--checkpoint", "chat", "--raw", *flags) == (0, "Hiaaa\n", "")
    assert sample("--checkpoint", "chat", "--num-samples", 2, *flags)[1] == "--- 1\naaa\n--- 2\naaa\n"
    code, out, _ = sample("--checkpoint", "base", *flags)
    assert code == 0 and out.startswith("Hi")


def test_a_raw_prompt_longer_than_the_block_is_cut_with_a_line(sample):
    prompt = "QZ" * 50
    code, out, err = sample(
        "--checkpoint", "chat", "--raw", "--temperature", 0, "--max-new-tokens", 2, "--prompt", prompt
    )
    assert code == 0 and out == prompt + "aa\n"
    assert err == "--prompt has 100 tokens; only its last 32 are read\n"


def test_an_empty_raw_prompt_begins_a_text(sample):
    flags = ["--temperature", 0, "--max-new-tokens", 3, "--prompt", ""]
    assert sample("--checkpoint", "chat", "--raw", *flags) == (0, "aaa\n", "")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "no/such/folder", "--prompt", "a"], "no/such/folder: no such checkpoint"),
        (["--checkpoint", ".", "--prompt", "a"], "no config.json"),
        (["--checkpoint", "base"], "--prompt is missing"),
        (["--checkpoint", "chat", "--prompt", ""], "the message is empty"),
        (
            ["--checkpoint", "chat", "--prompt", "QZ" * 50],
            "the message has 1.. tokens with the template; at most 48 fit",
        ),
        (
            ["--checkpoint", "chat", "--system", "QZ" * 50],
            "system text and message have 1.. tokens with the template; at most 48 fit",
        ),
        (["--checkpoint", "base", "--prompt", "a", "--system", "b"], "--system is of use only to a model fine-tuned on"),
        (["--checkpoint", "chat", "--prompt", "a", "--system", "b", "--raw"], "--system is of use only to .* not with --raw"),
        (["--checkpoint", "chat", "--num-samples", "2"], "--num-samples is 2, but --prompt is missing"),
        (["--checkpoint", "huge", "--prompt", "a", "--num-samples", "2"], "the model's logits are not finite"),
        (["--checkpoint", "chat", "--prompt", "a", "--num-samples", "0"], "--num-samples is 0, must be at least 1"),
        (["--checkpoint", "chat", "--prompt", "a", "--device", "warp"], "--device warp: .*; try auto or cpu"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:24],
)
def test_wrong_input_is_one_line_and_exit_code_2(sample, flags, message):
    code, out, err = sample(*flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err


def test_a_checkpoint_with_another_template_is_refused(saved, sample):
    about = saved / "random" / "last" / "nanochat.json"
    content = json.loads(about.read_text(encoding="utf-8"))
    other = saved / "other"
    runs.save(other, 1, *checkpoint.load(saved / "random"), settings={}, results={})
    (other / "last" / "nanochat.json").write_text(json.dumps(content | {"template": "nanochat-0"}), encoding="utf-8")
    code, _, err = sample("--checkpoint", "other", "--prompt", "a")
    assert code == 2 and "made with chat template 'nanochat-0'" in err


def test_more_samples_than_fit_at_once_are_all_made_and_differ(sample):
    flags = ["--checkpoint", "random", "--raw", "--prompt", "a", "--max-new-tokens", 12, "--temperature", 1]
    code, out, err = sample(*flags, "--num-samples", 40)
    texts = re.split(r"--- \d+\na", out)[1:]
    assert (code, err, len(texts), len(set(texts))) == (0, "", 40, 40)
    assert re.findall(r"^--- (\d+)$", out, re.M) == [str(n) for n in range(1, 41)]


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_whole_number_is_a_seed(sample, seed):
    flags = ["--checkpoint", "random", "--prompt", "a", "--max-new-tokens", 8, "--num-samples", 2, "--seed", seed]
    code, out, err = sample(*flags)
    assert (code, err) == (0, "") and sample(*flags)[1] == out


def test_every_stop_string_counts_however_often_the_flag_is_given(sample):
    flags = ["--checkpoint", "chat", "--prompt", "a", "--max-new-tokens", 9]
    assert sample(*flags, "--stop", "aaa", "--stop", "b") == (0, "\n", "")
    assert sample(*flags, "--stop", "b", "--stop", "aaaaaaaaaa") == (0, "a" * 9 + "\n", "")


def test_a_start_reads_neither_the_compiler_nor_the_line_editor(saved):
    """They take 1.3 s and 0.2 s."""
    code = "import runpy, sys; runpy.run_path('sample.py', run_name='__main__'); print({'torch._dynamo', 'prompt_toolkit'} & set(sys.modules))"
    flags = ["--checkpoint", str(saved / "chat"), "--max-new-tokens", "2", "--prompt", "a"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "aa\nset()\n"), done


# the chat


def test_60_turns_through_the_real_chat_loop(sample, tokenizer, monkeypatch):
    read, decode = [], generate.generate

    def spy(model, prompts, *rest):
        read.extend(prompts)
        return decode(model, prompts, *rest)

    monkeypatch.setattr(generate, "generate", spy)
    lines = [f"{turn}: 你好🙂" + " Hello" * (turn % 3) for turn in range(60)]
    too_long = "QZ" * 200
    flags = ["--checkpoint", "chat", "--system", "Be kind.", "--max-new-tokens", 12, "--temperature", 0]
    code, out, err = sample(*flags, stdin="\n".join([*lines[:30], too_long, *lines[30:]]).encode())
    assert code == 0 and out == ("a" * 12 + "\n") * 60

    system = {"role": "system", "content": "Be kind."}
    needed = len(render_prompt([system, {"role": "user", "content": too_long}], tokenizer))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == [f"error: system text and message have {needed} tokens with the template; at most 52 fit"]
    left_out = [int(n) for n in re.findall(r"\(the oldest (\d+) messages no longer fit", err)]
    assert len(err.splitlines()) == 1 + len(left_out)

    said = []  # so far; a prompt is the system text, the newest exchanges that fit, and the line as it was typed
    left_out = [0] * (60 - len(left_out)) + left_out
    for line, prompt, dropped in zip(lines, read, left_out, strict=True):
        said.append({"role": "user", "content": line})
        assert prompt == render_prompt([system, *said[dropped:]], tokenizer) and len(prompt) <= 64 - 12
        if dropped:
            assert dropped % 2 == 0 and len(render_prompt([system, *said[dropped - 2 :]], tokenizer)) > 64 - 12
        said.append({"role": "assistant", "content": "a" * 12})
    assert left_out[0] == 0 and left_out[-1] > 100


def test_a_pipe_may_hold_empty_lines_bytes_that_are_no_text_and_a_byte_order_mark(sample, monkeypatch):
    asked, ask = [], generate.Chat.ask
    monkeypatch.setattr(generate.Chat, "ask", lambda chat, text: asked.append(text) or ask(chat, text))
    piped = b"\xef\xbb\xbfHi\r\n\n  \n\xff\xfe\xfa\n" + "你好🙂".encode()
    code, out, err = sample("--checkpoint", "chat", "--max-new-tokens", 2, stdin=piped)
    assert (code, out, err) == (0, "aa\n" * 3, "")
    assert asked == ["Hi", "\ufffd\ufffd\ufffd", "你好🙂"]


def test_a_chat_without_an_input_is_refused(sample, monkeypatch):
    monkeypatch.setattr(io, "TextIOWrapper", lambda *args, **kwargs: None)  # what sys.stdin is when it is closed
    code, out, err = sample("--checkpoint", "chat")
    assert (code, out) == (2, "") and err == "error: --prompt is missing, and there is no standard input to chat through\n"


def test_a_reader_that_has_enough_is_no_traceback(saved):
    read, write = os.pipe()
    os.close(read)  # as head does once it has its line
    running = [
        subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *flags], cwd=saved, stdout=write, stderr=subprocess.PIPE)
        for flags in (["--help"], ["--checkpoint", "chat", "--prompt", "a"])
    ]
    os.close(write)
    for process in running:
        stderr = process.communicate()[1].decode()
        assert "Traceback" not in stderr and "Exception" not in stderr and len(stderr.splitlines()) <= 1, stderr


# the system text of a checkpoint


@pytest.mark.parametrize(
    "systems, kept",
    [
        ({"你是助手。": 4}, "你是助手。"),
        ({"你是助手。": 3, "": 2}, "你是助手。"),
        ({"你是助手。": 2, "": 2}, ""),
        ({"": 3, "Be kind.": 2}, ""),
        ({"Be kind.": 2, "Be odd.": 2, "": 1}, ""),
        ({"Q" * 30: 4}, "Q" * 30),  # with its two control tokens, half of the block
        ({"Q" * 31: 4}, ""),  # more is cut in training
    ],
)
def test_the_shared_system_text_is_that_of_most_conversations(tokenizer, systems, kept):
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    talks = [with_system([hello], text)[0] if text else hello for text, count in systems.items() for _ in range(count)]
    assert shared_system(talks, tokenizer, 64) == kept


@pytest.mark.parametrize(
    "systems, flags, kept",
    [
        (["你是助手。"] * 25 + [""] * 15, [], "你是助手。"),
        (["Be odd."] * 5 + [""] * 35, ["--system", "Be kind.", "--method", "lora"], "Be kind."),
        (["Be kind."] * 18 + ["Be odd."] * 18 + [""] * 4, [], None),
    ],
    ids=["most", "the rest by a flag", "none"],
)
def test_the_system_text_of_most_training_conversations_begins_a_chat(
    saved, sample, tmp_path, monkeypatch, capsys, tokenizer, systems, flags, kept
):
    data = tmp_path / "data.jsonl"
    talks = [{"prompt": f"{i}: a", "completion": f"b {i}", "system": system} for i, system in enumerate(systems)]
    data.write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    run = ["--init", saved / "base", "--data", data, "--out", tmp_path / "out", "--max-steps", 1, "--eval-every", 1, "--optimizer", "adamw"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, run), *flags])
    finetune.main()
    learned = []
    monkeypatch.setattr(generate, "generate", lambda model, prompts, *rest: learned.extend(prompts) or iter([]))
    assert json.loads((tmp_path / "out" / "last" / "nanochat.json").read_text(encoding="utf-8"))["system"] == kept
    checkpoint_tokenizer = checkpoint.load(tmp_path / "out")[1]
    assert checkpoint_tokenizer.system == (kept or "")
    monkeypatch.setattr(sys, "argv", ["checkpoint", str(tmp_path / "out"), str(tmp_path / "converted")])
    checkpoint.main()
    capsys.readouterr()
    for folder in tmp_path / "out", tmp_path / "converted":
        for given, system in ([], kept), (["--system", ""], None), (["--system", "Hi."], "Hi."):
            talk = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Hello"}]
            learned.clear()
            assert sample("--checkpoint", folder, "--prompt", "Hello", *given)[0] == 0
            assert sample("--checkpoint", folder, *given, stdin=b"Hello")[0] == 0
            assert learned == [render_prompt(talk, checkpoint_tokenizer)] * 2


def test_a_system_text_that_is_no_text_is_refused(saved, sample, tmp_path):
    shutil.copytree(saved / "chat" / "last", tmp_path / "odd")
    about = tmp_path / "odd" / "nanochat.json"
    about.write_text(json.dumps(json.loads(about.read_text(encoding="utf-8")) | {"system": ["a"]}), encoding="utf-8")
    assert sample("--checkpoint", tmp_path / "odd", "--prompt", "a") == (2, "", f"error: {about}: system is list, must be text\n")


# the command lines of the three scripts


class Option(typing.NamedTuple):
    flag: str
    kinds: set  # the types that it takes
    default: object


def options(settings) -> Iterator[Option]:
    """Every setting of a script: the fields of its Settings, and of the settings in them."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), typing.get_type_hints(type(settings))[field.name]
        if is_dataclass(value):
            yield from options(value)
        else:
            kinds = set(typing.get_args(kind)) if typing.get_origin(kind) in (UnionType, typing.Union) else {kind}
            yield Option("--" + field.name.replace("_", "-"), kinds, value)


def type_in(name: str, flags: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script, in this process; a box on stderr loses its frame and line breaks."""
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as end:
        runtime.run_as_script(SCRIPTS[name].main)
    out, err = capsys.readouterr()
    return end.value.code, out, re.sub(r"[│╭╮╰╯─\s]+", " ", err)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_setting_with_type_and_default(name, monkeypatch, capsys):
    code, out, err = type_in(name, ["--help"], monkeypatch, capsys)
    assert (code, err) == (0, "")
    starts = re.split(r"\n│ (--[a-z0-9-]+)", re.sub(r" *│\n│ {6,}", " ", out))  # flag, what follows it, flag, …
    entries = dict(zip(starts[1::2], starts[2::2], strict=True))
    every = list(options(SCRIPTS[name].Settings()))
    assert set(entries) == {option.flag for option in every} and len(every) > 14
    names = {bool: " ", int: "INT", float: "FLOAT", str: "STR", Path: "PATH", type(None): "{None}"}
    for flag, kinds, default in every:
        shown = entries[flag].split("│")[0].rstrip()
        for kind in kinds:
            choices = "{" + ",".join(typing.get_args(kind)) + "}" if typing.get_origin(kind) is typing.Literal else ""
            assert (choices or names.get(kind, "STR")) in shown, (flag, shown)
        default = " ".join(default) if isinstance(default, tuple) else default
        text = "(repeatable)" if default == "" and tuple in map(typing.get_origin, kinds) else f"(default: {default if str(default) else repr(default)})"
        assert shown.endswith(text) and len(shown.split()) > 4, (flag, shown)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_option_is_refused_with_a_suggestion(name, monkeypatch, capsys):
    for flag, _, default in options(SCRIPTS[name].Settings()):
        typo = flag[:-1] + flag[-1] * 3 if default is not False else flag + "s"
        code, out, err = type_in(name, [typo, "1"], monkeypatch, capsys)
        assert (code, out) == (2, "") and f"Unrecognized options: {typo}" in err
        assert f"Perhaps you meant: {flag}" in err or re.search(rf"Perhaps you meant:.* {flag} ", err), err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_value_of_the_wrong_type_is_refused_with_flag_and_value(name, monkeypatch, capsys):
    for flag, kinds, _ in options(SCRIPTS[name].Settings()):
        wrong = ["many", "", "0x10"] if kinds & {int, float} else []
        wrong += ["1e3", "nan", "inf", "1.5"] if int in kinds else []
        wrong += ["float33"] if typing.Literal in map(typing.get_origin, kinds) else []
        for value in wrong:
            code, out, err = type_in(name, [flag, value], monkeypatch, capsys)
            assert (code, out) == (2, "") and flag in err and value in err and "Traceback" not in err, (flag, value)


REFUSED_LATER = {"--vocab-size", "--block-size", "--n-layer", "--n-head", "--n-embd", "--dropout"}  # the test below
HAVE_A_MEANING = {("--clip", "inf"), ("--clip", "1e999"), ("--seed", "-1")}  # no clipping; sample.py takes any seed


@pytest.mark.parametrize("name", ["train.py", "finetune.py", "sample.py"])
def test_a_number_that_means_nothing_is_refused_with_flag_and_value(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    passed = []
    for flag, kinds, _ in options(SCRIPTS[name].Settings()):
        for value in ("nan", "inf", "-inf", "1e999", "-1") if kinds & {int, float} and flag not in REFUSED_LATER else ():
            source = ["--checkpoint" if name == "sample.py" else "--data", "no/where.txt"]  # what a number that passes meets
            code, out, err = type_in(name, [*source, flag, value], monkeypatch, capsys)
            assert code == 2 and "Traceback" not in err
            shown = str(float(value)) if float in kinds else value
            if flag not in err or shown not in err:
                passed.append((flag, value))
    assert set(passed) <= HAVE_A_MEANING, passed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", sorted(REFUSED_LATER))
def test_a_size_that_means_nothing_is_refused_by_name(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(ROOT / "data" / "samples" / "garden.txt")]
    code, _, err = type_in("train.py", [*data, "--vocab-size", "320", flag, "-1"], monkeypatch, capsys)
    named = re.search(rf"error: .*({flag}|{flag[2:].replace('-', '_')}) is -1(\.0)?, must be ", err)
    assert code == 2 and named and "Traceback" not in err, err
    assert not (tmp_path / "out" / "pretrained").exists()
