"""The gallery of broken runs: each case is one line that is there, its pages show that line, its test catches it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import broken  # noqa: E402

PAGES = [ROOT / "docs" / "broken.md", ROOT / "docs" / "broken.zh-CN.md"]
CAUGHT = [name for name, case in broken.CASES.items() if case.test]


@pytest.mark.parametrize("name", broken.CASES)
def test_the_old_text_occurs_once_and_the_new_one_compiles(name):
    case = broken.CASES[name]
    text = (ROOT / case.file).read_text(encoding="utf-8")
    assert text.count(case.old) == 1 and case.new != case.old and "\n" not in case.old + case.new
    compile(text.replace(case.old, case.new), case.file, "exec")


def test_a_difference_is_the_whole_line_and_what_it_becomes():
    assert broken.difference(broken.CASES["evaluation"]) == "--- nanochat/evaluate.py\n-model.eval()\n+model.train()"
    deleted = broken.Case("nanochat/evaluate.py", "model.eval()", "")
    assert broken.difference(deleted) == "--- nanochat/evaluate.py\n-model.eval()"


def test_a_line_that_is_not_there_once_is_an_error_that_names_it(tmp_path):
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    for old in ("no such line", "import"):
        with pytest.raises(InputError, match=f"^train.py: '{old}' occurs {text.count(old)} times, must be once$"):
            broken.copy(tmp_path / old, broken.Case("train.py", old, ""))


def test_a_copy_differs_from_the_sources_in_that_line_alone(tmp_path):
    case = broken.CASES["shift"]
    folder = broken.copy(tmp_path / "sources", case)
    changed = [str(path.relative_to(folder)) for path in folder.rglob("*.py")
               if path.read_bytes() != (ROOT / path.relative_to(folder)).read_bytes()]
    assert changed == [case.file]
    old, new = ((root / case.file).read_text(encoding="utf-8").splitlines() for root in (ROOT, folder))
    lines = [f"-{a.strip()}\n+{b.strip()}" for a, b in zip(old, new, strict=True) if a != b]
    assert [f"--- {case.file}", *lines] == broken.difference(case).split("\n", 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_pages_show_the_changes_pictures_and_figures_of_the_script(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"```diff\n(.*?)\n```", text, re.DOTALL) == [broken.difference(case) for case in broken.CASES.values()]
    results = json.loads((ROOT / "benchmarks" / "results" / "broken-cpu.json").read_text(encoding="utf-8"))["results"]
    for name, case in broken.CASES.items():
        picture = page.parent / "broken" / f"{name}.png"
        assert f"(broken/{name}.png)" in text and 0 < picture.stat().st_size <= 60_000
        assert case.test.rpartition("::")[2] in text
    for name, result in results.items():
        figures = [f"{result[key]:.3f}" for key in ("first_step", "training", "own_held_out", "held_out")]
        assert f"\n| {name} | {' | '.join(figures)} |\n" in text


@pytest.mark.parametrize("name", CAUGHT)
def test_the_named_test_is_there(name):
    file, function = broken.CASES[name].test.split("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


def pytest_in(folder: Path, *tests: str) -> int:
    """The exit status of these tests in a copy of the sources: 0 passed, 1 failed."""
    return subprocess.run([sys.executable, "-m", "pytest", "-x", *tests], cwd=folder, capture_output=True).returncode


@pytest.mark.slow
def test_the_named_tests_pass_where_nothing_is_broken(tmp_path):
    assert pytest_in(broken.copy(tmp_path / "right"), *(broken.CASES[name].test for name in CAUGHT)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUGHT)
def test_the_named_test_catches_the_change(name, tmp_path):
    assert pytest_in(broken.copy(tmp_path / name, broken.CASES[name]), broken.CASES[name].test) == 1


@pytest.mark.slow
def test_a_short_gallery_trains_scores_and_draws(tmp_path):
    results = broken.gallery(["shift"], 6, tmp_path / "pictures")
    assert list(results) == ["right-text", "shift"]
    right, shift = results.values()
    assert right["held_out"] == pytest.approx(right["own_held_out"], rel=1e-6)
    assert shift["first_step"] < right["first_step"] - 0.5  # a token that is read is likelier than chance
    assert (tmp_path / "pictures" / "shift.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_a_script_says_of_a_wrong_setting_is_the_error(tmp_path):
    with pytest.raises(InputError, match="^right-text: --max-steps is 0, must be at least 1$"):
        broken.gallery(["shift"], 0, tmp_path / "pictures")
