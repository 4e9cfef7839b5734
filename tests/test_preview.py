"""preview: what will be learned, counted by hand and shown; through finetune.py --show-batch."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_resume import call_main, save_base

from nanochat import InputError, classifier, dialogue, preview
from nanochat.model import GPT, GPTConfig
from nanochat.rows import Window
from nanochat.tasks import TASKS
from nanochat.tokenizer import Tokenizer

MARKS = ("⟦", "⟧")


def talk(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.fixture(scope="module")
def bytes_only() -> Tokenizer:
    """No merges: a token is a byte."""
    return Tokenizer([]).for_chat()


def test_conversations_are_counted_by_role(bytes_only):
    found = preview.about_conversations([talk("abc", "de", "", "f"), talk("小", "🙂", system="xy")], bytes_only)
    assert found == {
        "roles": {"system": {"messages": 1, "tokens": 2}, "user": {"messages": 3, "tokens": 6}, "assistant": {"messages": 3, "tokens": 7}},
        "lengths": [1 + 4 * 2 + 6, 1 + 3 * 2 + 9],  # <|endoftext|>, and two control tokens a message
    }
    assert found["lengths"] == [len(dialogue.render(messages, bytes_only)[0]) for messages in (talk("abc", "de", "", "f"), talk("小", "🙂", system="xy"))]


def test_texts_are_counted_by_label(bytes_only):
    found = preview.about_texts([("abc", "b"), ("", "a"), ("小", "b")], bytes_only)
    assert found == {"labels": {"b": 2, "a": 1}, "lengths": [5, 2, 5]} and list(found["labels"]) == ["b", "a"]


def test_all_that_is_known_of_a_small_set(bytes_only):
    train, held_out = [talk("abc", "de"), talk("abc", "de"), talk("fg", "h")], [talk("fg", "h"), talk("i", "j")]
    rows = dialogue.to_rows(train, bytes_only, 16)
    task = TASKS["chat"]()
    found = preview.about({"training": train, "validation": held_out, "test": held_out[1:]}, task.text, rows, task.describe(train, bytes_only))
    assert found == {
        "examples": {"training": 3, "validation": 2, "test": 1}, "different": 2,
        "seen_in_training": {"validation": (1, 0), "test": (0, 0)},
        "supervised_tokens": 3 + 3 + 2, "input_tokens": 9 + 9 + 7, "windows": 3, "rows": 2, "block_size": 16,
        "cut": "0 replies, 0 prompts, 0 system texts cut to fit the block",
        "roles": {"user": {"messages": 3, "tokens": 8}, "assistant": {"messages": 3, "tokens": 5}}, "lengths": [10, 10, 8],
    }
    assert preview.summary(found) == "\n".join([
        "3 training, 2 validation, 1 test; 1 of the training ones are repeated",
        "of the validation ones, 1 are also among the training ones word for word, 0 nearly so",
        "of the test ones, 0 are also among the training ones word for word, 0 nearly so",
        "8 of 25 training tokens are learned from (32.0%)",
        "3 windows in 2 rows of up to 16 tokens, 78% full; 0 replies, 0 prompts, 0 system texts cut to fit the block",
        "user: 3 messages, 2.7 tokens each",
        "assistant: 3 messages, 1.7 tokens each",
        "tokens of each:",
        f"        5 –       8 {'█' * 20} 1",
        f"        9 –      16 {'█' * 40} 2",
    ])


def test_the_histogram_has_a_line_for_each_doubling():
    lines = preview.histogram([1, 2, 3, 4, 5, 8, 9, 64, 65, 65])
    assert [re.sub("█+", "", line).split() for line in lines] == [
        ["0", "–", "1", "1"], ["2", "–", "2", "1"], ["3", "–", "4", "2"], ["5", "–", "8", "2"], ["9", "–", "16", "1"],
        ["17", "–", "32", "0"], ["33", "–", "64", "1"], ["65", "–", "128", "2"]]
    assert [line.count("█") for line in lines] == [20, 20, 40, 40, 20, 0, 20, 40]
    assert preview.histogram([]) == [] and preview.histogram([1000] * 7)[0].count("█") == 40
    assert preview.histogram([10**6] * 1000 + [1])[0].count("█") == 1  # a single one is seen


def test_a_row_is_shown_as_the_model_gets_it(bytes_only):
    [row] = dialogue.to_rows([talk("Hi", "你好", "?", "!"), talk("a", "b")], bytes_only, 64).rows
    assert preview.show_row(row, bytes_only, None, MARKS) == (
        "<|endoftext|><|user|>Hi<|end|><|assistant|>⟦你好<|end|>⟧<|user|>?<|end|><|assistant|>⟦!<|end|>⟧\n"
        "<|endoftext|><|user|>a<|end|><|assistant|>⟦b<|end|>⟧\n")
    assert preview.show_row([Window([0, 1], [False, False])], bytes_only, None, MARKS) == '!"\n'


def test_of_a_classifier_the_label_is_shown(bytes_only):
    [row] = classifier.to_rows([("Hi 你", "good"), ("a", "bad")], ["bad", "good"], bytes_only, 64).rows
    assert preview.show_row(row, bytes_only, ["bad", "good"], MARKS) == "<|endoftext|>Hi 你<|end|> → ⟦good⟧\n<|endoftext|>a<|end|> → ⟦bad⟧\n"


# ------------------------------------------------------------------ through finetune.py


@pytest.fixture
def show(tmp_path, monkeypatch, tokenizer, capsys):
    """show(content, *flags) → what finetune.py --show-batch prints of a file of this content."""

    def show(content: str, *flags, name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        call_main(monkeypatch, "finetune.py", "--show-batch", "--data", name, "--val-data", name, "--init", "base", *flags, speedup=0.1)
        return capsys.readouterr().out

    save_base(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    return show


CHATS = "".join(json.dumps({"prompt": f"{i}?", "completion": f"{i} 好!"}) + "\n" for i in range(9))


@pytest.mark.parametrize("method", [[], ["--method", "lora"], ["--method", "freeze"]], ids=["full", "lora", "freeze"])
def test_show_batch_shows_conversations_and_writes_nothing(show, method):
    shown = show(CHATS, "--batch-size", 3, *method)
    assert "of the validation ones, 9 are also among the training ones word for word, 0 nearly so" in shown
    assert "assistant: 9 messages" in shown and "<|endoftext|><|user|>3?<|end|><|assistant|>⟦3 好!<|end|>⟧\n" in shown
    assert sorted(path.name for path in Path().iterdir()) == ["base", "data.jsonl"]


def test_show_batch_shows_labels(show):
    shown = show("text\tlabel\n" + "".join(f"text {i}\t{'ab'[i % 2]}\n" for i in range(8)), "--task", "classify", name="data.tsv")
    assert "label a: 4 texts, 50.0%" in shown and "<|endoftext|>text 3<|end|> → ⟦b⟧\n" in shown


def test_show_batch_does_not_mind_what_is_in_the_run_folder(show):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    assert "⟦" in show(CHATS, "--out", "out") and Path("out/thesis.txt").exists()


def test_nothing_to_learn_from_is_an_error(show, monkeypatch):
    """A mask that is all False, whatever made it so."""
    monkeypatch.setattr(dialogue, "render_turn", lambda message, tokenizer: ([tokenizer.control["<|user|>"]], [False]))
    with pytest.raises(InputError, match="--data data.jsonl: no token to learn from in blocks of 64"):
        show(CHATS)


def test_a_long_text_is_shown_in_part():
    assert preview.shortened("a" * 200) == "a" * 200
    assert preview.shortened("a" * 1500, 10) == "a" * 10 + " … (1,500 characters)"
    task, tokenizer = TASKS["chat"](), Tokenizer([]).for_chat()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.manual_seed(0)
    [prompt] = task.ask(model, tokenizer, [talk("b" * 5000, "c")])
    assert prompt == "b" * 200 + " … (5,000 characters)"
