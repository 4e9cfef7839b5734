"""data/kdconv.py: a copy of KdConv becomes two files of dialogues; what is no copy of it gets one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import NAMES, find, kdconv
from nanochat import InputError

ROOT = Path(__file__).parent.parent
LINES = ["看过《我是山姆》吗？ ", "是的，很感人。", "导演是谁啊？", "杰茜·尼尔森。"]


def dialogue(*lines: str) -> dict:
    """As KdConv has it: some messages name the knowledge that they rest on."""
    attrs = [{"attrname": "导演", "attrvalue": "杰茜·尼尔森", "name": "我是山姆"}]
    messages = [{"message": line} | ({"attrs": attrs} if i % 2 else {}) for i, line in enumerate(lines)]
    return {"messages": messages, "name": "我是山姆"}


@pytest.fixture
def copy(tmp_path) -> Path:
    """A clone of KdConv with one dialogue a file, and one that has no reply."""
    for domain in kdconv.DOMAINS:
        folder = tmp_path / "KdConv" / "data" / domain
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            content = [dialogue(f"{domain} {split}", *LINES), dialogue("无人回答")]
            (folder / f"{split}.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    return tmp_path / "KdConv"


def openings(path: Path) -> list[str]:
    """The first line of each conversation of a converted file."""
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_train_and_dev_become_one_file_and_test_stays_apart(copy, tmp_path):
    for source in (copy, copy / "data"):
        counts = kdconv.convert(source, tmp_path)
        assert counts == {tmp_path / "kdconv.train.jsonl": 6, tmp_path / "kdconv.test.jsonl": 3}
    assert openings(tmp_path / "kdconv.train.jsonl") == [f"{d} {s}" for d in kdconv.DOMAINS for s in ("train", "dev")]
    assert openings(tmp_path / "kdconv.test.jsonl") == [f"{d} test" for d in kdconv.DOMAINS]
    assert not list(tmp_path.glob("*.part"))


def test_the_first_speaker_is_the_user(copy, tmp_path):
    kdconv.convert(copy, tmp_path)
    path = tmp_path / "kdconv.train.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["messages"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    assert first == [{"role": r, "content": c.strip()} for r, c in zip(roles, ["film train", *LINES])]


def test_data_kdconv_names_the_converted_file_or_says_how_to_make_it(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(kdconv, "HERE", tmp_path)
    assert "kdconv" in NAMES
    with pytest.raises(InputError, match="git clone https://github.com/thu-coai/KdConv .*python data/kdconv.py KdConv"):
        find("kdconv")
    kdconv.convert(copy, tmp_path)
    assert find("kdconv") == str(tmp_path / "kdconv.train.jsonl")


def script(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / "kdconv.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"LC_ALL": "C"}, timeout=60)


@pytest.mark.slow
def test_the_script_converts_teaches_and_refuses_in_one_line(copy, tmp_path):
    done = script(copy, "--out", tmp_path)
    assert done.returncode == 0 and f"{tmp_path / 'kdconv.train.jsonl'}: 6 conversations" in done.stdout, done.stderr
    assert "git clone" in script("--help").stdout
    (copy / "data" / "film" / "dev.json").write_text("[")
    done = script(copy, "--out", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


WRONG = {
    "no such folder": (None, b"", "no KdConv in this folder"),
    "missing": ("music/dev.json", None, "music/dev.json: missing"),
    "broken": ("music/dev.json", b'[{"messages": [', "music/dev.json: not JSON"),
    "an object": ("film/train.json", b'{"messages": []}', "film/train.json: must be a list of"),
    "other keys": ("travel/test.json", b'[{"messages": [{"text": "hi"}]}]', "travel/test.json: must be a list of"),
    "no text": ("travel/test.json", b'[{"messages": [{"message": 5}]}]', "travel/test.json: must be a list of"),
    "GBK": ("film/test.json", "[\"你好\"]".encode("gbk"), "film/test.json, line 1: not UTF-8"),
}


@pytest.mark.parametrize("file, content, expected", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named_in_one_line_and_changes_nothing(file, content, expected, copy, tmp_path):
    (tmp_path / "kdconv.train.jsonl").write_text("old")
    source = copy if file else tmp_path / "nowhere"
    if content is None:
        (copy / "data" / file).unlink()
    elif file:
        (copy / "data" / file).write_bytes(content)
    with pytest.raises(InputError) as info:
        kdconv.convert(source, tmp_path)
    message = str(info.value)
    assert message.startswith(str(source)) and expected in message and "\n" not in message
    assert (tmp_path / "kdconv.train.jsonl").read_text() == "old" and not list(tmp_path.glob("*.part"))
