"""The recipes: each does what its paper says; each runs, and what it keeps opens."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import InputError, checkpoint, dialogue
from nanochat.model import GPT, GPTConfig
from nanochat.rows import Rows, Window
from nanochat.tokenizer import Tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
PAGES = sorted(path.stem for path in RECIPES.glob("*.py"))
NAMES = [name for name in PAGES if name not in ("trial", "speculative")]  # the first is what they share; the second trains nothing
sys.path.insert(0, str(RECIPES))

PAIRS = [
    ("Where do the boats go?", "To the sea.", "The miller counts letters until noon."),
    ("小河流过哪里？", "流过磨坊。", "四十。"),
    ("How many boats?", "Forty by noon, and then one more in the evening.", "Salt."),
]


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", PAGES)
def test_a_recipe_is_a_page_and_nothing_imports_it(name):
    assert len((RECIPES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 150
    for path in [*RECIPES.parent.glob("*.py"), *RECIPES.parent.glob("nanochat/*.py")]:
        assert f"import {name}\n" not in path.read_text(encoding="utf-8") and "recipes" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches_and_wrong_input_is_one_line(name, monkeypatch, capsys):
    recipe = importlib.import_module(name)

    def exit_of(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *flags])
        with pytest.raises(SystemExit) as end:
            sys.modules["trial"].run(recipe.Settings, recipe.main, recipe.__doc__)
        return end.value.code

    assert exit_of("--help") == 0
    assert "--examples" in (out := capsys.readouterr().out) and recipe.__doc__.split()[0] in out
    for flags in (("--examples", "0"), ("--init", "out/nowhere")):
        assert exit_of(*flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_table_says_mean_deviation_and_paired_difference(capsys):
    trial = importlib.import_module("trial")
    arms = {"plain": lambda seed: {"loss": 1.0 + 2 * seed}, "recipe": lambda seed: {"loss": 0.5 + 2 * seed}}
    trial.compare(SimpleNamespace(seeds=2), arms)
    assert capsys.readouterr().out.splitlines()[1].split() == ["loss", "2", "±", "1.4", "1.5", "±", "1.4", "-0.5", "±", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("dpo", ("--dpo-steps", "3", "--out", "kept")), ("prune", ("--drop", "1", "--out", "kept")), ("replay", ("--corpus", "text", "--out", "kept")),
    ("lr_range", ()), ("ensemble", ("--data", "labels.tsv", "--members", "2"))])
def test_a_recipe_runs_and_what_it_keeps_chats(name, flags, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "text"):
        Path(folder).mkdir()
    checkpoint.write(Path("base"), GPT(GPTConfig(vocab_size=384, block_size=64, n_layer=3, n_head=2, n_embd=32)), tokenizer)
    said = [[{"role": "user", "content": f"How many boats at {i}?"}, {"role": "assistant", "content": f"{i} and one more."}] for i in range(60)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said), encoding="utf-8")
    Path("labels.tsv").write_text("text\tlabel\n" + "".join(f"boat {i}\t{'odd' if i % 2 else 'even'}\n" for i in range(60)), encoding="utf-8")
    for split in ("train", "val"):
        Path(f"text/{split}.jsonl").write_text(json.dumps({"title": "Mill", "text": "A river runs past the mill. " * 99}) + "\n", encoding="utf-8")
    recipe = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--init", "base", "--data", "chats.jsonl", "--examples", "12", "--steps", "4", "--seeds", "2",
                                      "--block-size", "48", *flags])
    sys.modules["trial"].run(recipe.Settings, recipe.main, recipe.__doc__)
    assert "difference" in (out := capsys.readouterr().out) and "±" in out
    if "--out" in flags:
        model, tokenizer = checkpoint.load("kept")
        assert tokenizer.chat_template and len(model.h) == (2 if name == "prune" else 3)


# ------------------------------------------------------------------ one by one


@pytest.mark.slow
def test_dpo_loss_is_that_of_trl(tokenizer, make_model, tmp_path):
    """The same weights, the same records: log-likelihoods, margin and loss of trl's DPOTrainer."""
    import trl  # takes seconds
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2LMHeadModel

    dpo = importlib.import_module("dpo")
    policy, reference = (make_model(torch.float32, vocab_size=384, block_size=64) for _ in range(2))
    for name, model in (("policy", policy), ("reference", reference)):
        (tmp_path / name).mkdir()
        checkpoint.write(tmp_path / name, model, tokenizer)
    file = tmp_path / "pairs.jsonl"
    records = [{key: [{"role": role, "content": text}] for key, role, text in zip(
        ("prompt", "chosen", "rejected"), ("user", "assistant", "assistant"), texts)} for texts in PAIRS]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    args = trl.DPOConfig(tmp_path / "out", beta=0.3, per_device_train_batch_size=3, use_cpu=True, report_to="none", bf16=False,
                         gradient_checkpointing=False, max_length=None)
    trainer = trl.DPOTrainer(
        GPT2LMHeadModel.from_pretrained(tmp_path / "policy"), GPT2LMHeadModel.from_pretrained(tmp_path / "reference"), args=args,
        train_dataset=Dataset.from_list(records), processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy"))
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))

    both = dpo.to_rows(dpo.read_pairs(file), tokenizer, 64)
    ours, margin = dpo.dpo_loss(*dpo.of_all(policy, both), *dpo.of_all(reference, both), beta=0.3)
    assert margin.abs().min() > 0.01  # else all losses were ln 2
    assert abs(ours.mean().item() - theirs.item()) < 1e-5


