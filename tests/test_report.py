"""report: report.md and report.json, whatever the texts in them contain; and the measures that they hold."""

import json
import math
import re
import sys

import pytest
import torch

from nanochat import InputError, checkpoint, dialogue, evaluate, preview, report, runtime
from nanochat.classifier import with_label_head
from nanochat.evaluate import losses_of_sources, measure_chat, score
from nanochat.rows import Rows
from nanochat.tasks import TASKS
from nanochat.tokenizer import Tokenizer

NASTY = "a | b\nsecond `line` \\| ```\n<script> 你好 🙂 | end"


def talk(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TALKS = [talk("Where do the boats go?", "To the sea. 🙂", "Why?", "Wind."), talk("你好", "Hello!"), talk("a", "b " * 80), talk("x", "river", "y", "mill")]


@pytest.fixture
def model(tokenizer, make_model):
    return make_model(vocab_size=tokenizer.vocab_size, block_size=64)


# ------------------------------------------------------------------ measures


def losses(model, tokenizer: Tokenizer, rows: Rows, batch_size: int) -> dict[int, float]:
    each = {}
    score(model, tokenizer, rows.batches(batch_size), each=each)
    return losses_of_sources(rows, batch_size, each)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_loss_of_each_conversation_is_that_of_its_windows_alone(model, tokenizer, batch_size):
    rows = dialogue.to_rows(TALKS, tokenizer, 64)
    found = losses(model, tokenizer, rows, batch_size)
    assert len(rows) < sum(map(len, rows.rows)) and sorted(found) == [0, 1, 2, 3]
    for source, messages in enumerate(TALKS):
        apart = dialogue.to_rows([messages], tokenizer, 64, pack=False)
        expected = sum(model(*apart.batch([i])).item() for i in range(len(apart))) / apart.supervised_tokens
        assert found[source] == pytest.approx(expected, rel=1e-9)


def test_the_loss_of_each_text_counts_all_of_its_tokens(model, tokenizer):
    texts = ["A small river. " * 9, "x"]
    found = losses(model, tokenizer, evaluate.text_rows(texts, tokenizer, 64), 1)
    for source, text in enumerate(texts):
        assert found[source] == pytest.approx(score(model, tokenizer, evaluate.text_rows([text], tokenizer, 64).batches(1))["loss"], rel=1e-9)


def test_accuracy_and_perplexity_without_the_end_are_the_plain_formulas(model, tokenizer):
    rows = dialogue.to_rows(TALKS, tokenizer, 64)
    end = tokenizer.control["<|end|>"]
    nll, right, inside = [], [], []
    for window in (window for row in rows.rows for window in row):
        logits = model(torch.tensor([window.ids[:-1]]))[0]
        for i, target in enumerate(window.ids[1:]):
            if window.supervised[i + 1]:
                nll.append(-logits[i].log_softmax(-1)[target].item())
                right.append(logits[i].argmax().item() == target)
                inside.append(target != end)
    found = score(model, tokenizer, rows.batches(2))
    assert found["loss"] == pytest.approx(sum(nll) / len(nll)) and found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)))
    words = [n for n, i in zip(nll, inside) if i]
    assert 0 < len(words) < len(nll)
    assert found["perplexity_without_end"] == pytest.approx(math.exp(sum(words) / len(words)))


def test_a_model_that_knows_every_token_is_accurate(model, tokenizer):
    rows = dialogue.to_rows(TALKS[:1], tokenizer, 64)
    assert score(model, tokenizer, rows.batches(1))["accuracy"] < 0.2
    model.features = lambda tokens, segments=None: torch.nn.functional.one_hot(tokens.roll(-1), tokenizer.vocab_size).double() * 99
    model.head = lambda x: x
    found = score(model, tokenizer, rows.batches(1))
    assert found["accuracy"] > 0.9 and found["perplexity_without_end"] < 1.001


def test_a_measured_chat_names_its_worst_conversations(model, tokenizer):
    rows = dialogue.to_rows(TALKS, tokenizer, 64)
    result = measure_chat(model.float(), tokenizer, TALKS, rows, 2, worst=3)
    assert {"loss", "perplexity", "accuracy", "bits_per_byte", "perplexity_without_end", "replies", "worst"} <= set(result)
    by_source = losses(model, tokenizer, rows, 2)
    assert [worst["loss"] for worst in result["worst"]] == sorted(by_source.values())[:0:-1]
    assert [worst["messages"] for worst in result["worst"]] == [TALKS[i] for i in sorted(by_source, key=by_source.get)[:0:-1]]
    assert result["replies"]["replies"] == 4


# ------------------------------------------------------------------ the two files


