"""What a run survives: kills at any moment, full and read-only disks, 200 kinds of damage to its files."""

import contextlib
import ctypes
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanochat import InputError, checkpoint, runs, training
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.resume import Progress, restore, snapshot
from nanochat.tokenizer import Tokenizer
from nanochat.training import TrainConfig

ROOT = Path(__file__).parent.parent
SEED = int(os.environ.get("SEED", "0"))
KEEP = 2
slow = pytest.mark.slow
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, signals and mounts")


# ------------------------------------------------------------------ a run whose content is a function of its step


def model_of(step: int) -> GPT:
    """The weights that `step` holds: 60 KB, another draw for each step."""
    generator = torch.Generator().manual_seed(step)
    model = GPT(GPTConfig(vocab_size=384, block_size=24, n_layer=1, n_head=2, n_embd=24))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return model


def state_of(step: int, best_loss: float) -> dict:
    """The state that `step` holds, as large as its weights."""
    return {"progress": {"step": step, "best_loss": best_loss}, "optimizer": torch.full((20_000,), float(step))}


def loss_of(step: int) -> float:
    """Falls with ups and downs, so that the best is at times the last and at times much older."""
    return 100 / (step + 10) + step * 37 % 17


def holds(model: GPT, step: int) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), model_of(step).parameters(), strict=True))


def work(out: Path, tokenizer: Tokenizer, say=lambda word, step: None, steps: int = 10**9) -> None:
    """Save, evaluate and log step after step, and resume, in the order in which train() does; say what is done."""
    resuming = out.exists() and runs.saved_steps(out)
    folder, state = runs.open_run(out, resume=bool(resuming), overwrite=not resuming)
    if not resuming:
        runs.clear(out)
    step, best_loss = (runs.step_of(folder), state["progress"]["best_loss"]) if state else (0, math.inf)
    log = MetricsLog(out / "metrics.jsonl", before=step)

    def evaluate() -> float:
        runs.add_results(out, step, {"val_loss": loss_of(step)}, best=loss_of(step) < best_loss)
        log.write(step=step, val_loss=loss_of(step))
        say("evaluated", step)
        return min(best_loss, loss_of(step))

    if state:
        best_loss = evaluate()  # a checkpoint is saved before its evaluation
    for _ in range(steps):
        step += 1
        save(out, step, tokenizer, best_loss)
        say("saved", step)
        best_loss = evaluate()


def save(out: Path, step: int, tokenizer: Tokenizer, best_loss: float = loss_of(1)) -> None:
    runs.save(out, step, model_of(step), tokenizer, settings={}, results={}, resume=state_of(step, best_loss), keep=KEEP)


def newest_step(out: Path) -> int:
    """The last step that is saved, 0 if none is."""
    return max(map(runs.step_of, runs.saved_steps(out)), default=0)


def litter(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob(".tmp-*")]


def check_sound(out: Path, saved: int, evaluated: int) -> int:
    """All that must hold in a run folder whose writer was killed after these steps; → the step to go on from."""
    folder, state = runs.open_run(out, resume=True, overwrite=False)
    step = runs.step_of(folder)
    assert step in (saved, saved + 1)  # what was reported as saved is there
    wanted = state_of(step, state["progress"]["best_loss"])
    assert state["progress"] == wanted["progress"] and torch.equal(state["optimizer"], wanted["optimizer"])
    assert not litter(out) and not list(out.glob("damaged-*"))
    assert checkpoint.locate(out, prefer=("last",)) == folder
    best = checkpoint.locate(out)
    if evaluated:
        bests = {min(range(1, last + 1), key=loss_of) for last in (evaluated, evaluated + 1)}
        assert runs.step_of(best) in bests and os.path.lexists(out / "best")
    steps = runs.saved_steps(out)
    assert {folder, best} <= set(steps) and len(steps) <= KEEP + 2
    for source in (out, *steps):
        checkpoint.verify(checkpoint.locate(source), resume=True)
        model, _ = checkpoint.load(source)
        assert holds(model, runs.step_of(checkpoint.locate(source)))
    for place in steps:
        results = json.loads((place / "nanochat.json").read_text(encoding="utf-8"))["results"]
        number = runs.step_of(place)
        assert results == {"val_loss": loss_of(number)} or (number > evaluated and results == {})
    records = [record["step"] for record in read_metrics(out / "metrics.jsonl")] if (out / "metrics.jsonl").exists() else []
    assert records == list(range(1, len(records) + 1)) and len(records) in (step - 1, step)
    return step


