"""Killed, stopped, resumed: a run that goes on is the run that it would have been, for both scripts.

Most runs here are main() of a script in this process, killed by an exception that nobody catches
(the disk then holds what SIGKILL leaves) and resumed as elsewhere: with another random state,
another number of threads, and a probe that finds another dtype faster. Real processes and real
signals come at the end.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import CPU, RandomExamples, assert_equal_states, overflowing, run, tiny, without_times

import finetune
import train
from nanochat import InputError, checkpoint, corpus, dialogue, processes, rehearsal, runs, runtime, sources, training
from nanochat.lora import LoRAConfig
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.resume import FREE
from nanochat.runtime import Stopped
from nanochat.training import TrainConfig

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "data" / "samples"
SCRIPTS = {"train.py": train, "finetune.py": finetune}
# 8 steps of 4 rows, with 9 crops or 12 rows in an epoch: every checkpoint but one is in the midst of an epoch
FLAGS = ["--max-steps", "8", "--batch-size", "2", "--accumulate", "2", "--dropout", "0.1", "--warmup-steps", "2",
         "--learning-rate", "1e-2", "--save-every", "2", "--eval-every", "3"]


class Killed(BaseException):
    """The process is gone."""


def killed(monkeypatch, owner, name: str, when) -> None:
    """From now on the process dies when `name` of `owner` is called with arguments of which `when` is true."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        if when(*args, **kwargs):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def save_base(place: Path, tokenizer) -> None:
    """A model to fine-tune, place/base."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    runs.save(place / "base", 1, GPT(GPTConfig(**sizes)), tokenizer, settings={}, results={})


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model to fine-tune and the data of both scripts."""
    place = tmp_path_factory.mktemp("resume")
    save_base(place, tokenizer)
    for name in ("garden.txt", "dialogues.jsonl"):
        shutil.copy(SAMPLES / name, place)
    return place


def flags_of(name: str, *more) -> list[str]:
    if name == "train.py":
        own = "--data garden.txt --n-layer 2 --n-head 2 --n-embd 32 --vocab-size 384 --block-size 64".split()
    else:
        own = "--data dialogues.jsonl --val-data dialogues.jsonl --init base".split()
    return [*own, *FLAGS, *map(str, more)]


def call_main(monkeypatch, name: str, *flags, speedup: float) -> None:
    """main() of a script with these flags, in this process; speedup: of bf16, which is chosen above 1.2."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    monkeypatch.setattr(runtime, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)  # it would last
    monkeypatch.setattr(training, "draw_losses", lambda log, picture: None)  # half a second
    torch.manual_seed(99)
    SCRIPTS[name].main()


@pytest.fixture
def start(place, monkeypatch, request):
    """start("train.py", …flags): main() of a script, as a new process on the same machine."""

    def start(name: str, *flags, speedup: float = 9.0, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        call_main(monkeypatch, name, *flags, speedup=speedup)

    monkeypatch.chdir(place)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    return start


def resume(start, name: str, out: Path, *flags) -> None:
    """Go on with no other flag, where bf16 is slow and two threads are usual."""
    start(name, "--resume", "--out", out, *flags, speedup=0.1, threads=2)


@pytest.fixture
def whole(place, start):
    """whole("train.py", "muon") → the folder of the run that was never stopped; each is run once."""

    def whole(name: str, optimizer: str) -> Path:
        out = place / f"whole-{name}-{optimizer}"
        if not out.exists():
            start(name, *flags_of(name, "--optimizer", optimizer), "--out", out)
        return out

    return whole


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    """The weights of a step, or its adapter's."""
    return load_file(next(path for path in step.iterdir() if path.name in ("adapter_model.safetensors", "model.safetensors")))


