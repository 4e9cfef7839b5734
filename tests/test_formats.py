"""formats: whatever form a user's conversations have, they are read, or one line says what to do."""

import json
import time
from pathlib import Path

import pytest
from test_resume import call_main, save_base

import finetune
from nanochat import InputError, formats, runtime
from nanochat.dialogue import to_rows
from nanochat.formats import Conversation, normalise

PAIR = [{"role": "user", "content": "你好 🙂"}, {"role": "assistant", "content": 'Hello, "you"!'}]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *PAIR]


def talk(*contents: str, first: str = "user") -> Conversation:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def read(tmp_path):
    """read(content, name) → the conversations and the problems, without the file's name."""

    def read(content: str | bytes, name: str) -> tuple[list[Conversation], list[str]]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        found, problems = formats.read(path)
        return found, [problem.removeprefix(f"{path}:") for problem in problems]

    return read


# ------------------------------------------------------------------ one record


@pytest.mark.parametrize("record, expected", [
    ({"instruction": "你好 🙂", "output": 'Hello, "you"!'}, PAIR),
    ({"instruction": "你好 🙂", "input": "", "output": 'Hello, "you"!', "system": ""}, PAIR),
    ({"instruction": "你好 🙂", "input": None, "output": 'Hello, "you"!', "history": [], "id": 3}, PAIR),
    ({"instruction": "你好 🙂", "output": 'Hello, "you"!', "system": "Be kind."}, WITH_SYSTEM),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, talk("Add.\n1 2", "3")),
    ({"instruction": "", "input": "1 2", "output": "3"}, talk("1 2", "3")),
    ({"instruction": "C?", "output": "c", "history": [["A?", "a"], ["B?", "b"]]}, talk("A?", "a", "B?", "b", "C?", "c")),
    ({"instruction": "C?", "input": "now", "output": "c", "system": "S", "history": [["A?", "a"]]},
     [{"role": "system", "content": "S"}, *talk("A?", "a", "C?\nnow", "c")]),
    ({"Instruction": "a", "OUTPUT": "b"}, talk("a", "b")),
    ({"prompt": "a", "completion": "b"}, talk("a", "b")),
    ({"prompt": talk("a"), "completion": talk("b", first="assistant")}, talk("a", "b")),
    ({"prompt": [{"role": "system", "content": "S"}, *talk("a", "b", "c")], "completion": talk("d", first="assistant")},
     [{"role": "system", "content": "S"}, *talk("a", "b", "c", "d")]),
    ({"question": "a", "answer": "b"}, talk("a", "b")),
    ({"query": "a", "response": "b"}, talk("a", "b")),
    ({"user": "a", "assistant": "b", "system": "S"}, [{"role": "system", "content": "S"}, *talk("a", "b")]),
    ({"input": "a", "output": "b"}, talk("a", "b")),
    ({"问题": "a", "回答": "b", "系统": "S"}, [{"role": "system", "content": "S"}, *talk("a", "b")]),
    ({"messages": [*talk("a"), *talk("b"), *talk("c", "d", first="assistant")]}, talk("a\nb", "c", "d")),
    ({"messages": talk("🙂👩‍👩‍👧", "🎉🎉")}, talk("🙂👩‍👩‍👧", "🎉🎉")),
    ({"messages": [{"role": "system", "content": " \n"}, *talk("a", "b")]}, talk("a", "b")),  # a blank system text is none
    ({"system": "S", "messages": [{"role": "system", "content": " "}, *talk("a", "b")]}, [{"role": "system", "content": "S"}, *talk("a", "b")]),
    ({"messages": talk("a", "b", " ")}, talk("a", "b")),  # nothing answers it
    ({"conversations": [{"from": "human", "value": "a", "weight": 0}, {"from": "gpt", "value": "b", "weight": 1}]}, talk("a", "b")),
    ({"messages": [{"role": "developer", "content": "S"}, *talk("a", "b")]}, [{"role": "system", "content": "S"}, *talk("a", "b")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *talk("c", first="assistant")]},
     talk("ab", "c")),
    ({"用户": "a", "助手": "b"}, talk("a", "b")),
    ({"messages": [{"role": "user", "content": "a", "name": "Ann", "x": None}, {"role": "assistant", "content": "b", "weight": 1}]}, talk("a", "b")),
])
def test_a_record_says_by_its_names_what_it_is(record, expected):
    assert normalise(record) == expected