# ------------------------------------------------------------------ kills


def phase_of(out: Path) -> str:
    """Where a kill has struck, by what it left."""
    found, steps = litter(out), [runs.step_of(path) for path in runs.saved_steps(out)]
    newest = max(steps, default=0)
    last = os.readlink(out / "last") if (out / "last").is_symlink() else ""
    for name in found:
        if name in (".tmp-last", ".tmp-best", ".tmp-nanochat.json"):
            return f"writing {name}"
        if name.startswith(".tmp-old-"):
            return "replacing a step"
        if name.startswith(".tmp-step-"):
            return "writing a step" if int(name[-6:]) >= newest else "deleting an old step"
        if name == ".tmp-metrics.jsonl":
            return "writing metrics.jsonl"
    if newest and last != f"step-{newest:06d}":
        return "before pointing at the new step"
    if newest and len(steps) > KEEP + (runs.step_of(checkpoint.locate(out)) < newest - 1):
        return "before deleting an old step"
    if newest and "val_loss" not in (out / last / "nanochat.json").read_text(encoding="utf-8"):
        return "before the results"
    return "between steps"


class Writer:
    """A process that runs `task` until it is killed or ends; what it says comes back through a pipe."""

    def __init__(self, task):
        here, there = os.pipe()
        self.pid = os.fork()  # torch is imported, so that a process costs milliseconds
        if self.pid == 0:
            try:
                os.close(here)
                task(lambda word, step: os.write(there, f"{word} {step}\n".encode()))
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(1)
        os.close(there)
        self.said = os.fdopen(here)

    def end(self) -> tuple[int, dict[str, int]]:
        """→ (exit code, or minus the signal that killed it; the last step of each word it said)."""
        _, status = os.waitpid(self.pid, 0)
        with self.said:
            said = {word: int(step) for word, step in map(str.split, self.said.read().splitlines())}
        return os.waitstatus_to_exitcode(status), said


@slow
@posix
def test_20_kills_at_random_moments_leave_whole_checkpoints_to_go_on_from(tokenizer, tmp_path):
    out, chance, phases = tmp_path / "out", random.Random(SEED), Counter()
    done = {"saved": 0, "evaluated": 0}
    for number in range(20):
        writer = Writer(lambda say: work(out, tokenizer, say))
        while number % 2 == 0 and newest_step(out) <= done["saved"]:
            time.sleep(0.001)  # every other one at least saves a step, on a slow machine too
        time.sleep(chance.uniform(0.02, 0.3))
        os.kill(writer.pid, signal.SIGKILL)
        code, said = writer.end()
        assert code == -signal.SIGKILL  # it had not stopped by itself
        done |= said
        phases[phase_of(out)] += 1
        step = check_sound(out, **done)
        done["saved"] = step
    print(f"seed {SEED}: 20 kills, up to step {done['saved']}: {dict(phases)}")
    assert done["saved"] >= 10 and sum(phases.values()) - phases["between steps"] >= 5 and phases["writing a step"] >= 2