@pytest.fixture
def chat(model, tokenizer) -> dict:
    """What finetune.py gives of a chat run, with the worst that texts can contain."""
    talks = [*TALKS, talk(NASTY, NASTY)]
    rows = dialogue.to_rows(talks, tokenizer, 64)
    task = TASKS["chat"]()
    result = measure_chat(model.float(), tokenizer, talks, rows, 2)
    return {
        "settings": {"data": "中文.csv", "out": "out", "rate": 1e-3},
        "data": preview.about({"training": talks, "validation": talks[:2]}, task.text, rows, task.describe(talks, tokenizer)),
        "run": {"method": "full", "steps": 3},
        "before": result, "after": result | {"worst": [{"loss": 9.0, "messages": talks[-1]}]},
        "asked": {NASTY: ("", NASTY), "Hi": ("–", "half")},
    }


def cells(line: str) -> list[str]:
    """A row of a Markdown table, as a reader of it parts its cells."""
    return re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]


def test_the_report_is_a_sound_table_whatever_was_said(chat, tmp_path):
    report.write(tmp_path, chat)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = text.split("\n")
    start = lines.index("| prompt | before | after |")
    assert [len(cells(line)) for line in lines[start : start + 4]] == [3] * 4 and lines[start + 4] == ""
    assert cells(lines[start + 2])[0] == " a \\| b second `line` \\\\\\| ``` &lt;script> 你好 🙂 \\| end "
    assert "| perplexity | " in text and "| replies that end by themselves | " in text
    assert "9.00 nats a token:\n\n````\nuser: a | b\n" in text and text.count("````") % 2 == 0  # a longer fence than any inside
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_the_json_holds_all_of_it(chat, tmp_path):
    report.write(tmp_path, chat)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert found["after"]["worst"][0]["messages"] == talk(NASTY, NASTY) and found["settings"]["data"] == "中文.csv"
    assert found["data"]["lengths"] == chat["data"]["lengths"] and found["asked"][NASTY] == ["", NASTY]


def test_a_start_that_was_not_measured_is_a_dash(chat, tmp_path):
    report.write(tmp_path, chat | {"before": None})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| perplexity \| – \| [\d.e+]+ \| lower is better \|", text)
    assert re.search(r"\| empty replies \| – \| \d+ \| of 5 greedy replies \|", text)


@pytest.mark.parametrize("labels", [["$\\frac{$ | x", "a\nb" * 100], [f"标签 {i}" for i in range(40)], ["$", "$$$"]], ids=["formula", "many", "dollars"])
def test_labels_of_any_kind_can_be_drawn(labels, tmp_path):
    counts = torch.ones(len(labels), len(labels), dtype=torch.int64).numpy()
    report.draw_confusion(labels, counts, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("lengths", [[1], [2, 2, 2], [1, 100_000], list(range(1, 900))])
def test_lengths_of_any_kind_can_be_drawn(lengths, tmp_path):
    report.draw_lengths(lengths, 64, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").exists()


def test_a_block_of_code_is_shown_as_it_is():
    assert report.code("a") == "```\na\n```" and report.code("``` ```` x") == "`````\n``` ```` x\n`````"


# ------------------------------------------------------------------ python -m nanochat.evaluate


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys, model, tokenizer):
    """measure(checkpoint, content, name, *flags) → its JSON; checkpoint: "chat", "base" or "classifier"."""
    models = {"chat": (model.float(), tokenizer), "classifier": (with_label_head(model.float(), ["a", "b"]).eval(), tokenizer),
              "base": (model, Tokenizer(tokenizer.merges, list(tokenizer.control)))}
    for name, pair in models.items():
        (tmp_path / name).mkdir()
        checkpoint.write(tmp_path / name, *pair)

    def measure(name: str, content: str, file: str, *flags) -> dict:
        (tmp_path / file).write_text(content, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / name), str(tmp_path / file), *flags])
        evaluate.main()
        out, measure.said = capsys.readouterr()
        return json.loads(out)

    return measure


LINES = "".join(json.dumps({"messages": messages}) + "\n" for messages in TALKS)
QUESTIONS = "".join(json.dumps({"query": "The river", "choices": ["runs", "of salt and 盐"], "gold": i % 2}) + "\n" for i in range(4))


