"""classifier: the label head as Hugging Face reads it, packed texts, weights of labels, the report, whole runs."""

import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score
from test_resume import FLAGS, Killed, assert_same_end, call_main, killed, save_base, tensors_of

import sample as sample_script
from nanochat import InputError, checkpoint, classifier, evaluate, lora, training
from nanochat.classifier import balanced, labels_of, probabilities, report, to_rows, with_label_head
from nanochat.metrics import read_metrics
from nanochat.model import IGNORED
from nanochat.tasks import TASKS
from nanochat.tokenizer import Tokenizer

LABELS = ["bad", "good", "so so"]
TEXTS = ["A small river.", "小河流过磨坊 🙂", "counts", "Boats carry grain, salt and letters; letters carry news.", "x", " <|endoftext|> typed"]
EXAMPLES = [(text, LABELS[i % 3]) for i, text in enumerate(TEXTS)]


@pytest.fixture
def model(tokenizer, make_model):
    """A classifier whose answers differ from text to text."""
    model = with_label_head(make_model(torch.float32, noise=0.05, vocab_size=tokenizer.vocab_size, block_size=64), LABELS)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """The same as a folder."""
    (tmp_path / "classifier").mkdir()
    checkpoint.write(tmp_path / "classifier", model, tokenizer)
    return tmp_path / "classifier"


def alone(model, tokenizer, text: str) -> torch.Tensor:
    """Scores of a text by the plain definition: the head on the last token of its frame."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.control["<|end|>"]]
    return model(torch.tensor([ids]))[0, -1]


# ------------------------------------------------------------------ Hugging Face


def test_texts_of_different_length_have_hugging_faces_logits(model, tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[:5], padding=True, return_tensors="pt")
    assert encoded["attention_mask"].sum(1).unique().numel() > 3
    expected = torch.stack([alone(model, tokenizer, text) for text in TEXTS[:5]])
    assert (theirs(**encoded).logits - expected).abs().max() < 1e-4
    assert (expected - expected[0]).abs().max() > 0.1
    assert list(theirs.config.id2label.values()) == LABELS and theirs.config.label2id["so so"] == 2


def test_the_pipeline_gives_our_labels_and_probabilities(model, tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("text-classification", str(folder), device="cpu", batch_size=3)
    found = probabilities(model, to_rows(EXAMPLES[:5], LABELS, tokenizer, 64), 2)
    for said, p in zip(pipe(TEXTS[:5]), found):
        assert said["label"] == LABELS[int(p.argmax())] and said["score"] == pytest.approx(p.max().item(), abs=1e-4)


def test_labels_and_head_survive_saving_and_loading(model, tokenizer, folder):
    again, same = checkpoint.load(folder)
    assert again.labels == LABELS and same.hash == tokenizer.hash
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    for text in TEXTS:  # the matrices lie transposed in the file, and add up in another order
        torch.testing.assert_close(alone(again, same, text), alone(model, tokenizer, text), rtol=1e-5, atol=1e-5)


def foreign(folder: Path, **config) -> Path:
    """A classifier that Hugging Face saved, without a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=50256)
    transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes | config)).save_pretrained(folder)
    return folder