def test_dpo_of_given_pairs_wants_a_model_that_chats(tokenizer, tmp_path, make_model):
    dpo = importlib.import_module("dpo")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n" for texts in PAIRS * 4), encoding="utf-8")
    plain = Tokenizer.train(["words of a text"], 320)
    checkpoint.write_hugging_face(tmp_path, make_model(torch.float32, vocab_size=plain.vocab_size, block_size=64), plain)
    with pytest.raises(InputError, match="does not chat"):
        dpo.main(dpo.Settings(init=str(tmp_path), pairs=file, seeds=1))


def test_dpo_reads_texts_and_messages_alike_and_names_the_line_of_a_wrong_pair(tmp_path):
    dpo = importlib.import_module("dpo")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}\n{"prompt": [{"role": "user", "content": "Hi"}], '
                    '"chosen": [{"role": "assistant", "content": "Hello."}], "rejected": "No."}\n', encoding="utf-8")
    first, second = dpo.read_pairs(file)
    assert first == second == ([{"role": "user", "content": "Hi"}], "Hello.", "No.")
    system = {"role": "system", "content": "Be kind."}
    assert dpo.read_pairs(file, "Be kind.")[0] == ([system, {"role": "user", "content": "Hi"}], "Hello.", "No.")  # as a chat begins
    file.write_text('{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}\n{"prompt": "Hi", "chosen": "Hello."}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"pairs.jsonl:2: .*rejected"):
        dpo.read_pairs(file)


def test_pruned_is_the_network_without_the_block(make_model):
    prune = importlib.import_module("prune")
    model = make_model(n_layer=3)
    tokens = torch.randint(0, 97, (3, 20))
    features = model.wte(tokens) + model.wpe(torch.arange(20))
    for layer in (0, 2):
        features = model.layer(model.h[layer], features, None)
    expected = model.head(model.ln_f(features))
    prune.drop_block(model, 1)
    assert torch.allclose(model(tokens), expected, atol=1e-12) and model.config.n_layer == 2


def test_prune_finds_the_block_that_does_nothing(make_model, tokenizer):
    prune = importlib.import_module("prune")
    model = make_model(torch.float32, n_layer=3, vocab_size=384, block_size=64)
    with torch.no_grad():
        for part in (model.h[1].attn.c_proj, model.h[1].mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
    rows = dialogue.to_rows([[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b, _ in PAIRS], tokenizer, 64)
    losses = prune.losses_without(model, tokenizer, rows)
    assert len(model.h) == 3 and len(set(losses)) == 3
    whole = model(*rows.batch(range(len(rows)))).item() / rows.supervised_tokens
    assert losses[1] == pytest.approx(whole, rel=1e-5)


def test_replay_mixes_the_asked_share():
    replay = importlib.import_module("replay")
    new, old = (Rows([[Window([i, number], [False, True])] for number in range(90)], 8) for i in (1, 2))
    mixed = replay.mixed(new, old, share=0.25, seed=0)
    assert len(mixed) == 120 and mixed.rows[:90] == new.rows and all(row in old.rows for row in mixed.rows[90:])
    assert mixed.rows != replay.mixed(new, old, 0.25, seed=1).rows
    with pytest.raises(InputError, match="has 90"):
        replay.mixed(new, old, 0.9, seed=0)


def test_an_ensemble_averages_probabilities():
    ensemble = importlib.import_module("ensemble")
    members = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]])
    assert torch.allclose(ensemble.averaged(list(members)), torch.tensor([[0.35, 0.65]]))


def test_lr_range_proposes_a_fifth_of_the_rate_of_the_lowest_loss(tmp_path):
    lr_range = importlib.import_module("lr_range")
    curve = [(rate := 10 ** (-5 + step / 20), 5 + (math.log10(rate) + 2) ** 2) for step in range(80)]
    curve[-1] = (curve[-1][0], math.inf)
    rate = lr_range.proposed(curve)
    assert rate == pytest.approx(2e-3, rel=0.01)
    lr_range.draw(curve, rate, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_raises_the_rate_and_stops_when_the_loss_grows(make_model):
    lr_range, training = (importlib.import_module(name) for name in ("lr_range", "nanochat.training"))
    rows = Rows([[Window([i, i + 1, i + 2], [False, True, True])] for i in range(40)], 24)
    curve = lr_range.sweep(make_model(torch.float32), rows, training.TrainConfig(), 1e-4, 1e3, 30, torch.float32)
    rates, losses = zip(*curve)
    assert rates[0] == 1e-4 and all(b / a == pytest.approx(rates[1] / rates[0]) for a, b in zip(rates, rates[1:]))
    assert len(curve) < 30 and not losses[-1] <= 1.5 * min(losses)
