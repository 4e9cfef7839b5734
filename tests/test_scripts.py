"""The three scripts, end to end on a CPU, offline, with tiny sizes; and what they say of wrong input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import tyro

import finetune
from nanochat import InputError, checkpoint, formats
from nanochat.generate import Chat, SampleConfig
from nanochat.resume import settings_to_resume
from nanochat.training import TrainConfig

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "data" / "samples"
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--vocab-size", "384", "--block-size", "128"]
SHORT = ["--max-steps", "5", "--batch-size", "2"]


def script(name: str, *args, cwd: Path, stdin: str = "", **env) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does; text is UTF-8 both ways."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, input=stdin, capture_output=True,
        encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=300,
    )


def last_line(finished: subprocess.CompletedProcess) -> str:
    """The one line of an error: exit code 2, no traceback."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which train.py and finetune.py have run with tiny sizes and no other flags."""
    folder = tmp_path_factory.mktemp("scripts")
    text = SAMPLES / "garden.txt"
    trained = script("train.py", "--data", text, *TINY, *SHORT, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    tuned = script("finetune.py", "--data", SAMPLES / "dialogues.jsonl", "--val-data", SAMPLES / "dialogues.jsonl",
                   *SHORT, cwd=folder)
    assert tuned.returncode == 0, tuned.stderr
    (folder / "train.log").write_text(trained.stdout + trained.stderr, encoding="utf-8")
    (folder / "finetune.log").write_text(tuned.stdout + tuned.stderr, encoding="utf-8")
    return folder


def test_one_of_several_processes_that_are_not_torchruns_is_refused(folder):
    refused = script("sample.py", "--prompt", "Hello", cwd=folder, WORLD_SIZE="4")
    assert last_line(refused) == ("error: WORLD_SIZE is 4, but RANK is not set: start several processes with torchrun, "
                                  "or one with WORLD_SIZE=1")


def test_pretraining_leaves_a_complete_run_folder(folder):
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "bits per byte" in log and "settings: {" in log
    run = folder / "out" / "pretrained"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert "val_bits_per_byte" in records[-1]
    for name in ("best", "last"):
        files = {path.name for path in (run / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "nanochat.json", "resume"} <= files
    settings = json.loads((run / "last" / "nanochat.json").read_text(encoding="utf-8"))["settings"]
    assert settings["n_embd"] == 32 and settings["training"]["max_steps"] == 5


def test_finetuning_tells_the_test_perplexity_before_and_after(folder):
    log = (folder / "finetune.log").read_text(encoding="utf-8")
    assert re.search(r"test perplexity [\d.]+ before, perplexity [\d.]+ after", log)
    assert "replies:" in log


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--task", "classify", "--balance", "--no-recompute"]])
def test_what_a_run_had_switched_on_stays_on_whether_named_again_or_not(flags):
    began = finetune.Settings(task="classify", balance=True, training=TrainConfig(recompute=True))
    saved = {"conditions": {"settings": json.loads(json.dumps(asdict(began), default=str)), "processes": 1}}
    parse = partial(tyro.cli, finetune.Settings, args=flags)
    now = settings_to_resume(parse(), saved, parse)
    assert now.training.recompute == ("--no-recompute" not in flags)  # which changes no weight
    assert now.balance and now.resume and now.task == "classify"
    saved["conditions"]["settings"]["balance"] = False
    if "--balance" in flags:
        with pytest.raises(InputError, match="balance"):
            settings_to_resume(parse(), saved, parse)


@pytest.mark.slow
def test_a_run_of_a_preset_that_began_with_given_weights_resumes_without_naming_it(folder, tmp_path):
    run = ["--data", SAMPLES / "garden.txt", "--preset", "gpu-hour", "--init", folder / "out" / "pretrained",
           "--max-steps", 2, "--batch-size", 2, "--accumulate", 1, "--out", "again"]
    began = script("train.py", *run, cwd=tmp_path)
    resumed = script("train.py", "--resume", "--out", "again", cwd=tmp_path)
    assert began.returncode == resumed.returncode == 0 and "the run is complete" in resumed.stderr, began.stderr + resumed.stderr


def test_sample_answers_a_finetuned_model_and_continues_a_base_model(folder):
    answered = script("sample.py", "--prompt", "Hello, how are you?", "--max-new-tokens", 8, cwd=folder)
    assert answered.returncode == 0 and "Hello" not in answered.stdout, answered.stderr
    continued = script("sample.py", "--checkpoint", "out/pretrained", "--prompt", "The river", "--max-new-tokens", 8,
                       "--num-samples", 2, cwd=folder)
    assert continued.returncode == 0 and continued.stdout.count("The river") == 2, continued.stderr


def test_scripts_speak_utf8_in_any_locale(folder):
    for env in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}):
        said = script("sample.py", "--checkpoint", "out/pretrained", "--prompt", "小河🙂", "--max-new-tokens", 4,
                      cwd=folder, **env)
        assert said.returncode == 0 and said.stdout.startswith("小河🙂"), said.stderr