def assert_same_end(one: Path, other: Path) -> None:
    """Two run folders hold the same checkpoints, bit for bit, and the same log, but for its times."""
    assert without_times(read_metrics(one / "metrics.jsonl")) == without_times(read_metrics(other / "metrics.jsonl"))
    assert [p.name for p in runs.saved_steps(one)] == [p.name for p in runs.saved_steps(other)]
    assert not list(other.glob(".tmp-*"))
    for pointer in ("best", "last"):
        here, there = (checkpoint.followed(out / pointer) for out in (one, other))
        assert here.name == there.name
        weights = [tensors_of(step) for step in (here, there)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
        results = [checkpoint.read_json(step / "nanochat.json")["results"] for step in (here, there)]
        assert without_times(results[:1]) == without_times(results[1:])
    assert_equal_states(one, other)


def roll_back(out: Path, step: int) -> None:
    """Leave what a kill right after the checkpoint of `step` would have left (but the log, which is longer)."""
    for folder in runs.saved_steps(out):
        if runs.step_of(folder) > step:
            shutil.rmtree(folder)
    for pointer in ("best", "last"):
        (out / pointer).unlink(missing_ok=True)


# ------------------------------------------------------------------ killed


MOMENTS = {
    "in step 6": (training, "learning_rate_factor", lambda step, *_: step == 5),
    "while step 6 is being written": (runs, "write_sums", lambda folder: folder.name == ".tmp-step-000006"),
    "before last points to step 6": (runs, "point", lambda pointer, to: (pointer.name, to.name) == ("last", "step-000006")),
    "between its save and its evaluation": (training, "note_evaluation", lambda progress, _: progress.step == 6),
    "between its evaluation and its line": (MetricsLog, "write", lambda self, **record: record["step"] == 6),
    "in the last evaluation": (training, "note_evaluation", lambda progress, _: progress.step == 8),
}


@pytest.mark.parametrize("name, optimizer", [("train.py", "muon"), ("finetune.py", "adamw")])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_a_run_resumes_to_the_same_end(name, optimizer, moment, start, whole, tmp_path, monkeypatch):
    """With no flag but --resume: weights, optimizer, generators, data position, metrics, best."""
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, *MOMENTS[moment])
        start(name, *flags_of(name, "--optimizer", optimizer), "--out", tmp_path / "cut")
    resume(start, name, tmp_path / "cut")
    assert_same_end(whole(name, optimizer), tmp_path / "cut")


@pytest.mark.parametrize("name, optimizer", [("train.py", "adamw"), ("finetune.py", "muon")])
def test_a_run_killed_and_resumed_twice_comes_to_the_same_end(name, optimizer, start, whole, tmp_path, monkeypatch):
    """The second time before it has taken a step, with the flags of the beginning repeated."""
    flags = flags_of(name, "--optimizer", optimizer)
    for last_steps, more in ((3, []), (5, ["--resume"]), (5, ["--resume"])):
        with monkeypatch.context() as dying, pytest.raises(Killed):
            killed(dying, training, "learning_rate_factor", lambda step, *_, end=last_steps: step == end)
            start(name, *flags, *more, "--out", tmp_path / "cut")
    resume(start, name, tmp_path / "cut")
    assert_same_end(whole(name, optimizer), tmp_path / "cut")


def test_the_scale_of_fp16_goes_on_from_what_it_had_come_to(tokenizer, tmp_path, monkeypatch):
    settings = dict(dtype=torch.float16, save_every=2, eval_every=100, keep=9)
    with monkeypatch.context() as machine:
        overflowing(machine, {0, 1})  # its first two steps are skipped, and the scale is a quarter of what it was
        _, expected = run(tiny(tokenizer), RandomExamples([9] * 5), tmp_path / "whole", tokenizer, **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    roll_back(tmp_path / "cut", 2)
    step, state = runs.open_run(tmp_path / "cut", resume=True, overwrite=False)
    assert state["scaler"]["scale"] == torch.amp.GradScaler("cpu").get_scale() / 4
    _, records = run(checkpoint.load(step)[0], RandomExamples([9] * 5), tmp_path / "cut", tokenizer, resume=state, **settings)
    assert without_times(records) == without_times(expected)
    assert_equal_states(tmp_path / "whole", tmp_path / "cut")


def test_the_seconds_of_training_count_on(tokenizer, tmp_path):
    run(tiny(tokenizer), RandomExamples([9] * 5), tmp_path, tokenizer, save_every=2)
    roll_back(tmp_path, 2)
    step, state = runs.open_run(tmp_path, resume=True, overwrite=False)
    state["progress"]["seconds"] = 1000.0
    _, records = run(checkpoint.load(step)[0], RandomExamples([9] * 5), tmp_path, tokenizer, save_every=2, resume=state)
    assert [r["seconds"] > 1000 for r in records] == [False, False, True, True]


@pytest.mark.parametrize("name", SCRIPTS)
def test_max_minutes_is_measured_once_and_resumes_with_the_same_steps(name, start, tmp_path, monkeypatch):
    """Ten times slower when it goes on, the run keeps its length and so its learning rates."""

    def minutes(seconds_per_step: float, *flags) -> None:
        with monkeypatch.context() as machine:
            machine.setattr(rehearsal, "rehearse", lambda model, *args, **kwargs: (model, seconds_per_step))
            start(name, *flags, "--out", tmp_path / "cut")

    flags = flags_of(name)
    flags[flags.index("--max-steps") : flags.index("--max-steps") + 2] = ["--max-minutes", "0.01"]
    minutes(0.06, *flags, "--keep", "99")
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == 10
    shutil.copytree(tmp_path / "cut", tmp_path / "whole", symlinks=True)
    roll_back(tmp_path / "cut", 2)
    minutes(0.6, "--resume")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("began, later, dtype", [(9.0, 0.1, "bfloat16"), (0.1, 9.0, "float32")])
def test_the_probed_dtype_comes_from_the_checkpoint(began, later, dtype, start, tmp_path, monkeypatch, capsys):
    flags = flags_of("finetune.py", "--dtype", "auto")
    start("finetune.py", *flags, "--out", tmp_path / "whole", speedup=began)
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, training, "learning_rate_factor", lambda step, *_: step == 4)
        start("finetune.py", *flags, "--out", tmp_path / "cut", speedup=began)
    capsys.readouterr()
    start("finetune.py", "--resume", "--out", tmp_path / "cut", speedup=later)
    assert f"on cpu in {dtype}" in capsys.readouterr().err
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_the_number_of_threads_comes_from_the_checkpoint(interrupted, start, monkeypatch, capsys):
    """Sums of parts, one a thread, are rounded elsewhere; a machine with fewer cores says so."""
    resume(start, "train.py", interrupted("train.py"))
    assert torch.get_num_threads() == 1 and "note:" not in capsys.readouterr().err
    edit_state(out := interrupted("train.py"), lambda state: state["conditions"].update(threads=os.cpu_count() + 1))
    start("train.py", "--resume", "--out", out)
    note = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("note:"))
    assert f"{os.cpu_count() + 1} threads, now {os.cpu_count()}" in note