def test_a_classifier_of_hugging_faces_opens(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, config, labels in (("named", {"id2label": {0: "否", 1: "是"}}, ["否", "是"]), ("numbered", {"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"])):
        theirs = transformers.GPT2ForSequenceClassification.from_pretrained(foreign(tmp_path / name, **config)).eval()
        ours, _ = checkpoint.load(tmp_path / name)
        ids = torch.tensor([[5, 50000, 7]])
        assert ours.labels == labels and (ours(ids)[:, -1] - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("config, said", [
    ({"problem_type": "regression"}, "problem_type is 'regression', must be single_label_classification"),
    ({"id2label": {"0": "a", "2": "b"}}, "id2label does not name each of the 2 labels"),
    ({"id2label": {"0": "a", "1": "a"}}, "id2label does not name each of the 2 labels"),
    ({"id2label": ["a", "b"]}, "id2label does not name each of the 2 labels"),
])
def test_labels_that_cannot_be_are_refused(tmp_path, config, said):
    path = foreign(tmp_path / "theirs") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=said):
        checkpoint.load(tmp_path / "theirs")


# ------------------------------------------------------------------ rows and loss


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_packed_texts_have_the_probabilities_that_they_have_alone(model, tokenizer, batch_size):
    rows = to_rows(EXAMPLES * 3, LABELS, tokenizer, 64)
    assert len(rows) < len(EXAMPLES * 3)
    found = probabilities(model, rows, batch_size)
    expected = torch.stack([alone(model, tokenizer, text).softmax(-1) for text in TEXTS * 3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities(model, to_rows(EXAMPLES * 3, LABELS, tokenizer, 64, pack=False), batch_size), expected, rtol=0, atol=1e-5)


def test_the_label_is_the_only_target_and_stands_at_the_end_token(tokenizer):
    [window] = to_rows([("x", "so so")], LABELS, tokenizer, 64).rows[0]
    end = tokenizer.control["<|end|>"]
    assert window.ids == [tokenizer.end_of_text, *tokenizer.encode("x"), end, 2] and window.supervised == [False] * 3 + [True]
    batch = to_rows([("x", "so so")], LABELS, tokenizer, 64).batch([0])
    assert batch.targets[0, 2] == 2 and batch.inputs[0, 2] == end and (batch.targets != IGNORED).sum() == 1


def test_of_a_text_longer_than_the_block_the_beginning_stays_and_is_counted(model, tokenizer):
    long = "river " * 500
    rows = to_rows([(long, "bad"), ("x", "bad"), (long, "good")], LABELS, tokenizer, 64)
    assert str(rows.cuts) == "2 texts cut to fit the block" and rows.supervised_tokens == 3
    window = next(w for row in rows.rows for w in row if w.source == 2)
    assert len(window.ids) == 65 and window.ids[1:63] == tokenizer.encode(long)[:62] and window.ids[-2:] == [tokenizer.control["<|end|>"], 1]
    fits = "JKQVWXYZ" * 8  # 64 tokens
    assert str(to_rows([(fits[:62], "bad")], LABELS, tokenizer, 64).cuts).startswith("0") and len(tokenizer.encode(fits)) == 64
    assert str(to_rows([(fits[:63], "bad")], LABELS, tokenizer, 64).cuts).startswith("1")


def test_the_weights_of_labels_are_what_repeating_texts_would_be(model, tokenizer):
    """2 bad, 1 good, 1 so so: balanced, a good one weighs twice what a bad one does."""
    texts = [("A river", "bad"), ("B", "bad"), ("C boats", "good"), ("D", "so so")]
    weights = balanced(texts, LABELS)
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 3, 4 / 3])
    assert sum(weights[LABELS.index(label)] for _, label in texts) == pytest.approx(len(texts))
    model = model.double()

    def gradient(examples, weights) -> list[torch.Tensor]:
        model.class_weights = weights
        model.train().zero_grad()
        model(*to_rows(examples, LABELS, tokenizer, 64).batch([0])).backward()
        return [p.grad.clone() for p in model.parameters()]

    weighted, repeated = gradient(texts, weights.double()), gradient([*texts, *texts[2:]], None)
    for ours, theirs in zip(weighted, repeated):
        torch.testing.assert_close(ours, theirs * 2 / 3, rtol=1e-6, atol=1e-9)
    plain = gradient(texts, None)
    assert any(not torch.allclose(ours, theirs) for ours, theirs in zip(weighted, plain))
    model.class_weights = weights
    batch = to_rows(texts, LABELS, tokenizer, 64).batch([0])
    loss = model.eval()(*batch)
    model.class_weights = None
    assert torch.equal(model(*batch), loss)  # validation counts each text once


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(InputError, match="tokenizer has no <|end|>"):
        to_rows([("x", "a")], ["a", "b"], Tokenizer.gpt2(), 64)


def test_a_new_head_shares_the_weights_and_another_set_of_labels_gets_a_new_one(model, tokenizer):
    for labels in (["no", "yes"], ["x", "y", "z"]):
        other = with_label_head(model, labels)
        assert other.wte.weight.data_ptr() == model.wte.weight.data_ptr() and other.labels == labels
        assert other.score.weight.shape == (len(labels), 36) and other.score.weight.std() < 0.05
        assert other.score.weight.data_ptr() != model.score.weight.data_ptr() and model.score.weight.std() > 0.5
    task = TASKS["classify"]()
    assert task.prepare(model, EXAMPLES, False) is model  # the same labels: it goes on from its head
    assert task.prepare(model, [("a", "no"), ("b", "yes")] * 2, False).labels == ["no", "yes"]
    lora.add_lora(model, lora.LoRAConfig(), 0)
    with pytest.raises(InputError, match="the labels are not those that the run began with"):  # a head of a resumed run
        task.prepare(model, [("a", "no"), ("b", "yes")] * 2, False)


# ------------------------------------------------------------------ report


