"""A checkpoint that finetune.py wrote, judged by EleutherAI's lm-eval and by evaluate.py: they find the same.

What lm-eval calls acc is our accuracy, its acc_bytes our accuracy_per_byte; its acc_norm divides by characters. Its
rolling likelihood leaves out the token that ends a text, which `text_rows` counts, and lets the last window of a long
text see all that fits before it, where ours sees one token.
"""

import math
from pathlib import Path

import pytest
import torch
from test_scripts import SAMPLES, SHORT, TINY, script

from nanochat import checkpoint, evaluate

pytestmark = pytest.mark.slow  # importing lm_eval takes longer than all else here
QUESTIONS = SAMPLES / "questions.jsonl"
LONG = {"query": "The boats carry grain, salt and letters; " * 20 + "to the", "choices": ["sea", "mill"], "gold": 0}
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
TEXTS = ["The miller's daughter counts the boats.", "他们去海边。🙂 Where do they go?", "Grain, salt and letters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with runs of finetune.py, of all weights and of LoRA, as out/full and out/lora."""
    folder = tmp_path_factory.mktemp("lm_eval")
    dialogues = SAMPLES / "dialogues.jsonl"
    tuning = ["finetune.py", "--data", dialogues, "--val-data", dialogues, "--learning-rate", "1e-2"]
    for command in (["train.py", "--data", SAMPLES / "garden.txt", *TINY], [*tuning, "--out", "out/full"],
                    [*tuning, "--out", "out/lora", "--method", "lora"]):
        done = script(*command, *SHORT, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "out"


def of_lm_eval(model: dict, records: list[dict], monkeypatch, **task) -> dict:
    """What lm-eval finds for a task of its own kind of these records: {"results", "samples"}, offline, on the CPU."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from datasets import Dataset
    from lm_eval import simple_evaluate

    task |= {"task": "ours", "test_split": "test", "custom_dataset": lambda **_: {"test": Dataset.from_list(records)}}
    found = simple_evaluate("hf", model_args=model, tasks=[task], batch_size=3, device="cpu", bootstrap_iters=0)
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    return {"results": found["results"]["ours"], "samples": samples}


def opened(run: Path) -> dict:
    """A run as lm-eval takes it; LoRA's as PEFT merges it.

    lm-eval's own peft= ties the weights again after loading, which transformers 5 cannot do where PEFT has token rows.
    """
    if not (run / "base").exists():
        return {"pretrained": str(run / "best"), "dtype": "float32"}
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "best")
    return {"pretrained": adapted.merge_and_unload(), "tokenizer": str(run / "best")}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_lm_eval_and_evaluate_choose_alike(folder, name, monkeypatch):
    """Also where a query is empty, ends with a space, or is longer than the block."""
    questions = [*evaluate.read_questions(QUESTIONS), LONG]
    theirs = of_lm_eval(opened(folder / name), questions, monkeypatch, output_type="multiple_choice",
                        doc_to_text="query", doc_to_choice="choices", doc_to_target="gold",
                        metric_list=[{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")])
    model, tokenizer = checkpoint.load(folder / name)
    ours = evaluate.choose(model, tokenizer, questions)
    assert ours["accuracy"] == pytest.approx(theirs["results"]["acc,none"])
    assert ours["accuracy_per_byte"] == pytest.approx(theirs["results"]["acc_bytes,none"])
    assert len(theirs["samples"]) == len(questions) == 21
    for sample, question in zip(theirs["samples"], questions):
        found = [evaluate.loglikelihood(model, tokenizer, question["query"], f" {choice}")
                 for choice in question["choices"]]
        assert found == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-4), question


def test_lm_eval_and_text_rows_find_the_same_bits_per_byte(folder, monkeypatch):
    """Of texts that fit the block, but for the token that ends each, which only ours counts."""
    theirs = of_lm_eval(opened(folder / "full"), [{"text": text} for text in TEXTS], monkeypatch,
                        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
                        metric_list=[{"metric": metric} for metric in PERPLEXITIES])
    model, tokenizer = checkpoint.load(folder / "full")
    rows = evaluate.text_rows(TEXTS, tokenizer, model.config.block_size)
    whole = evaluate.score(model, tokenizer, rows.batches(2))["bits_per_byte"]
    ends = 0.0
    for text in TEXTS:
        ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text])
        ends += model.nll(ids[None, :-1], ids[None, 1:])[0, -1].item()
    for row in rows.rows:
        for window in row:
            window.supervised[-1] = False
    ours = evaluate.score(model, tokenizer, rows.batches(2))["bits_per_byte"]
    size, words = sum(len(text.encode("utf-8")) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
    assert ours == pytest.approx(theirs["results"]["bits_per_byte,none"], abs=1e-5)
    assert 2**ours == pytest.approx(theirs["results"]["byte_perplexity,none"], rel=1e-5)
    assert 2 ** (ours * size / words) == pytest.approx(theirs["results"]["word_perplexity,none"], rel=1e-4)
    assert whole - ours == pytest.approx(ends / math.log(2) / size, abs=1e-5)