def test_another_kind_of_device_is_said(interrupted, start, capsys):
    edit_state(out := interrupted("train.py"), lambda state: state["conditions"].update(device="cuda:1"))
    start("train.py", "--resume", "--out", out)
    note = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("note:"))
    assert "cuda" in note and "now cpu" in note


@pytest.mark.parametrize("end", range(1, 6))
def test_patience_and_best_count_on_across_a_kill(end, tokenizer, tmp_path, monkeypatch):
    """Killed between the save and the evaluation of each step in turn, it stops at the same one, with the same best."""
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6, 5: 2.7}
    config = TrainConfig(batch_size=2, max_steps=10, eval_every=1, keep=1, patience=3)

    def go(out: Path, **state):
        torch.manual_seed(0)
        model = tiny(tokenizer)
        if state:
            model = checkpoint.load(checkpoint.followed(out / "last"))[0]
        return training.train(model, tokenizer, RandomExamples([9] * 5), config, out=out, settings={}, device=CPU,
                              dtype=torch.float32, sample=lambda: {}, **state,
                              evaluate=lambda: {"val_loss": losses[runs.step_of(checkpoint.followed(out / "last"))]})

    expected = go(tmp_path / "whole")
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, training, "note_evaluation", lambda progress, _: progress.step == end)
        go(tmp_path / "cut")
    _, state = runs.open_run(tmp_path / "cut", resume=True, overwrite=False)
    progress = go(tmp_path / "cut", resume=state)
    assert (progress.step, progress.best_loss, progress.evaluations_since_best) == (5, 2.0, 3)
    assert (expected.step, expected.best_loss, expected.evaluations_since_best) == (5, 2.0, 3)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert checkpoint.followed(tmp_path / "cut" / "best").name == "step-000002"


def test_a_corpus_that_is_gone_is_made_anew_and_the_run_goes_on(start, whole, interrupted):
    out = interrupted("train.py")
    shutil.rmtree(out.parent / "corpus")
    resume(start, "train.py", out)
    assert_same_end(whole("train.py", "muon"), out)


# ------------------------------------------------------------------ what --resume takes and refuses


@pytest.fixture
def interrupted(place, start, tmp_path, monkeypatch):
    """interrupted("train.py") → a copy of the folder of a run that was killed in step 6."""

    def interrupted(name: str) -> Path:
        original = place / f"interrupted-{name}"
        if not original.exists():
            with monkeypatch.context() as dying, pytest.raises(Killed):
                killed(dying, *MOMENTS["in step 6"])
                start(name, *flags_of(name, "--optimizer", "muon" if name == "train.py" else "adamw"), "--out", original / "run")
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(original, copy, symlinks=True)
        return copy / "run"

    return interrupted