@pytest.mark.parametrize("seed", range(5))
def test_the_report_is_scikit_learns(seed):
    """With labels that are never said, and labels that no text has."""
    generator = np.random.default_rng(seed)
    labels = [f"label {i}" for i in range(6)]
    truth, said = generator.integers(0, [6, 3][seed % 2], 80), generator.integers(0, 5, 80)
    found = report(labels, truth, said)
    theirs = classification_report(truth, said, labels=range(6), target_names=labels, output_dict=True, zero_division=0)
    assert found["confusion"] == confusion_matrix(truth, said, labels=range(6)).tolist()
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    for label in labels:
        assert tuple(found["labels"][label].values()) == pytest.approx(tuple(theirs[label].values()))
    assert found["majority"] == max(np.bincount(truth)) / 80


def test_a_measured_classifier_says_what_it_got_wrong(model, tokenizer):
    rows = to_rows(EXAMPLES, LABELS, tokenizer, 64)
    found = torch.stack([alone(model, tokenizer, text).softmax(-1) for text in TEXTS])
    truth = [LABELS.index(label) for _, label in EXAMPLES]
    result = evaluate.measure_classifier(model, EXAMPLES, rows, 2)
    assert set(result) == {"accuracy", "macro_f1", "majority", "loss", "labels", "confusion", "worst"}
    assert result["loss"] == pytest.approx(-sum(math.log(p[t].item()) for p, t in zip(found, truth)) / 6, rel=1e-5)
    assert result["accuracy"] == pytest.approx(np.mean([int(p.argmax()) == t for p, t in zip(found, truth)]))
    score = evaluate.score(model, tokenizer, rows.batches(2))
    assert set(score) == {"loss", "accuracy"} and score["loss"] == pytest.approx(result["loss"], rel=1e-5)
    wrong = sorted((p[t].item(), text) for p, t, text in zip(found, truth, TEXTS) if int(p.argmax()) != t)
    assert [worst["text"] for worst in result["worst"]] == [text for _, text in wrong][:5] and wrong
    for worst in result["worst"]:
        assert worst["taken_for"] != worst["label"] == dict(EXAMPLES)[worst["text"]] and 1 / 3 < worst["probability"] <= 1
    assert set(result["labels"]) == set(LABELS) and result["labels"]["bad"].keys() == {"precision", "recall", "F1", "support"}


# ------------------------------------------------------------------ files