def test_show_batch_marks_what_is_learned_and_trains_nothing(folder, tmp_path):
    data = SAMPLES / "dialogues.jsonl"
    shown = script("finetune.py", "--init", folder / "out" / "pretrained", "--data", data, "--val-data", data,
                   "--show-batch", "--batch-size", "8", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "<|user|>晚上好！<|end|><|assistant|>⟦晚上好，请坐。<|end|>⟧<|user|>今天忙吗？<|end|>" in shown.stdout
    assert shown.stdout.count("⟦") == 16 and not (tmp_path / "out").exists()


def test_eight_dialogues_are_learned_word_for_word_and_end(folder, tmp_path):
    """Over-fitting: two-turn dialogues, four of them Chinese, come back exactly, and stop."""
    source = SAMPLES / "dialogues.jsonl"
    conversations, _ = formats.read(source)
    assert len(conversations) == 8
    tuned = script("finetune.py", "--init", folder / "out" / "pretrained", "--data", source, "--val-data", source,
                   "--batch-size", 4, "--max-steps", 200, "--learning-rate", "1e-2", "--eval-every", 100,
                   "--out", "out", cwd=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    model, tokenizer = checkpoint.load(tmp_path / "out")
    for conversation in conversations:
        chat = Chat(model, tokenizer, SampleConfig(temperature=0, max_new_tokens=60))
        for question, answer in zip(conversation[::2], conversation[1::2]):
            assert "".join(chat.ask(question["content"])) == answer["content"]


# ------------------------------------------------------------------ wrong input


def test_a_folder_with_a_run_is_not_written_over(folder):
    for name in ("train.py", "finetune.py"):
        assert "--resume goes on, --overwrite starts anew" in last_line(script(name, *SHORT, cwd=folder))


def test_an_overwrite_that_fails_costs_no_old_run(folder, tmp_path):
    failed = script("finetune.py", "--overwrite", "--data", tmp_path / "nobody.jsonl", cwd=folder)
    assert "nobody.jsonl" in last_line(failed)
    assert (folder / "out" / "finetuned" / "best" / "model.safetensors").exists()


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, flags, expected",
    [
        slow("train.py", ["--data", "nothing.txt"], "nothing.txt"),
        slow("train.py", ["--data", "empty.txt"], "empty.txt"),
        slow("train.py", ["--data", "wikipedio"], "names: bbc, chitchat, kdconv, wikipedia"),
        slow("train.py", ["--init", "nowhere/there/is"], "nowhere/there/is"),
        slow("train.py", ["--device", "tpu"], "--device tpu"),
        slow("train.py", ["--data", "gbk.txt"], "not UTF-8"),
        ("train.py", ["--data", "text.txt", *TINY, "--n-head", "5"], "n_embd 32 is not a multiple of n_head 5"),
        slow("train.py", ["--resume"], "out/pretrained"),
        ("finetune.py", ["--data", "broken.jsonl"], "broken.jsonl:1: not JSON"),
        slow("finetune.py", ["--data", "nobody.jsonl"], "nobody.jsonl: No such file"),
        slow("finetune.py", ["--data", "one.jsonl"], "too few to hold some out"),
        slow("finetune.py", ["--data", "two.jsonl"], "out/pretrained: no such checkpoint"),
        ("sample.py", ["--checkpoint", "nowhere/there/is"], "nowhere/there/is"),
    ],
)
def test_wrong_input_gets_one_line(name, flags, expected, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("A river. " * 2000)
    (tmp_path / "gbk.txt").write_bytes("小河流过磨坊。".encode("gbk") * 100)
    (tmp_path / "broken.jsonl").write_text('{"messages": [\n')
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": conversation}) + "\n")
    many = [json.dumps({"messages": [{"role": "user", "content": str(n)}, conversation[1]]}) for n in range(200)]
    (tmp_path / "two.jsonl").write_text("\n".join(many))
    line = last_line(script(name, *flags, cwd=tmp_path))
    assert line.startswith("error: ") and expected in line
    assert not list(tmp_path.glob("out/corpus/*/corpus.json"))  # it is said before hours of preparing a corpus


def test_a_misspelt_flag_gets_a_suggestion(tmp_path):
    finished = script("train.py", "--learning-rat", "1", cwd=tmp_path)
    assert finished.returncode == 2 and "--learning-rate" in finished.stderr


@pytest.mark.parametrize("name", ["train.py", "finetune.py", "sample.py"])
def test_help_names_every_option_with_its_default(name, tmp_path):
    shown = script(name, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "(default:" in shown.stdout and "--device" in shown.stdout
