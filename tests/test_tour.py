"""The tour: its code is the code, it prints what it shows, its commands work, and both languages say the same.

    PYTHONPATH=. python tests/test_tour.py           put today's code into both pages
    PYTHONPATH=. python tests/test_tour.py --run     and what their blocks print (half a minute)

Above a block of Python stands where it comes from:

    <!-- code: FILE NAME -->                  that function or class, without its docstring
    <!-- code: FILE NAME: FIRST … LAST -->    of it, the line that begins with FIRST to the next that begins with LAST
    <!-- run -->                              the reader runs it; all of them share one session; the output follows
    <!-- run: trained -->                     the same; its numbers come from training, which rounding drives apart
"""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import tyro
from test_readme import blocks, single_commands

import finetune
import sample
import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.zh-CN.md"]
CODE = re.compile(r"(?P<comment><!-- code: (?P<file>\S+) (?P<name>[\w.]+)(?:: (?P<first>.+?) … (?P<last>.+?))? -->\n)"
                  r"```python\n(?P<code>.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run(?P<trained>: trained)? -->\n```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\((.*?)\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]\d+)?")
both = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def source(file: str, name: str, first: str | None, last: str | None) -> str:
    """What a `code` comment names, as it stands in the repository."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    docstring = node.body[0] if ast.get_docstring(node) else None
    skipped = range(docstring.lineno, docstring.end_lineno + 1) if docstring else ()
    lines = [line for n, line in enumerate(text.splitlines(), start=1) if node.lineno <= n <= node.end_lineno and n not in skipped]
    if first:
        start = next(n for n, line in enumerate(lines) if line.strip().startswith(first))
        end = next(n for n, line in enumerate(lines) if n >= start and line.strip().startswith(last))
        lines = lines[start : end + 1]
    return textwrap.dedent("\n".join(lines)) + "\n"


def printed(text: str, steps: int | None = None) -> list[str]:
    """What each `run` block of a page prints; steps: of the training loop, in place of its own number."""
    session: dict = {}
    outputs = []
    threads = torch.get_num_threads()
    for match in RUN.finditer(text):
        code = re.sub(r"range\(\d+\):  # steps", f"range({steps}):", match["code"]) if steps else match["code"]
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(code, "docs/tour.md", "exec"), session)
        outputs.append(stream.getvalue())
    torch.set_num_threads(threads)
    return outputs


def alike(one: str, other: str, trained: bool) -> bool:
    """Equal but for the last digits of numbers, or more of them if `trained`, and for what follows an arrow."""
    one, other = (re.sub(r"→.*", "→", text) for text in (one, other))
    numbers = zip(*([float(n) for n in NUMBER.findall(text)] for text in (one, other)))
    rel, abs = (0.6, 0.15) if trained else (0.02, 0.02)
    return NUMBER.sub("#", one) == NUMBER.sub("#", other) and all(a == pytest.approx(b, rel, abs) for a, b in numbers)


@both
def test_the_code_in_the_tour_is_the_code(page):
    text = page.read_text(encoding="utf-8")
    found = list(CODE.finditer(text))
    for match in found:
        assert match["code"] == source(*match.group("file", "name", "first", "last")), f"{match['comment']}: python tests/test_tour.py"
    assert len(found) + len(RUN.findall(text)) == text.count("```python"), "a block of Python from nowhere"


def test_every_block_runs():
    text = PAGES[0].read_text(encoding="utf-8")
    assert all(printed(text, steps=1))


@pytest.mark.slow
def test_every_block_prints_what_the_page_shows():
    text = PAGES[0].read_text(encoding="utf-8")
    for now, match in zip(printed(text), RUN.finditer(text), strict=True):
        assert alike(now, match["output"], bool(match["trained"])), f"now:\n{now}\nin the page:\n{match['output']}"


@pytest.mark.parametrize("other, equal", [("loss 1.01 → b", True), ("loss 1.10 → a", False), ("less 1.00 → a", False), ("loss 1.00", False)])
def test_outputs_are_compared_word_by_word_and_numbers_roughly(other, equal):
    assert alike("loss 1.00 → a", other, trained=False) == equal


def test_numbers_that_training_gave_may_differ_more_but_not_by_orders():
    assert alike("loss 0.52", "loss 0.61", trained=True)
    assert not alike("loss 0.52", "loss 0.06", trained=True)


def test_both_languages_show_the_same_code_commands_and_pictures():
    for pattern in (CODE, RUN, PICTURE):
        ours, theirs = (pattern.findall(page.read_text(encoding="utf-8")) for page in PAGES)
        assert ours == theirs and ours
    ours, theirs = ([(how, single_commands(lines)) for how, lines in blocks(page)] for page in PAGES)
    assert ours == theirs and ours


@both
def test_the_fourteen_questions_are_listed_and_answered_in_place(page):
    text = page.read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+)\]\(#q(\d+)\)$", text, re.MULTILINE)
    answers = {n: (question, answer) for n, question, answer in
               re.findall(r'^<a id="q(\d+)"></a>\*\*(.+?)\*\*((?:.(?!\n##|\n<a id))+)', text, re.MULTILINE | re.DOTALL)}
    assert [int(n) for _, n in listed] == sorted(map(int, answers)) == list(range(1, 15))
    for question, n in listed:
        asked, answer = answers[n]
        assert asked == question and re.match(rf"(Question|问题) {n}\W", question) and len(answer.encode()) > 300


@both
def test_links_lead_to_files_and_anchors(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)(.+?)\)", text):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert path or f'<a id="{anchor}"></a>' in text, target


def test_pictures_are_small():
    pictures = [ROOT / "docs" / name for name in PICTURE.findall(PAGES[0].read_text(encoding="utf-8"))]
    assert pictures and all(path.stat().st_size <= 100_000 for path in pictures)


@both
def test_every_command_of_the_scripts_parses(page):
    settings = {"train.py": train.Settings, "finetune.py": finetune.Settings, "sample.py": sample.Settings}
    commands = [words for _, lines in blocks(page) for words in single_commands(lines)]
    parsed = [tyro.cli(settings[words[1]], args=words[2:]) for words in commands if words[1] in settings]
    assert len(parsed) >= 4
    for words in commands:
        assert words[0] == "python" and (words[1] in settings or words[1] == "-m" and (ROOT / f"{words[2].replace('.', '/')}.py").exists())


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """In order, in one folder, with the flags of the comment."""
    for name in ("train.py", "finetune.py", "sample.py", "nanochat", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = 0
    for how, lines in blocks(PAGES[0]):
        extra = {part.split()[0]: part.split()[1:] for part in how.split(";")}
        for words in single_commands(lines) if how != "parse" else ():
            shrunk = [flag for word in words for flag in extra.get(word, [])]
            done = subprocess.run([sys.executable, *words[1:], *shrunk], cwd=tmp_path, capture_output=True, encoding="utf-8",
                                  timeout=600, env=os.environ, input="")
            assert done.returncode == 0, f"{words}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 5


def refresh(text: str, outputs: list[str]) -> str:
    """A page with today's code, and with what its blocks print, if that is given."""
    text = CODE.sub(lambda m: f"{m['comment']}```python\n{source(*m.group('file', 'name', 'first', 'last'))}```", text)
    fresh = iter(outputs)
    return RUN.sub(lambda m: m[0][: m.start("output") - m.start()] + next(fresh, m["output"]) + "```", text)


if __name__ == "__main__":
    shown = printed(PAGES[0].read_text(encoding="utf-8")) if "--run" in sys.argv else []
    for page in PAGES:
        page.write_text(refresh(page.read_text(encoding="utf-8"), shown), encoding="utf-8")