WRITTEN = {
    "lines.jsonl": '{"text": "很好 🙂", "label": "good"}\n{"text": "a, \\"b\\"", "label": 0}\n',
    "array.json": '[{"Sentence": "很好 🙂", "Category": "good"}, {"sentence": "a, \\"b\\"", "class": 0, "id": 7}]',
    "table.csv": '\ufeffid,Label,review\r\n1,good,很好 🙂\r\n2,0,"a, ""b"""\r\n',
    "table.tsv": 'label\ttext\ngood\t很好 🙂\n0\ta, "b"\n',
    "chinese.csv": '标签;内容\ngood;很好 🙂\n0;"a, ""b"""\n',
    "table.txt": 'text\tlabel\n很好 🙂\t good \na, "b"\t0\n',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_all_kinds_of_files_give_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(WRITTEN[name].encode())
    assert classifier.read(tmp_path / name) == ([("很好 🙂", "good"), ('a, "b"', "0")], [])


def test_records_without_text_or_label_are_left_out_with_their_line(tmp_path):
    path = tmp_path / "reviews.jsonl"
    wrong = ['{"text": " ", "label": "a"}', '{"text": 5, "label": "a"}', '{"text": "x", "label": null}', '{"text": "x", "label": true}',
             '{"text": "x", "label": 0.5}', '{"text": "x"}', '{"text": "x", "content": "y", "label": "a"}', "[1]", '{"text": "x", "label": " "}']
    path.write_text("\n".join(['{"text": "x", "label": "two\\nlines \\ud83d"}', *wrong]))
    found, problems = classifier.read(path)
    assert found == [("x", "two lines \ufffd")] and [p.removeprefix(f"{path}:").split(":")[0] for p in problems] == list(map(str, range(2, 11)))
    assert problems[0].endswith("the text is empty, must be text") and "keys are text" in problems[5] and "list" in problems[7]
    assert 'name the text "text" and its label "label", each once' in problems[6]


@pytest.mark.parametrize("labels, said", [
    (["a"] * 10, "10 texts have 1 different labels (a)"),
    ([str(i) for i in range(10)], "10 texts have 10 different labels (0, 1, 2, 3, 4, 5, 6, 7, … (10 in all))"),
])
def test_what_cannot_be_classes_is_refused(labels, said):
    with pytest.raises(InputError) as refused:
        labels_of([("x", label) for label in labels])
    assert str(refused.value).startswith(said)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model to fine-tune and labelled texts: whether a text is about boats or about the mill."""
    place = tmp_path_factory.mktemp("classifier")
    save_base(place, tokenizer)
    about = {"船 | boats": "Boats carry {} to the sea.", "磨坊": "The mill grinds {} until the evening.", "neither $x$": "小河 {}"}
    lines = [f"{text.format(i)}\t{label}" for i in range(20) for label, text in about.items()]
    (place / "texts.tsv").write_text("\n".join(["text\tlabel", *lines, "\tno text"]) + "\n", encoding="utf-8")
    return place


@pytest.fixture
def start(place, monkeypatch):
    """start(…flags): finetune.py's main() in this process, in fp32."""
    monkeypatch.chdir(place)
    return partial(call_main, monkeypatch, "finetune.py", speedup=0.1)


TASK = ["--data", "texts.tsv", "--val-data", "texts.tsv", "--init", "base", "--task", "classify", *FLAGS, "--balance"]


@pytest.fixture
def whole(place, start):
    """The folder of a run that was never stopped."""
    if not (place / "whole").exists():
        start(*TASK, "--out", place / "whole")
    return place / "whole"


def test_a_run_reports_each_label(whole):
    report = (whole / "report.md").read_text(encoding="utf-8")
    assert "| label | precision | recall | F1 | support |" in report and "| 船 \\| boats | " in report and "| 磨坊 | " in report
    assert (whole / "confusion.png").read_bytes()[:4] == b"\x89PNG" and "![What was taken for what](confusion.png)" in report
    numbers = json.loads((whole / "report.json").read_text(encoding="utf-8"))
    assert numbers["before"] is None and sum(map(sum, numbers["after"]["confusion"])) == 60
    assert numbers["data"]["labels"] == {"船 | boats": 20, "磨坊": 20, "neither $x$": 20}
    assert list(numbers["asked"])[:3] == ["Boats carry 0 to the sea.", "The mill grinds 0 until the evening.", "小河 0"]
    assert len(numbers["asked"]) == 5


def test_a_run_learns_its_labels(place, start, tmp_path, capsys):
    start(*TASK, "--max-steps", 40, "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "left out: texts.tsv:62: the text is empty, must be text" in said.err
    assert "test accuracy 1.000, macro F1 1.000 after" in said.out and "before" not in said.out.splitlines()[-2]
    result = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["after"]
    assert result["accuracy"] == 1 and result["worst"] == []


@pytest.mark.parametrize("method", [[], ["--method", "lora", "--rank", "4"]], ids=["full", "lora"])
def test_a_killed_run_resumes_to_the_same_end(method, place, start, tmp_path, monkeypatch):
    start(*TASK, *method, "--out", tmp_path / "whole")
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, training, "learning_rate_factor", lambda step, *_: step == 5)
        start(*TASK, *method, "--out", tmp_path / "cut")
    start("--resume", "--out", tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == 8
    assert any("score" in name for name in tensors_of(tmp_path / "cut" / "last"))


def test_a_classifiers_sample_gives_the_likeliest_labels_and_refuses_what_is_for_text(whole, monkeypatch, capsys):
    def sample(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(whole), "--prompt", "Boats", *flags])
        sample_script.main()

    sample()
    shares = re.findall(r"([\d.]+)%", capsys.readouterr().out)
    assert len(shares) == 3 and sum(map(float, shares)) == pytest.approx(100, abs=0.2) and shares == sorted(shares, key=float, reverse=True)
    for flags in (["--temperature", "0.1"], ["--max-new-tokens", "3"], ["--stop", "x"], ["--raw"], ["--num-samples", "2"]):
        with pytest.raises(InputError, match=f"gives labels, not text: {flags[0]} is of no use to it"):
            sample(*flags)


def test_a_chat_does_not_start_from_a_classifier_and_balance_is_for_labels(whole, place, start, tmp_path):
    shutil.copy(Path(__file__).parent.parent / "data" / "samples" / "dialogues.jsonl", place)
    chat = ["--data", "dialogues.jsonl", "--val-data", "dialogues.jsonl", "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="--init is a classifier"):
        start(*chat, "--init", whole)
    with pytest.raises(InputError, match="--balance is for --task classify"):
        start(*chat, "--init", "base", "--balance")
    held_out = tmp_path / "new.tsv"
    held_out.write_text("text\tlabel\nBoats\tships\n")
    with pytest.raises(InputError, match="no training text has the labels ships of some others: give each more texts"):
        start(*TASK, "--val-data", held_out, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