@pytest.mark.parametrize("record, said", [
    ({"messages": talk("a", "")}, "assistant message 1 of 1 is empty"),
    ({"messages": talk("a", " \n")}, "assistant message 1 of 1 is empty"),
    ({"messages": talk("a", "b", "c", "  ")}, "assistant message 2 of 2 is empty"),
    ({"messages": talk(" ", "b")}, "user message 1 of 1 is empty"),
    ({"messages": [*talk("a"), {"role": "assistant", "content": "b", "weight": 0}]}, "weight 0 of a reply: here every reply is learned from"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of a user message is list, must be text"),
    ({"messages": talk("a")}, "no assistant message"),
    ({"messages": []}, "no assistant message"),
    ({"messages": [*talk("a", "b"), {"role": "system", "content": "S"}]}, "a system message must be the first one"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "role 'tool', must be one of ['system', 'user', 'assistant', 'developer']"),
    ({"messages": [{"role": "assistant", "content": None}]}, "content of a assistant message is NoneType, must be text"),
    ({"messages": "Hi"}, "messages must be a list of objects"),
    ({"instruction": "a", "output": ""}, "assistant message 1 of 1 is empty"),
    ({"instruction": " ", "input": "", "output": "b"}, "instruction is empty"),
    ({"prompt": "", "completion": "b"}, "prompt is empty"),
    ({"prompt": 5, "completion": "b"}, "the user's text is int, must be text"),
    ({"prompt": "a", "completion": None}, "the assistant's text is NoneType, must be text"),
    ({"prompt": talk("a"), "completion": "b"}, "the user's text is list, must be text"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history is [['x']], must be a list of [said, reply] pairs"),
    ({"instruction": "a", "output": "b", "history": [["x", None]]}, "the assistant's text is NoneType"),
    ({"instruction": "a", "output": "b", "system": 5}, "the system's text is int"),
    ({"prompt": "a", "question": "b", "completion": "c"}, "one prompt and one reply, and prompt and question say the same: rename one of them"),
    ({"prompt": "a", "completion": "b", "回答": "c"}, "completion and 回答 say the same"),
    ({"Prompt": "a", "prompt": "b", "completion": "c"}, "two of them differ in nothing but case"),
    ({"text": "a"}, '"messages", "conversations", or a prompt and a reply: name the one that the user says "prompt"'),
    ([1], "a record is list, must be an object with messages"),
    (None, "a record is NoneType"),
])
def test_a_record_of_no_use_says_why(record, said):
    with pytest.raises(InputError) as refused:
        normalise(record)
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------ files


TABLES = {
    "shuffled.csv": 'id,completion,SYSTEM,prompt\n1,"Hello, ""you""!",Be kind.,你好 🙂\n',
    "semicolons.csv": '"系统";"问题";"回答"\r\n"Be kind.";"你好 🙂";"Hello, ""you""!"\r\n',
    "tabs.tsv": '\ufeffprompt\tcompletion\tsystem\n你好 🙂\tHello, "you"!\tBe kind.\n',
    "quoted tabs.tsv": '"prompt"\t"completion"\t"system"\n"你好 🙂"\t"Hello, ""you""!"\t"Be kind."\n',
    "alpaca.csv": 'instruction,input,output,system\n你好 🙂,,"Hello, ""you""!",Be kind.\n',
}


def test_a_quote_after_a_space_is_not_learned_as_text(read):
    found, problems = read('prompt, completion\n"你好", "再，见"\na, b\n', "spaces.csv")
    assert found == [[{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]]
    assert len(problems) == 1 and 'leave out the space after ","' in problems[0]


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_told_by_their_names(read, name):
    assert read(TABLES[name], name) == ([WITH_SYSTEM], [])


def test_a_quoted_field_keeps_its_line_breaks(read):
    found, problems = read('prompt,completion\r\n"two\r\nlines","a\n\nb"\r\nx\r\n"c, d",e\r\n', "x.csv")
    assert found == [talk("two\nlines", "a\n\nb"), talk("c, d", "e")]
    assert problems == ["6: 1 fields, the first line names 2 columns: prompt, completion"]


def test_formats_may_be_mixed_in_one_file(read):
    records = [
        {"messages": WITH_SYSTEM}, {"prompt": "a", "completion": "b"}, "nonsense", {"instruction": "a", "input": "b", "output": "c"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"问题": "a"}, {"question": "a", "answer": "b"},
    ]
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    for content in (text, "[" + ",\n".join(text.split("\n")) + "]"):
        found, problems = read(content, "mixed.jsonl")
        assert found == [WITH_SYSTEM, talk("a", "b"), talk("a\nb", "c"), talk("a", "b"), talk("a", "b")]
        assert [problem.split(":")[0] for problem in problems] == ["3", "6"]


@pytest.mark.parametrize("content", ["Hi there\tHello\tforum\nBye\tSee you\tforum\n", "Hi there,Hello,forum\nBye,See you,forum\n"])
def test_columns_without_names_say_what_to_do(read, content):
    with pytest.raises(InputError) as refused:
        read(content, "x.tsv")
    assert '"prompt"' in str(refused.value) and '"completion"' in str(refused.value) and ":2: keys are ['Hi there', 'Hello', 'forum']" in str(refused.value)


@pytest.mark.parametrize("content, said", [
    (b"prompt,completion\n", "empty"),
    (b"prompt,completion,prompt\na,b,c\n", "each needs a name of its own"),
    ("prompt,completion\n你好,世界\n".encode("gbk"), "line 2: not UTF-8"),
    (b"prompt,completion\na,b\x00\n", "line 2: has zero bytes"),
])
def test_a_file_of_no_use_is_refused_in_one_line(read, content, said):
    with pytest.raises(InputError) as refused:
        read(content, "x.csv")
    assert said in str(refused.value) and "\n" not in str(refused.value)


LONG = {"one word": "a" * 100_000, "Chinese": "磨坊" * 50_000, "spaces": " " * 99_999 + "x", "lines": "a\n" * 50_000, "emoji": "🙂" * 50_000}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("place", [0, 1], ids=["prompt", "reply"])
def test_a_turn_of_a_hundred_thousand_characters_is_cut_to_fit(read, tokenizer, name, place):
    contents = ["Hi", "Hello"]
    contents[place] = LONG[name]
    start = time.perf_counter()
    for file in (json.dumps({"messages": talk(*contents)}), 'prompt,completion\n"' + '","'.join(contents) + '"\n'):
        [found], problems = read(file, "x.jsonl" if file[0] == "{" else "x.csv")
        rows = to_rows([found], tokenizer, 64)
        assert [m["content"] for m in found] == contents and not problems
        assert (rows.cuts.prompts, rows.cuts.replies) == (1 - place, place) and len(rows.rows[0][0].ids) == 65
    assert time.perf_counter() - start < 20  # a power of the length would be minutes


# ------------------------------------------------------------------ through finetune.py


@pytest.fixture
def start(tmp_path, monkeypatch, tokenizer):
    """start(content, *flags): finetune.py's main() on a file of this content, where a tiny model is the start."""

    def start(content: str | bytes, *flags, name: str = "data.jsonl") -> None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        short = ["--max-steps", 2, "--batch-size", 2, "--init", "base", "--out", "out"]
        call_main(monkeypatch, "finetune.py", "--data", name, *short, *flags, speedup=0.1)

    save_base(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune.report, "draw_lengths", lambda *_: None)
    return start


def lines(*pairs) -> str:
    return "".join(json.dumps({"prompt": a, "completion": b}, ensure_ascii=False) + "\n" for a, b in pairs)


REFUSED = {
    "one example": (lines(("a", "b")), "(1 different in all): too few to hold some out; add some, or name held-out ones with --val-data"),
    "three examples": (lines(("a", "b"), ("c", "d"), ("e", "f")), "(3 different in all): too few to hold some out"),
    "all the same": (lines(("a", "b")) * 300, "(1 different in all): too few to hold some out"),
    "nothing": ("", "data.jsonl: empty"),
    "no replies": (lines(("a", ""), ("b", " ")), "data.jsonl:1: assistant message 1 of 1 is empty (no usable conversation in the file)"),
    "zero bytes": (b'{"prompt": "a\x00", "completion": "b"}', "data.jsonl, line 1: has zero bytes"),
    "GBK": ('{"prompt": "你好", "completion": "世界"}'.encode("gbk"), "data.jsonl, line 1: not UTF-8"),
    "a header": ("prompt\tcompletion\n", "data.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_from_is_one_line_and_nothing_is_written(start, tmp_path, name, capsys):
    content, said = REFUSED[name]
    with pytest.raises(SystemExit) as end:
        runtime.run_as_script(lambda: start(content))
    *_, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and last.startswith("error: ") and said in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [
    lines(("a", "b")),
    lines(("a", "b"), ("c", "d"), ("e", "f")),
    lines(("a", "b")) * 30,
    lines(("🙂", "🎉🎉"), ("👩‍👩‍👧", "🙂")),
    lines(("a\0b", "c\0d"), ("x", "y")),
    lines(*[("a " * 50_000, "b"), ("c", "磨坊" * 50_000)]),
    lines(("a", ""), ("b", "c")),
    '{"prompt": "a \\ud83d b", "completion": "c \\ude42"}\n',
], ids=["one", "three", "all the same", "emoji", "escaped zero", "long", "an empty reply", "halves of emoji"])
def test_with_held_out_ones_few_or_odd_examples_do(start, tmp_path, content, capsys):
    start(content, "--val-data", "data.jsonl")
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrote out/report.md")
    json.loads(Path("out/report.json").read_text(encoding="utf-8"))


def test_what_was_left_out_is_counted(start, capsys):
    start("nonsense\n" * 7 + lines(("a", "b")), "--val-data", "data.jsonl")
    said = capsys.readouterr().err
    assert said.count("left out: data.jsonl:") == 5 and "left out 14 records in all" in said


def test_a_system_text_beside_the_messages_comes_first():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    told = [{"role": "system", "content": "Be terse."}, *turns]
    assert normalise({"system": "Be terse.", "messages": turns}) == told
    assert normalise({"system": "Be terse.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}) == told
    assert normalise({"system": " ", "messages": turns}) == turns
    with pytest.raises(InputError, match="keep one"):
        normalise({"system": "Be terse.", "messages": told})


def test_conversations_may_also_say_role_and_content():
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好呀"}]
    assert normalise({"conversations": turns}) == turns


def test_an_instruction_may_have_any_name_of_a_reply():
    record = {"instruction": "Translate.", "input": "小河", "response": "river"}
    assert normalise(record) == [{"role": "user", "content": "Translate.\n小河"}, {"role": "assistant", "content": "river"}]