def test_what_is_measured_is_told_by_the_model_and_the_file(measure, model, tokenizer):
    expected = score(model, tokenizer, dialogue.to_rows(TALKS, tokenizer, 64).batches(8))
    chat = measure("chat", LINES, "x.jsonl")
    assert chat["loss"] == pytest.approx(expected["loss"], rel=1e-4) and chat["replies"]["replies"] == 4
    for name, flags in (("base", []), ("chat", ["--text"])):
        text = measure(name, "A small river.\n" * 50, "x.txt", *flags)
        ids = tokenizer.encode("A small river.\n" * 50)
        rows = evaluate.text_rows(["A small river.\n" * 50], tokenizer, 64)
        assert rows.supervised_tokens - sum(w.supervised[0] for row in rows.rows for w in row) == len(ids) + 1
        assert text["loss"] > 0 and "replies" not in text and text["bits_per_byte"] > 0
    for name in ("base", "chat"):
        found = measure(name, QUESTIONS, "x.jsonl")
        assert found["questions"] == 4 and found["accuracy"] == 0.5  # each answer is right twice
    labelled = measure("classifier", "text,label\nriver,a\nmill,b\n", "x.csv", "--batch-size", "1")
    assert set(labelled["labels"]) == {"a", "b"} and labelled["labels"]["a"]["support"] == 1


def test_what_was_cut_is_said(measure):
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A small river. " * 40}]}
    measure("chat", json.dumps(talk), "x.jsonl")
    assert "1 replies, 0 prompts, 0 system texts cut to fit the block" in measure.said


def test_plain_text_is_scored_token_by_token_in_windows(model, tokenizer):
    texts = ["A small river. " * 20, "x", ""]
    rows = evaluate.text_rows(texts, tokenizer, 16)
    loss, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        for i in range(0, len(ids) - 1, 16):
            piece = torch.tensor([ids[i : i + 17]])
            loss += model(piece[:, :-1], piece[:, 1:]).item()
            tokens += piece.size(1) - 1
    assert tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert score(model, tokenizer, Rows(rows.rows, 16).batches(3))["loss"] == pytest.approx(loss / tokens, rel=1e-9)


def test_a_choice_has_the_likelihood_of_its_tokens(model, tokenizer):
    before, whole = tokenizer.encode("The river"), tokenizer.encode("The river runs")
    logits = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
    expected = sum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
    assert evaluate.loglikelihood(model, tokenizer, "The river", " runs") == pytest.approx(expected, rel=1e-9)
    assert evaluate.loglikelihood(model, tokenizer, "The river ", "runs") == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="has no token of its own"):  # it would be the likeliest of all
        evaluate.loglikelihood(model, tokenizer, "The river", "")
    long = evaluate.loglikelihood(model, tokenizer, "The river" * 100, " runs")  # of a long context the end counts
    assert math.isfinite(long) and long < 0


@pytest.mark.parametrize("name, content, file, flags, said", [
    ("classifier", "text,label\nriver,c\n", "x.csv", [], "x.csv: label 'c' is none of the model's: a, b"),
    ("classifier", "text,label\nriver,a\n", "x.csv", ["--text"], "is a classifier"),
    ("classifier", LINES, "x.jsonl", [], 'x.jsonl:1: keys are messages: name the text "text" and its label "label"'),
    ("chat", "", "x.jsonl", [], "x.jsonl: empty"),
    ("chat", '{"query": "a", "choices": ["b"], "gold": 1}', "x.jsonl", [], 'x.jsonl:1: a question has a "query", "choices" (texts) and "gold"'),
    ("base", QUESTIONS + '{"query": "a"}', "x.jsonl", [], "x.jsonl:5: a question has"),
    ("base", "", "x.txt", [], "x.txt"),
    ("nowhere/at/all", "a", "x.txt", [], "no such checkpoint"),
    ("chat", LINES, "x.jsonl", ["--batch-size", "0"], "--batch-size is 0, must be at least 1"),
])
def test_wrong_input_gets_one_line(measure, name, content, file, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        runtime.run_as_script(lambda: measure(name, content, file, *flags))
    *_, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in last and "error: " in last


def test_a_file_that_is_not_there_gets_one_line(measure, tmp_path, monkeypatch, capsys):
    for name in ("chat", "base", "classifier"):
        monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / name), str(tmp_path / "absent.jsonl")])
        with pytest.raises(SystemExit) as end:
            runtime.run_as_script(evaluate.main)
        assert end.value.code == 2 and "absent.jsonl" in capsys.readouterr().err.splitlines()[-1]


def test_a_classifier_of_another_frame_is_refused(measure, tokenizer, tmp_path, model):
    plain = Tokenizer(tokenizer.merges)
    model.cut(plain.vocab_size)
    (tmp_path / "theirs").mkdir()
    checkpoint.write(tmp_path / "theirs", with_label_head(model, ["a", "b"]), tokenizer)
    plain.save(tmp_path / "theirs")
    with pytest.raises(InputError, match="has no <|end|>"):
        measure("theirs", "text,label\nriver,a\n", "x.csv")
