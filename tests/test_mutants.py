"""mutants.py: sixty mistakes that can still be made in one place each, and are found by the test that is named."""

import ast
import subprocess
import sys
from functools import cache

import pytest
from mutants import MUTANTS, ROOT, Mutant, main, table

ALL = [mutant for mutants in MUTANTS.values() for mutant in mutants]


@cache
def functions_in(file: str) -> dict[str, str]:
    """The tests of a file and their decorators, read and not imported."""
    nodes = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
    return {node.name: " ".join(map(ast.unparse, node.decorator_list)) for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_are_sixty_different_mistakes_in_seven_areas():
    assert len(ALL) == len({mutant.name for mutant in ALL}) == len({(mutant.file, mutant.old, mutant.new) for mutant in ALL}) == 60
    assert [len(mutants) for mutants in MUTANTS.values()] == [9, 7, 9, 10, 9, 8, 8]


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mistake_has_one_place_changes_the_code_and_compiles(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.file} has {mutant.old!r} {source.count(mutant.old)} times"
    planted = source.replace(mutant.old, mutant.new)
    compile(planted, mutant.file, "exec")
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_the_test_that_finds_a_mistake_exists_and_is_no_slow_one(mutant):
    file, name = mutant.test.split("::")
    assert name.startswith("test_") and name in functions_in(file)
    assert "mark.slow" not in functions_in(file)[name] and "mark.gpu" not in functions_in(file)[name]


def test_the_page_is_the_list():
    assert (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8") == table(), "python tests/mutants.py --list > docs/mutants.md"


def test_a_word_that_no_name_holds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--only", "no such mistake"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "no mutant's name holds no such mistake; --list shows them all" in capsys.readouterr().err


def ended(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT / "tests", capture_output=True, encoding="utf-8", timeout=900)


@pytest.mark.slow
def test_every_mistake_is_found():
    done = ended("mutants.py")
    assert done.returncode == 0 and "60 of 60 found" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutant, said", [
    (Mutant("a mistake", "nanochat/model.py", "0.02 / math.sqrt(2", "0.02 / math.sqrt(3", "test_model.py::test_gpt2_small_has_124_439_808_parameters"),
     "MISSED  a mistake"),
    (Mutant("no Python", "nanochat/model.py", "0.02 / math.sqrt(2", "0.02 / math sqrt(2", "test_model.py::test_gpt2_small_has_124_439_808_parameters"),
     "MISSED  no Python"),
    (Mutant("no such place", "nanochat/model.py", "no such text", "", "test_model.py::test_gpt2_small_has_124_439_808_parameters"),
     "has 'no such text' 0 times instead of once: no such place"),
], ids=["its test does not see it", "nothing can be imported", "it cannot be planted"])
def test_only_a_test_that_fails_has_found_a_mistake(mutant, said):
    done = ended("-c", f"import sys, mutants; from mutants import Mutant; mutants.MUTANTS = {{'area': [{mutant!r}]}}; sys.exit(mutants.main())")
    assert done.returncode != 0 and said in done.stdout + done.stderr