def edit_state(out: Path, change) -> None:
    """Change the saved state of the newest step, and its sum."""
    step = checkpoint.followed(out / "last")
    state = torch.load(step / "resume" / "state.pt", weights_only=True)
    change(state)
    torch.save(state, step / "resume" / "state.pt")
    (step / checkpoint.SUMS).unlink()
    runs.write_sums(step)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER = {  # another value for every setting
    "data": "other.txt", "val_data": "other.txt", "init": "elsewhere", "vocab_size": "500", "block_size": "32",
    "n_layer": "3", "n_head": "4", "n_embd": "64", "dropout": "0.3",
    "batch_size": "4", "accumulate": "3", "max_steps": "9", "max_minutes": "3", "epochs": "2", "optimizer": "adamw",
    "learning_rate": "0.02", "eval_every": "5", "warmup_steps": "3", "weight_decay": "0.2", "clip": "2", "dtype": "float16", "compile": "no",
    "seed": "7", "preset": "gpt2", "beta2": "0.95", "task": "classify", "method": "lora", "learn": "1", "balance": True,
    "rank": "4", "alpha": "3", "lora_dropout": "0.5", "targets": "mlp.c_fc", "system": "Hello",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_is_free_on_resume_or_refused_by_name(name, interrupted, start):
    """A setting that is added later must be thought of here: it fails this test until it is."""
    out = interrupted(name)
    before = files_in(out)
    owners = (SCRIPTS[name].Settings, TrainConfig, *([LoRAConfig] if name == "finetune.py" else []))
    settings = {field.name for owner in owners for field in fields(owner)} - {"training", "lora"}
    assert FREE == {"resume", "overwrite", "out", "device", "keep", "save_every", "patience", "show_batch", "recompute"}
    for setting in sorted(settings - FREE):
        flag, value = f"--{setting.replace('_', '-')}", OTHER[setting]
        if (name, setting) == ("finetune.py", "optimizer"):
            value = "muon"
        with pytest.raises(InputError) as refusal:
            start(name, "--resume", "--out", out, flag, *([] if value is True else [value]))
        assert f"{flag} " in str(refusal.value) and "--init" in str(refusal.value) and "\n" not in str(refusal.value)
        assert str(value) in str(refusal.value)
    assert files_in(out) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_start_that_the_run_would_delete_is_refused(name, interrupted, start):
    out = interrupted(name)
    before = files_in(out)
    data = "garden.txt" if name == "train.py" else "dialogues.jsonl"
    with pytest.raises(InputError, match="lies in --out .*, where this run begins anew"):
        start(name, "--data", data, "--init", out / "last", "--out", out, "--overwrite")
    assert files_in(out) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_block_longer_than_the_models_is_refused(name, place, start, tmp_path, monkeypatch):
    data = "garden.txt" if name == "train.py" else "dialogues.jsonl"
    if name == "train.py":  # a preset's length is no wish
        monkeypatch.setattr(train, "PRESETS", {"laptop": train.Settings(block_size=64)})
    with pytest.raises(InputError, match=r"--block-size is 512, must be .*at most (the model's )?64"):
        start(name, "--data", data, "--val-data", data, "--init", "base", "--block-size", 512, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_changed_settings_are_named_with_what_they_were(interrupted, start):
    with pytest.raises(InputError, match=r"--resume: --learning-rate 0\.5 \(it began with 0\.01\), --seed 7 \(it began with 0\)"):
        start("train.py", "--resume", "--out", interrupted("train.py"), "--seed", 7, "--learning-rate", 0.5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_changes_no_weight_is_taken_on_resume(name, interrupted, start, whole):
    out = interrupted(name)
    resume(start, name, out, "--keep", 1, "--save-every", 5, "--patience", 9, "--device", "cpu")
    state = torch.load(out / "last" / "resume" / "state.pt", weights_only=True)
    taken = state["conditions"]["settings"]["training"]
    assert {key: taken[key] for key in ("keep", "save_every", "patience", "device")} == dict(
        keep=1, save_every=5, patience=9, device="cpu")
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6, 8]
    expected = read_metrics(whole(name, "muon" if name == "train.py" else "adamw") / "metrics.jsonl")
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]


@pytest.mark.parametrize(
    "name, init, refusal",
    [("train.py", True, "training data"), ("train.py", False, "training data|tokenizer"), ("finetune.py", True, "training data")],
)
def test_other_training_data_under_the_same_name_is_refused(name, init, refusal, place, start, tmp_path, monkeypatch):
    """From scratch the tokenizer is learned from the data, and is another one too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "base", "base", symlinks=True)
    for data in ("garden.txt", "dialogues.jsonl"):
        shutil.copy(SAMPLES / data, data)
    flags = flags_of(name)
    if name == "finetune.py":  # held-out data of its own, which stays
        shutil.copy("dialogues.jsonl", "held-out.jsonl")
        flags[flags.index("--val-data") + 1] = "held-out.jsonl"
    elif init:
        flags = ["--data", "garden.txt", "--init", "base", *FLAGS]
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, *MOMENTS["in step 6"])
        start(name, *flags, "--out", "run")
    data = Path(flags[flags.index("--data") + 1])
    data.write_text(data.read_text("utf-8").replace("the", "thy"), "utf-8")  # as long as before
    before = files_in(Path("run"))
    with pytest.raises(InputError, match=refusal):
        start(name, "--resume", "--out", "run")
    assert files_in(Path("run")) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_resuming_a_finished_run_says_so_and_changes_nothing(name, start, whole, tmp_path, capsys):
    optimizer = "muon" if name == "train.py" else "adamw"
    shutil.copytree(whole(name, optimizer), tmp_path / "copy", symlinks=True)
    capsys.readouterr()
    resume(start, name, tmp_path / "copy")
    assert "resumed at step 8: the run is complete; --init goes on" in capsys.readouterr().err
    assert_same_end(whole(name, optimizer), tmp_path / "copy")


def test_steps_that_the_processes_of_now_cannot_share_are_refused(interrupted, start, monkeypatch):
    """A micro-step for each process, as at a start, would be another step, and so another run."""
    out = interrupted("train.py")
    before = files_in(out)
    for count in (3, 4):  # it has two
        monkeypatch.setattr(processes, "world_size", lambda count=count: count)
        monkeypatch.setattr(processes, "from_rank_0", lambda function: function())
        with pytest.raises(InputError, match=f"--accumulate is 2, must be a multiple of {count}"):
            start("train.py", "--resume", "--out", out)
    assert files_in(out) == before


def test_a_state_of_another_version_gets_one_line(interrupted, start):
    def without_conditions(state):
        del state["conditions"]

    for change in (
        lambda state: state["conditions"]["settings"].update(tempo=3),
        lambda state: state["conditions"]["settings"]["training"].update(tempo=3),
        without_conditions,
    ):
        edit_state(out := interrupted("train.py"), change)
        with pytest.raises(InputError, match="version") as refusal:
            start("train.py", "--resume", "--out", out)
        assert "\n" not in str(refusal.value)


def test_the_current_line_is_written_once_however_often_a_run_is_resumed(tokenizer, tmp_path):
    """A line that was cut in the middle by a kill goes, those before it stay."""
    _, expected = run(tiny(tokenizer), RandomExamples([9] * 5), tmp_path, tokenizer, save_every=2)
    roll_back(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 5, "lo')
    step, state = runs.open_run(tmp_path, resume=True, overwrite=False)
    assert step.name == "step-000002"
    _, records = run(checkpoint.load(step)[0], RandomExamples([9] * 5), tmp_path, tokenizer, save_every=2, resume=state)
    assert without_times(records) == without_times(expected)


# ------------------------------------------------------------------ stopped by a signal


SIGNALS = [signal.SIGINT, signal.SIGTERM]
MIDST = {  # where a signal may come
    "in a step": (training, "learning_rate_factor", lambda step, *_: step == 4),
    "in an evaluation": (training, "note_evaluation", lambda progress, _: progress.step == 3),
    "in a save": (runs, "write_sums", lambda folder: folder.name == ".tmp-step-000004"),
    "in the rehearsal": (rehearsal, "check_disk", lambda *_: True),
}


def signalled(monkeypatch, number: int, owner, name: str, when) -> None:
    """The process gets a signal when `name` of `owner` is called with arguments of which `when` is true."""

    def hit(*args, **kwargs) -> bool:
        if when(*args, **kwargs):
            signal.raise_signal(number)
        return False

    killed(monkeypatch, owner, name, hit)


@pytest.mark.parametrize("number, name, optimizer", [(SIGNALS[0], "train.py", "muon"), (SIGNALS[1], "finetune.py", "adamw")])
@pytest.mark.parametrize("midst", MIDST)
def test_a_signal_ends_the_step_that_it_meets_saved_and_resumes_to_the_same_end(
    number, midst, name, optimizer, start, whole, tmp_path, monkeypatch, capfd
):
    out, handlers = tmp_path / "cut", [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as machine, pytest.raises(Stopped) as stop:
        signalled(machine, number, *MIDST[midst])
        start(name, *flags_of(name, "--optimizer", optimizer), "--out", out)
    step = {"in a step": 5, "in an evaluation": 4, "in a save": 5, "in the rehearsal": 1}[midst]
    assert stop.value.number == number and f"step {step} is saved in {out}; --resume" in str(stop.value)
    assert capfd.readouterr().err.count("finishing this step, then saving; once more ends it at once") == 1
    assert checkpoint.followed(out / "last").name == f"step-00000{step}"
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == list(range(1, step + 1))
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    resume(start, name, out, "--keep", 2)
    expected = whole(name, optimizer)
    assert without_times(read_metrics(out / "metrics.jsonl")) == without_times(read_metrics(expected / "metrics.jsonl"))
    assert_equal_states(expected, out)


def test_a_signal_in_the_last_evaluation_loses_nothing(tokenizer, tmp_path, monkeypatch):
    signalled(monkeypatch, signal.SIGINT, training, "note_evaluation", lambda progress, _: progress.step == 4)
    with pytest.raises(Stopped, match="step 4 is saved"):
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    assert "val_loss" in read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert checkpoint.followed(tmp_path / "last").name == "step-000004" and (tmp_path / "best").exists()
    assert (tmp_path / "loss.png").exists()


def test_a_signal_in_a_skipped_step_waits_for_one_that_is_taken(tokenizer, tmp_path, monkeypatch):
    """An fp16 step that overflows changes nothing, so there is nothing to save after it."""
    overflowing(monkeypatch, {1}, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="step 2 is saved"):
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, dtype=torch.float16)
    state = torch.load(tmp_path / "last" / "resume" / "state.pt", weights_only=True)
    assert state["progress"]["examples"] == 3 * 2  # one step taken, one skipped, one taken


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_has_the_effect_that_it_had_before_training(number, tokenizer, tmp_path, monkeypatch):
    """Ctrl-C is KeyboardInterrupt again, SIGTERM ends the process; the checkpoint before is whole."""

    class Ended(BaseException):
        pass

    def end(*_):
        raise Ended

    before = signal.signal(number, end)
    try:
        signalled(monkeypatch, number, runs, "write_sums", lambda folder: folder.name == ".tmp-step-000003")
        signalled(monkeypatch, number, training, "learning_rate_factor", lambda step, *_: step == 2)
        with pytest.raises(Ended):
            run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, save_every=1)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    step, _ = runs.open_run(tmp_path, resume=True, overwrite=False)
    assert step.name == "step-000002" and checkpoint.load(step)


def test_the_handlers_come_back_after_an_error(tokenizer, tmp_path, monkeypatch):
    handlers = [signal.getsignal(n) for n in SIGNALS]
    killed(monkeypatch, training, "learning_rate_factor", lambda step, *_: [signal.getsignal(n) for n in SIGNALS] != handlers)
    with pytest.raises(Killed):  # they were others in training
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_a_signal_of_an_earlier_run_does_not_stop_the_next(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as machine, pytest.raises(Stopped):
        signalled(machine, signal.SIGINT, *MIDST["in the rehearsal"])
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path / "one", tokenizer)
    progress, _ = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path / "two", tokenizer)
    assert progress.step == 4


@pytest.mark.parametrize("name, owner, function", [
    ("train.py", corpus, "_write_shards"), ("train.py", checkpoint, "read_tensors"),
    ("finetune.py", checkpoint, "read_tensors"), ("finetune.py", dialogue, "to_rows"),
])
def test_ctrl_c_before_training_ends_in_one_line(name, owner, function, start, tmp_path, monkeypatch, capsys):
    """While the corpus is made, the weights are read, the rows are cut."""
    flags = flags_of(name) if function == "_write_shards" else [*flags_of(name)[:2], "--init", "base", "--max-steps", "2"]
    flags += ["--val-data", "dialogues.jsonl"] if name == "finetune.py" else []
    signalled(monkeypatch, signal.SIGINT, owner, function, lambda *_, **__: True)
    with pytest.raises(SystemExit) as end:
        runtime.run_as_script(lambda: start(name, *flags, "--out", tmp_path / "new" / "run"))
    assert end.value.code == 130 and capsys.readouterr().err.endswith("\ninterrupted\n")
    assert not (tmp_path / "new" / "run").exists()


@pytest.mark.parametrize("name, optimizer", [("train.py", "muon"), ("finetune.py", "adamw")])
def test_killed_in_the_final_evaluation_everything_is_there(name, optimizer, start, whole, tmp_path, monkeypatch, capsys):
    """And the evaluation comes with --resume."""
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, checkpoint, "load", lambda source: Path(source) == tmp_path / "cut")
        start(name, *flags_of(name, "--optimizer", optimizer), "--out", tmp_path / "cut")
    assert_same_end(whole(name, optimizer), tmp_path / "cut")
    assert "wrote" not in capsys.readouterr().out
    resume(start, name, tmp_path / "cut")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {tmp_path / 'cut'}")


def test_training_in_another_thread_works_and_leaves_the_signals_alone(tokenizer, tmp_path):
    ends = []
    thread = threading.Thread(target=lambda: ends.append(run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)[0].step))
    thread.start()
    thread.join()
    assert ends == [4]


# ------------------------------------------------------------------ real processes


def process(name: str, *flags, cwd: Path, before: str = "", group: bool = False, **env) -> subprocess.Popen:
    """Start a script as a user does; `before`: Python that runs first, in which `script` is the script."""
    command = [str(ROOT / name)]
    if before:
        command = ["-c", f"import os, signal, {name[:-3]} as script\n"
                   "from nanochat import checkpoint, evaluate, runtime, training\n"
                   f"{before}\nruntime.run_as_script(script.main)"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])} | env
    return subprocess.Popen([sys.executable, *command, *map(str, flags)], cwd=cwd, env=environment, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=group)


def signals_itself(numbers: list[int], at: str) -> str:
    """Python: the process sends itself these signals in step 5."""
    return (f"real = {at}\n"
            "def hit(*args):\n"
            "    if hit.calls == 4:\n"
            f"        for number in {[int(n) for n in numbers]}: os.kill(os.getpid(), number)\n"
            "    hit.calls += 1\n"
            "    return real(*args)\n"
            f"hit.calls = 0; {at} = hit\n"
            "runtime.bf16_speedup = lambda: 9.0")


@pytest.mark.parametrize("name, optimizer", [("train.py", "muon"), pytest.param("finetune.py", "adamw", marks=pytest.mark.slow)])
def test_a_process_that_sigkill_ended_resumes_to_the_same_end(name, optimizer, place, start, whole, tmp_path):
    """Two processes, against one run that was never stopped."""
    flags = flags_of(name, "--optimizer", optimizer, "--out", tmp_path / "cut")
    dead = process(name, *flags, cwd=place, before=signals_itself([signal.SIGKILL], "training.learning_rate_factor"))
    dead.communicate(timeout=200)
    assert dead.returncode == -signal.SIGKILL
    assert checkpoint.followed(tmp_path / "cut" / "last").name == "step-000004"
    resumed = process(name, "--resume", "--out", tmp_path / "cut", cwd=place)
    _, shown = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, shown
    assert_same_end(whole(name, optimizer), tmp_path / "cut")
    assert (tmp_path / "cut" / "loss.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, code, name, optimizer", [
    (signal.SIGINT, 130, "train.py", "muon"), (signal.SIGTERM, 143, "finetune.py", "adamw")])
def test_a_process_that_is_signalled_ends_in_one_line_and_its_code(number, code, name, optimizer, place, start, whole, tmp_path):
    flags = flags_of(name, "--optimizer", optimizer, "--out", tmp_path / "cut")
    stopped = process(name, *flags, cwd=place, before=signals_itself([number], "training.learning_rate_factor"))
    _, shown = stopped.communicate(timeout=200)
    assert stopped.returncode == code and "Traceback" not in shown, shown
    assert shown.split("\n")[-2] == f"stopped: step 5 is saved in {tmp_path / 'cut'}; --resume goes on from it"
    resume(start, name, tmp_path / "cut")
    assert without_times(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == without_times(
        read_metrics(whole(name, optimizer) / "metrics.jsonl"))
    assert_equal_states(whole(name, optimizer), tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiled_run_resumes_to_the_same_end(name, place, tmp_path):
    """With rows of other lengths, and so other kernels, before and after the kill."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*flags_of(name)[: -len(FLAGS)], *"--max-steps 5 --batch-size 1 --dropout 0.1 --warmup-steps 2 --save-every 2".split(),
             *"--eval-every 5 --keep 9 --compile yes --out".split()]
    whole = process(name, *flags, tmp_path / "whole", cwd=place, **cache)
    _, shown = whole.communicate(timeout=400)
    assert whole.returncode == 0 and "threads, compiled" in shown, shown
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    roll_back(tmp_path / "cut", 2)
    resumed = process(name, "--resume", "--out", tmp_path / "cut", cwd=place, **cache)
    _, shown = resumed.communicate(timeout=400)
    assert resumed.returncode == 0 and "threads, compiled" in shown, shown
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("numbers, code", [
    ([signal.SIGINT, signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], -15), ([signal.SIGINT, signal.SIGTERM], -15)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_second_signal_ends_a_process_at_once(name, numbers, code, place, tmp_path):
    flags = flags_of(name, "--out", tmp_path / "cut")
    ended = process(name, *flags, cwd=place, before=signals_itself(numbers, "training.learning_rate_factor"))
    _, shown = ended.communicate(timeout=200)
    assert ended.returncode == code and "Traceback" not in shown, shown
    assert checkpoint.followed(tmp_path / "cut" / "last").name == "step-000004"
    checkpoint.load(tmp_path / "cut")


def wait_until(there, running: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while not there():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_at_a_terminal_stops_a_run_saved(name, place, tmp_path):
    """From outside, to the whole process group, as a terminal sends it."""
    log = tmp_path / "cut" / "metrics.jsonl"
    flags = flags_of(name, "--max-steps", 10**6, "--save-every", 10**6, "--eval-every", 10**6, "--out", log.parent)
    running = process(name, *flags, cwd=place, group=True)
    wait_until(lambda: len(read_metrics(log)) > 3, running)
    os.killpg(running.pid, signal.SIGINT)
    _, shown = running.communicate(timeout=200)
    assert running.returncode == 130 and "Traceback" not in shown, shown
    step = read_metrics(log)[-1]["step"]
    assert shown.split("\n")[-2] == f"stopped: step {step} is saved in {log.parent}; --resume goes on from it"
    assert runs.step_of(checkpoint.followed(log.parent / "last")) == step


@pytest.mark.slow
def test_ctrl_c_while_workers_clean_articles_ends_in_one_line(tmp_path):
    """The group gets the signal, the workers too: none of them may speak."""
    page = "<page><title>{}</title><ns>0</ns><revision><text>{}</text></revision></page>".format
    long = "'''Lake''' is [[water|wet]].{{cite}}\n" * 1000
    with open(tmp_path / "dump.xml", "w", encoding="utf-8") as file:
        file.write('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">')
        file.writelines(page(f"Alone {i}", "Short.") for i in range(sources.ALONE))
        file.writelines(page(f"Worker {i}", long) for i in range(2000))  # a minute's work for two
        file.write("</mediawiki>")
    running = process("train.py", "--data", "dump.xml", "--out", "run", cwd=tmp_path, group=True, before="os.cpu_count = lambda: 2")
    wait_until(lambda: any("Worker" in path.read_text(encoding="utf-8") for path in (tmp_path / "corpus").glob("*/train.jsonl*")), running)
    os.killpg(running.pid, signal.SIGINT)
    _, shown = running.communicate(timeout=200)
    assert running.returncode == 130 and "Traceback" not in shown, shown
    assert shown.endswith("\ninterrupted\n") and not (tmp_path / "run").exists(), shown


# ------------------------------------------------------------------ held-out data, pipelines


def test_other_held_out_data_is_refused_since_best_and_patience_compare_its_losses(tokenizer, tmp_path):
    data = RandomExamples([9] * 5)
    settings = dict(out=tmp_path, settings={}, device=torch.device("cpu"), dtype=torch.float32,
                    evaluate=lambda: {"val_loss": 1.0}, sample=lambda: {})
    config = TrainConfig(batch_size=2, max_steps=4, save_every=2)
    training.train(tiny(tokenizer), tokenizer, data, config, held_out="one text", **settings)
    step, state = runs.open_run(tmp_path, resume=True, overwrite=False)
    with pytest.raises(InputError, match="held-out data, is not what the run began with"):
        training.train(checkpoint.load(step)[0], tokenizer, data, config, held_out="another", resume=state, **settings)
    training.train(checkpoint.load(step)[0], tokenizer, data, config, held_out="one text", resume=state, **settings)


def test_a_text_that_changes_gets_a_corpus_of_its_own(start, tmp_path, monkeypatch):
    """A run that still reads the corpus of the text as it was is not disturbed."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    for number in range(2):
        text.write_text(f"The river runs past mill number {number}, and the boats go by.\n" * 200)
        start("train.py", *flags_of("train.py", "--max-steps", 2, "--out", f"out/{number}", "--data", text))
    assert len(list((tmp_path / "out" / "corpus").glob("text-*/corpus.json"))) == 2


def test_a_corpus_that_was_prepared_beforehand_is_trained_on(start, tmp_path, monkeypatch, capsys):
    """As the README has it: python -m nanochat.corpus TEXT FOLDER, then train.py --data FOLDER; and resumed."""
    monkeypatch.chdir(tmp_path)
    shards = corpus.prepare(SAMPLES / "garden.txt", tmp_path / "shards", vocab_size=384)
    flags = flags_of("train.py", "--max-steps", 4, "--save-every", 2, "--data", shards)
    start("train.py", *flags, "--out", "out/prepared")
    assert not list((tmp_path / "out").glob("corpus*"))
    assert "--vocab-size is of no use" not in capsys.readouterr().err
    start("train.py", *flags, "--data", f"{shards}/", "--vocab-size", 512, "--out", "out/other")
    assert "has a tokenizer of its own, of 384 ids: --vocab-size is of no use" in capsys.readouterr().err
    losses = [record["loss"] for record in read_metrics(tmp_path / "out/prepared/metrics.jsonl")]
    start("train.py", *flags, "--data", SAMPLES / "garden.txt", "--out", "out/whole")
    assert losses == [record["loss"] for record in read_metrics(tmp_path / "out/whole/metrics.jsonl")]
    shutil.rmtree(tmp_path / "out/prepared/step-000004")
    start("train.py", "--resume", "--out", "out/prepared")
    assert losses == [record["loss"] for record in read_metrics(tmp_path / "out/prepared/metrics.jsonl")]


def test_of_much_held_out_text_only_the_first_tokens_are_scored_at_the_end(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SCRIPTS["train.py"], "FINAL_TOKENS", 20)
    start("train.py", *flags_of("train.py", "--max-steps", 2), "--out", tmp_path / "out")
    assert "held-out text, its first 20 tokens, fp32, best checkpoint: " in capsys.readouterr().out


def test_a_signal_with_a_dead_standard_error_still_saves(tokenizer, tmp_path, monkeypatch):
    """As in `train.py 2>&1 | tee log` when Ctrl-C reaches tee first."""
    def broken(*_):
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", broken)

    class Signalled(RandomExamples):
        def batch(self, indices):
            if runs.saved_steps(tmp_path) and not runtime.signal_received():
                signal.raise_signal(signal.SIGINT)
            return super().batch(indices)

    with pytest.raises(runtime.Stopped):
        training.train(tiny(tokenizer), tokenizer, Signalled([9] * 5), TrainConfig(batch_size=2, max_steps=9, save_every=2),
                       out=tmp_path, settings={}, device=torch.device("cpu"), dtype=torch.float32,
                       evaluate=lambda: {"val_loss": 1.0}, sample=lambda: {})
    assert [step.name for step in runs.saved_steps(tmp_path)] == ["step-000002", "step-000003"]