@slow
@posix
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_a_kill_before_each_file_operation_leaves_a_whole_checkpoint(again, tokenizer, tmp_path):
    """Python tells an audit hook of each file that it opens, renames or deletes; here the process dies of the n-th."""
    ready, phases, count = tmp_path / "ready", Counter(), 0
    work(ready, tokenizer, steps=5)
    step = 5 if again else 6
    assert min(range(1, 6), key=loss_of) == 1 and loss_of(6) < loss_of(1)

    def task(out: Path, deadly: int, say):
        events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
        happened = 0

        def hook(event: str, details: tuple):
            nonlocal happened
            if event in events and out.name in str(details[0]) + str(details[-1]):
                happened += 1
                if happened == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(out, step, tokenizer, best_loss=loss_of(1))
        say("saved", step)
        runs.add_results(out, step, {"val_loss": loss_of(step)}, best=step == 6)
        with open(out / "metrics.jsonl", "r+", encoding="utf-8") as log:
            print(*(json.dumps({"step": number}) for number in range(1, step + 1)), sep="\n", file=log)
        say("evaluated", step)

    while True:
        count += 1
        out = tmp_path / f"killed-{count}"
        shutil.copytree(ready, out, symlinks=True)
        code, said = Writer(lambda say, out=out, count=count: task(out, count, say)).end()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        phases[phase_of(out)] += 1
        check_sound(out, **{"saved": 5, "evaluated": step - 1} | said)
        shutil.rmtree(out)
    print(f"{count - 1} kills: {dict(phases)}")
    expected = {"writing a step", "before the results", "writing .tmp-nanochat.json"}
    expected |= {"replacing a step"} if again else {"before pointing at the new step", "writing .tmp-last", "writing .tmp-best",
                                                    "before deleting an old step", "deleting an old step"}
    assert count > 30 and expected <= set(phases)


FLAGS = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--vocab-size", "384", "--block-size", "64", "--batch-size", "2",
         "--dropout", "0.1", "--dtype", "float32", "--data", str(ROOT / "data" / "samples" / "garden.txt")]


def start(*flags, cwd: Path, script: tuple = (ROOT / "train.py",), **options) -> subprocess.Popen:
    """train.py as a user starts it."""
    return subprocess.Popen([sys.executable, *map(str, (*script, *flags))], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def ended(process: subprocess.Popen, expected: int = 0) -> str:
    """What it said on stderr, once it has ended as expected."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == expected, said
    return said


def error_line(process: subprocess.Popen) -> str:
    """The one line of an error: exit code 2, no traceback, no complaint while the interpreter ends."""
    said = ended(process, expected=2)
    assert "Traceback" not in said and "Exception ignored" not in said and "terminate called" not in said, said
    assert said.count("error: ") == 1
    return re.search("error: .*", said).group()


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


# After so many steps it is to die in so many seconds: of a timer, which is late on no machine, and runs no handler.
DYING = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train as script
from nanochat import runtime, training
seconds, steps = float(sys.argv.pop()), int(sys.argv.pop())
real = training.learning_rate_factor
def hit(step, *rest):
    if step == steps:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    return real(step, *rest)
training.learning_rate_factor = hit
runtime.run_as_script(script.main)
"""


@slow
@posix
def test_train_killed_three_times_ends_where_the_uninterrupted_run_does(tmp_path):
    steps = 120  # more than three times 12, and what a fast machine may add in 3 times 20 ms
    flags = [*FLAGS, "--max-steps", str(steps), "--save-every", "1", "--eval-every", "9"]
    ended(start(*flags, "--out", "whole", cwd=tmp_path))
    chance, cut, killed_at = random.Random(SEED), tmp_path / "cut", []
    for flags_now in (flags, ["--resume"], ["--resume"]):
        at, seconds = newest_step(cut) + chance.randint(3, 12), chance.uniform(0.0001, 0.02)  # anywhere within a step
        ended(start(*flags_now, "--out", "cut", at, seconds, cwd=tmp_path, script=("-c", DYING)), -signal.SIGALRM)
        killed_at.append(newest_step(cut))
        assert killed_at[-1] >= at
    print(f"seed {SEED}: killed after steps {killed_at}")
    ended(start("--resume", "--out", "cut", cwd=tmp_path))

    logs, states = [], []
    for out in (tmp_path / "whole", cut):
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        logs.append([{key: value for key, value in record.items() if "second" not in key and key not in ("mfu", "peak_memory_mb")} for record in records])
        states.append(torch.load(out / "last" / "resume" / "state.pt", weights_only=True))
    assert logs[0] == logs[1] and [record["step"] for record in logs[0]] == list(range(1, steps + 1))
    assert [record["step"] for record in logs[0] if "val_loss" in record] == [*range(9, steps, 9), steps]
    assert same(*({key: state[key] for key in ("optimizer", "rng", "scaler")} for state in states))
    for name in ("best", "last"):
        assert os.readlink(tmp_path / "whole" / name) == os.readlink(cut / name)
        one, other = (checkpoint.load(out / name)[0].state_dict() for out in (tmp_path / "whole", cut))
        assert same(one, other)
    assert not litter(cut) and sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def same(one, other) -> bool:
    """Equal, bit by bit: numbers, texts, tensors, and lists and dicts of these."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# ------------------------------------------------------------------ full disks


@pytest.fixture
def disk(tmp_path):
    """disk(options) → a folder that is a small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"may not mount a small disk here ({made.stderr.strip()}); `unshare -rm pytest -m slow` may")
        return folder

    if not shutil.which("mount"):
        pytest.skip("no mount command")
    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


