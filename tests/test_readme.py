"""The README's promises: its commands run (shrunk by the comment above each block), its tree is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from test_layers import imported_rooms

import finetune
import sample
import train

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
BLOCK = re.compile(r"<!-- test: (?P<how>.*?) -->\s*```bash\n(?P<commands>.*?)```", re.DOTALL)


def blocks(readme: Path) -> list[tuple[str, list[str]]]:
    """(what the comment says, commands) of every block of commands."""
    text = readme.read_text(encoding="utf-8")
    found = [(m["how"], m["commands"].strip().splitlines()) for m in BLOCK.finditer(text)]
    assert len(found) == text.count("```bash"), "a block of commands without its <!-- test: … -->"
    return found


def single_commands(lines: list[str]) -> list[list[str]]:
    """The commands of a block as lists of arguments, without comments; `a && b` are two."""
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_command_of_the_scripts_parses(readme):
    settings = {"train.py": train.Settings, "finetune.py": finetune.Settings, "sample.py": sample.Settings}
    parsed = 0
    for _, lines in blocks(readme):
        for words in single_commands(lines):
            if script := next((word for word in words if word in settings), None):  # after python, or torchrun and its flags
                tyro.cli(settings[script], args=words[words.index(script) + 1 :])
                parsed += 1
    assert parsed >= 9


def test_both_languages_show_the_same_commands():
    ours, theirs = ([single_commands(lines) for _, lines in blocks(readme)] for readme in READMES)
    assert ours == theirs


def test_the_tree_names_files_that_exist():
    for readme in READMES:
        tree = re.search(r"<!-- tree -->\s*```\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)[1]
        lines = [line for line in tree.splitlines() if not line.strip().startswith("#")]
        names = [line.split()[0] for line in lines]
        folder = ROOT
        for line, name in zip(lines, names):
            path = (folder if line.startswith("  ") else ROOT) / name
            assert path.exists(), f"{readme.name}: {name}"
            if name.endswith("/") and not line.startswith("  "):
                folder = path
        rooms = {path.name for path in (ROOT / "nanochat").glob("[!_]*.py")}
        assert rooms <= set(names), f"{readme.name} lacks {rooms - set(names)}"
        for i, name in enumerate(names):
            if name in rooms:  # as the page says, each imports only files above it
                assert {f"{room}.py" for room in imported_rooms(ROOT / "nanochat" / name)} <= set(names[:i]), name


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """In order, in one folder, with the flags of the comment; "parse" blocks need a network."""
    for name in ("train.py", "finetune.py", "sample.py", "nanochat", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_text.txt").write_text("The river runs past the mill, and the boats go by.\n" * 2000)
    dialogues = (ROOT / "data" / "samples" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    renamed = [line.replace("?", "?" * n) for n in range(1, 26) for line in dialogues]  # enough to hold some out
    (tmp_path / "my_dialogues.jsonl").write_text("\n".join(renamed), encoding="utf-8")
    reviews = [f"Film {n} is {'a delight' if n % 2 else 'a bore'}.\t{'good' if n % 2 else 'bad'}\n" for n in range(150)]
    (tmp_path / "my_reviews.tsv").write_text("text\tlabel\n" + "".join(reviews))
    ran = 0
    for how, lines in blocks(READMES[0]):
        if how == "parse":
            continue
        extra = {part.split()[0]: shlex.split(part)[1:] for part in how.split(";") if part.strip() != "as is"}
        for words in single_commands(lines):
            if words[0] == "torchrun":
                words = ["python", "-m", "torch.distributed.run", *words[1:]]
            if words[0] != "python":
                continue
            shrunk = [flag for word in words for flag in extra.get(word, [])]
            command = [sys.executable, *words[1:], *shrunk]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=600,
                                  env=os.environ, input="")
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 14