PAGE = 4096  # what a tmpfs counts in


def fill(disk: Path, pages_left: int) -> None:
    """Occupy the disk but for a few pages, with one file."""
    with open(disk / "ballast", "wb") as file:
        free = os.statvfs(disk).f_bavail
        if free > pages_left:
            os.posix_fallocate(file.fileno(), 0, (free - pages_left) * PAGE)


def keep_full(disk: Path, process: subprocess.Popen, pages_left: int) -> None:
    """Take every page that becomes free but for a few, until the process ends."""
    with open(disk / "ballast", "wb") as file:
        while process.poll() is None:
            if (free := os.statvfs(disk).f_bavail) > pages_left:
                size = os.fstat(file.fileno()).st_size + (free - pages_left) * PAGE
                with contextlib.suppress(OSError):  # the process was faster: count again
                    os.posix_fallocate(file.fileno(), 0, size)
            time.sleep(0.001)


def one_line(action) -> str:
    with pytest.raises((InputError, OSError)) as info:
        action()
    assert "\n" not in str(info.value) and "No space left on device" in str(info.value)
    return str(info.value)


@slow
@posix
def test_a_disk_that_fills_up_in_any_file_of_a_save_costs_only_that_save(tokenizer, tmp_path, disk):
    """With 0, 1, 2, … pages left the disk is full in the config, the weights, …, the last file."""
    out = disk("size=8m") / "out"
    work(out, tokenizer, steps=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    pages, messages = 0, set()
    while True:
        fill(out.parent, pages)
        try:
            save(out, 4, tokenizer)
            break
        except InputError as error:
            messages.add(str(error))
        assert not litter(out) and before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        if pages % 10 == 0:
            assert check_sound(out, saved=3, evaluated=3) == 3
        pages += 1
    print(f"full with 0 to {pages - 1} pages left: {messages}")
    sizes = {path.name: math.ceil(path.stat().st_size / PAGE) for path in (out / "step-000004").rglob("*") if path.is_file()}
    assert pages == sum(sizes.values()) and len(sizes) == 8  # so each of the 8 files was the one that did not fit
    assert messages == {f"step 4 cannot be saved in {out} ([Errno 28] No space left on device); earlier ones are whole",
                        f"step 4 cannot be saved in {out} (Error while serializing: I/O error: No space left on device (os error 28)); "
                        "earlier ones are whole"}
    (out.parent / "ballast").unlink()
    assert check_sound(out, saved=4, evaluated=3) == 4
    work(out, tokenizer, steps=3)
    assert check_sound(out, saved=7, evaluated=7) == 7


@slow
@posix
def test_a_disk_without_room_for_another_name_costs_only_that_save(tokenizer, tmp_path, disk):
    """The same with 0, 1, 2, … files left, which also strikes the folders and the pointers."""
    out = disk("size=64m,nr_inodes=200") / "out"
    work(out, tokenizer, steps=3)
    spare, files = out.parent / "spare", 0
    spare.mkdir()
    before, messages = sorted(out.rglob("*")), Counter()
    while True:
        for path in spare.iterdir():
            path.unlink()
        for number in range(os.statvfs(out).f_favail - files):
            (spare / str(number)).touch()
        try:
            save(out, 4, tokenizer)
            break
        except (InputError, OSError) as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
            messages[type(error).__name__] += 1
        assert not litter(out)
        if (out / "step-000004").exists():
            assert files == 10  # all of the step fitted, the new `last` did not
            assert checkpoint.locate(out, prefer=("last",)) == out / "step-000003"
            shutil.rmtree(spare)
            assert check_sound(out, saved=4, evaluated=3) == 4
            shutil.rmtree(out / "step-000004")
            runs.point(out / "last", out / "step-000003")
            spare.mkdir()
        assert sorted(out.rglob("*")) == before
        files += 1
    assert files == 11 and messages == {"InputError": 10, "OSError": 1}
    shutil.rmtree(spare)
    assert check_sound(out, saved=4, evaluated=3) == 4


@slow
@posix
def test_a_disk_that_is_full_costs_no_results_and_no_metrics(tokenizer, tmp_path, disk):
    out = disk("size=8m") / "out"
    work(out, tokenizer, steps=3)
    log = MetricsLog(out / "metrics.jsonl", before=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    fill(out.parent, 0)
    message = one_line(lambda: runs.add_results(out, 3, {"val_loss": loss_of(3)}, best=True))
    assert message == (f"the results of step 3 cannot be saved in {out / 'step-000003'} "
                       "([Errno 28] No space left on device); its weights are")
    one_line(lambda: MetricsLog(out / "metrics.jsonl", before=3))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name[0] != "."} == before

    def write_much():
        for step in range(3, 200):
            log.write(step=step, val_loss=loss_of(step))

    one_line(write_much)
    whole = read_metrics(out / "metrics.jsonl")
    assert whole[:2] == [{"step": 1, "val_loss": loss_of(1)}, {"step": 2, "val_loss": loss_of(2)}] and len(whole) < 199
    with contextlib.suppress(OSError):
        log.file.close()
    (out.parent / "ballast").unlink()
    runs.open_run(out, resume=True, overwrite=False)
    MetricsLog(out / "metrics.jsonl", before=3).file.close()
    assert check_sound(out, saved=3, evaluated=3) == 3
    work(out, tokenizer, steps=3)
    assert check_sound(out, saved=6, evaluated=6) == 6


@slow
@posix
def test_the_converter_on_a_full_disk_ends_in_one_line_and_leaves_no_folder(tokenizer, tmp_path, disk, monkeypatch):
    runs.save(tmp_path / "out", 1, model_of(1), tokenizer, settings={}, results={})
    new = disk("size=1m") / "new"
    monkeypatch.setattr(sys, "argv", ["checkpoint", str(tmp_path / "out"), str(new)])
    for pages in range(0, 20, 3):
        fill(new.parent, pages)
        assert one_line(checkpoint.main).startswith(f"{new} cannot be written (")
        assert [path.name for path in new.parent.iterdir()] == ["ballast"]
    (new.parent / "ballast").unlink()
    checkpoint.main()
    assert holds(checkpoint.load(new)[0], 1)


@slow
@posix
def test_train_says_beforehand_that_a_disk_is_too_small(tmp_path, disk):
    out = disk("size=8m")
    line = error_line(start(*FLAGS, "--max-steps", 5, "--out", out, cwd=tmp_path))
    print(line)
    assert line.startswith(f"error: --out {out}: 4 checkpoints (--keep, the best, the one being written) of 4 MB need 0.02 GB; 0.01 GB")
    assert list(out.iterdir()) == []


@slow
@posix
def test_train_on_a_disk_that_fills_up_ends_in_one_line_and_goes_on_when_there_is_room(tmp_path, disk):
    """First in a checkpoint, while each step is saved; then in metrics.jsonl, while no step is to be saved for long."""
    out = disk("size=40m")
    flags, last = [*FLAGS, "--max-steps", 600, "--eval-every", 600], 0
    for save_every in (1, 600):
        process = start(*flags, "--save-every", save_every, "--out", out, cwd=tmp_path)
        wait_for(lambda last=last: logged(out) >= last + 3, process)
        keep_full(out, process, pages_left=int(save_every == 1))  # one page: enough for the log, and not for a checkpoint
        line = error_line(process)
        print(line)
        assert "No space left on device" in line and ("cannot be saved" in line) == (save_every == 1)
        assert (newest_step(out) > last) == (save_every == 1)
        last, flags = newest_step(out), ["--resume"]
        checkpoint.verify(out / f"step-{last:06d}", resume=True)
        checkpoint.load(out)
        assert not [name for name in litter(out) if "metrics" not in name]
        (out / "ballast").unlink()
    assert f"resumed at step {last}" in ended(start("--resume", "--save-every", 600, "--out", out, cwd=tmp_path))
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == list(range(1, 601))
    assert not litter(out) and checkpoint.locate(out).name == "step-000600"


def logged(out: Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none."""
    return max((record["step"] for record in read_metrics(out / "metrics.jsonl")), default=0)


# ------------------------------------------------------------------ read-only


@slow
@posix
def test_a_read_only_disk_gives_one_line_and_changes_nothing(tokenizer, tmp_path, disk):
    out = disk("size=8m") / "out"
    work(out, tokenizer, steps=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
    for action in (
        lambda: save(out, 4, tokenizer),
        lambda: runs.add_results(out, 3, {"val_loss": 1.0}, best=True),
        lambda: runs.open_run(out, resume=True, overwrite=False),
        lambda: runs.clear(out),
        lambda: MetricsLog(out / "metrics.jsonl", before=3),
    ):
        with pytest.raises((InputError, OSError), match="Read-only file system") as info:
            action()
        print(info.value)
        assert "\n" not in str(info.value)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} and not litter(out)
    assert holds(checkpoint.load(out)[0], runs.step_of(checkpoint.locate(out)))  # reading needs no more


def obey_modes() -> None:
    """Take from a child that runs as root the right to write where modes forbid it (CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP
        os._exit(99)


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_train_in_a_read_only_folder_ends_in_one_line(tmp_path):
    ended(start(*FLAGS, "--max-steps", 3, "--out", "runs/out", cwd=tmp_path))
    out = tmp_path / "runs" / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for folder in (out, tmp_path / "runs"):
        folder.chmod(0o555)
    try:
        for flags in (["--resume"], [*FLAGS, "--max-steps", 3, "--overwrite"]):
            line = error_line(start(*flags, "--out", out, cwd=tmp_path, preexec_fn=obey_modes))
            print(line)
            assert "Permission denied" in line and str(out) in line
        line = error_line(start(*FLAGS, "--max-steps", 3, "--out", "runs/new", cwd=tmp_path, preexec_fn=obey_modes))
        print(line)
        assert line == "error: runs/new: Permission denied"
    finally:
        for folder in (tmp_path / "runs", out):
            folder.chmod(0o755)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} and not litter(tmp_path)


# ------------------------------------------------------------------ damage


@dataclass
class Run:
    """A sound run folder and what its steps hold."""

    out: Path
    tokenizer: Tokenizer
    config: GPTConfig
    weights: dict[int, dict]
    states: dict[int, dict]


def trained(out: Path, tokenizer: Tokenizer, n_embd: int, seed: int) -> Run:
    """A run of two checkpoints, at steps 2 (the best) and 4, with the real state of a real optimizer."""
    torch.manual_seed(seed)
    run = Run(out, tokenizer, GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=n_embd), {}, {})
    model, progress = GPT(run.config), Progress(max_steps=10, best_loss=3.0)
    optimizer, scaler = training.build_optimizer(model, TrainConfig(optimizer="muon")), torch.amp.GradScaler("cpu", enabled=False)
    for step in (1, 2, 3, 4):
        model(*torch.randint(tokenizer.vocab_size, (2, 2, 16))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step
        if step % 2 == 0:
            run.states[step] = snapshot(progress, {"step": step, "loss": 4.0}, model, optimizer, scaler) | {"conditions": {}}
            runs.save(out, step, model, tokenizer, settings={}, results={"loss": 4.0}, resume=run.states[step])
            runs.add_results(out, step, {"val_loss": 3.0}, best=step == 2)
            run.weights[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
            run.states[step] = torch.load(out / f"step-{step:06d}" / "resume" / "state.pt", weights_only=True)
    assert not same(run.weights[2], run.weights[4]) and not same(run.states[2], run.states[4])
    return run


@pytest.fixture(scope="module")
def two_runs(tokenizer, tmp_path_factory) -> tuple[Run, Run]:
    """A run, and another of other sizes."""
    folder = tmp_path_factory.mktemp("runs")
    return trained(folder / "run", tokenizer, 16, seed=1), trained(folder / "other", tokenizer, 24, seed=2)


KINDS = ["flipped", "flipped", "flipped", "header", "cut", "missing", "other step's", "other run's", "mixed up", "emptied",
         "folder", "dangling", "pointer"]
BLIND = {"flipped", "header", "other step's"}  # what cannot be told without sums, or not always


def do_damage(chance: random.Random, out: Path, other: Path, sums: bool) -> str:
    """Damage a run in one random way; → what was done."""
    kind = chance.choice([kind for kind in KINDS if sums or kind not in BLIND])
    step = out / chance.choice(["step-000002", "step-000004", "step-000004"])
    files = sorted(path for path in step.rglob("*") if path.is_file())
    path = chance.choice(files)
    if kind == "header":
        path = step / "model.safetensors"
    data = bytearray(path.read_bytes())
    if kind in ("flipped", "header"):
        end = int.from_bytes(data[:8], "little") + 8 if kind == "header" else len(data)
        places = [chance.randrange(end) for _ in range(chance.randint(1, 16))]
        for place in places:
            data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        kind += f" {len(places)} bits in"
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "dangling":
        path.unlink()
        path.symlink_to("nowhere")
    elif kind == "other step's":
        there = out / ("step-000004" if step.name == "step-000002" else "step-000002") / path.relative_to(step)
        path.write_bytes(there.read_bytes())
        there.write_bytes(data)
    elif kind == "other run's":
        if not sums:  # what is as well formed as the right one cannot be told, such as a state of the same step
            path = step / chance.choice(["model.safetensors", "config.json"])
        path.write_bytes((other / path.relative_to(out)).read_bytes())
    elif kind == "mixed up":
        there = chance.choice([file for file in files if file != path])
        path.write_bytes(there.read_bytes())
        there.write_bytes(data)
        kind += f" with {there.name}:"
    elif kind == "pointer":
        path = out / chance.choice(["best", "last"])
        path.unlink()
        content = chance.choice(["", "garbage", "step-000009", "step-000002", "/etc", "step-000004/resume", "\x00\xff\n", "best"])
        if chance.random() < 0.5:
            path.write_text(content, encoding="utf-8")
        else:
            path.symlink_to(content.replace("\x00", "") or "nowhere")
        kind += f" {content!r} as"
    return f"{kind} {path.relative_to(out)}"


def judged(run: Run, out: Path, sums: bool = True) -> str:
    """What loading and resuming make of a damaged copy; an assertion fails for any but one line or the right content."""

    def attempt(action):
        try:
            return action()
        except (InputError, OSError) as error:
            assert str(error) and "\n" not in str(error)
            return None

    def loaded(source: Path) -> bool:
        """Whether it was loaded, which it may only be right."""
        result = attempt(lambda: checkpoint.load(source))
        if result is None:
            return False
        model, tokenizer = result
        step = runs.step_of(checkpoint.locate(source).resolve())
        assert same(dict(model.named_parameters()), run.weights[step]) and model.config == run.config
        assert tokenizer.hash == run.tokenizer.hash and (not sums or tokenizer.chat_template == run.tokenizer.chat_template)
        return True

    every = [loaded(source) for source in (out, out / "step-000002", out / "step-000004")]
    names = sorted(path.name for path in out.iterdir())
    resumed = attempt(lambda: runs.open_run(out, resume=True, overwrite=False))
    if resumed is None:
        assert sorted(path.name for path in out.iterdir()) == names  # all is left as it was
        return "refused"
    folder, state = resumed
    step = runs.step_of(folder)
    expected = run.states[step]
    forgotten = not os.path.lexists(out / "best")
    assert state["progress"]["best_loss"] == (math.inf if forgotten else 3.0)
    assert same(state | {"progress": expected["progress"]}, expected)
    assert state["progress"] | {"best_loss": 3.0} == expected["progress"]
    assert checkpoint.locate(out, prefer=("last",)) == folder and not litter(out)
    if not sums and not (loaded(folder) and loaded(out)):
        return "refused"  # without sums only reading the weights tells
    assert loaded(folder) and loaded(out / "last") and (forgotten or loaded(out / "best"))
    model, _ = checkpoint.load(folder)
    optimizer, scaler = training.build_optimizer(model, TrainConfig(optimizer="muon")), torch.amp.GradScaler("cpu", enabled=False)
    progress, record = restore(state, model, optimizer, scaler)
    assert (progress.step, record) == (step, {"step": step, "loss": 4.0})
    assert same(snapshot(progress, record, model, optimizer, scaler)["optimizer"], expected["optimizer"])
    if step == 2:
        return "fell back"
    return "harmless" if all(every) and not forgotten else "refused"


def judge_many(two_runs, tmp_path: Path, count: int, seed: int, sums: bool) -> Counter:
    run, other = two_runs
    verdicts, tried, template = Counter(), tmp_path / "tried", run.out
    if not sums:
        template = tmp_path / "template"
        shutil.copytree(run.out, template, symlinks=True)
        for step in runs.saved_steps(template):
            (step / checkpoint.SUMS).unlink()
    for number in range(count):
        shutil.rmtree(tried, ignore_errors=True)
        shutil.copytree(template, tried, symlinks=True)
        done = do_damage(random.Random(f"{seed} {number}"), tried, other.out, sums)
        try:
            verdicts[judged(run, tried, sums)] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, number {number}: {done}") from error
    print(f"seed {seed}, {'with' if sums else 'without'} SHA256SUMS: {dict(verdicts)}")
    return verdicts


def test_an_undamaged_run_is_judged_harmless(two_runs, tmp_path):
    shutil.copytree(two_runs[0].out, tmp_path / "copy", symlinks=True)
    assert judged(two_runs[0], tmp_path / "copy") == "harmless"


@pytest.mark.parametrize(
    "count, sums",
    [(40, True), pytest.param(200, True, marks=slow), pytest.param(200, False, marks=slow)],
    ids=["40", "200", "200 without sums"],
)
def test_random_damage_is_refused_in_one_line_or_does_no_harm(count, sums, two_runs, tmp_path, capsys):
    verdicts = judge_many(two_runs, tmp_path, count, SEED, sums)
    assert sum(verdicts.values()) == count and min(verdicts[verdict] for verdict in ("refused", "fell back", "harmless")) > 0
