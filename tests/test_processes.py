"""Several processes, as torchrun starts them: the same run, written once; and stopped, resumed and refused as one."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import TEXT
from safetensors.torch import load_file
from test_training import BLOCK, RandomExamples, assert_equal_states, run, tiny, without_times

from nanochat import checkpoint, evaluate, processes, runs, runtime, training
from nanochat.metrics import read_metrics
from nanochat.model import Batch, forward_flops
from nanochat.tokenizer import Tokenizer
from nanochat.training import example_order

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


def torchrun(*command, cwd: Path, **env) -> subprocess.CompletedProcess:
    """Run a script in two processes, as a user does."""
    paths = [str(ROOT), str(TESTS), os.environ["PYTHONPATH"]]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        cwd=cwd, capture_output=True, encoding="utf-8", timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | env)


# ------------------------------------------------------------------ one process and two, side by side

# Four micro-batches of three examples: a step is all twelve. Of two processes each takes every other micro-batch.
STEP = dict(batch_size=3, accumulate=4, max_steps=6, learning_rate=1e-2, clip=0.9)
CUT = STEP | dict(save_every=3, eval_every=6)
STEPS = {
    "uneven": [1, 0, 0, 4, 3, 0, 0, 0, 0, 16, 16, 8],  # 1, 7, 0 and 40 tokens to learn from
    "one-sided": [3, 0, 16, 0, 0, 0, 9, 9, 9, 0, 0, 0],  # the second process has none
}
OPTIMIZERS = ["adamw", "muon"]
PEAK = 1e9  # FLOP/s, for MFU


def examples(supervised: list[int]) -> RandomExamples:
    """Examples that the first step of a run meets with these numbers of supervised tokens."""
    counts = dict(zip(example_order(0, 12, 12, seed=3), supervised))
    return RandomExamples([counts[index] for index in range(12)])


@patch.object(training, "draw_losses", lambda log, picture: None)  # half a second each
def work(folder: Path, backend: str) -> None:
    """What one process and two do alike: each run into a folder of its own, and beside them what this process saw."""
    tokenizer = Tokenizer.train([TEXT * 20], 384).for_chat()
    seen: dict[str, dict] = {}
    for optimizer in OPTIMIZERS:
        for name, supervised in STEPS.items():
            seen[f"{name}-{optimizer}"] = gradients_and_weights(folder / f"{name}-{optimizer}", supervised, optimizer, tokenizer)
        for compiling in ("no", "yes"):
            with patch.object(torch, "compile", partial(torch.compile, backend=backend)):
                run(tiny(tokenizer), examples(STEPS["uneven"]), folder / f"compile-{compiling}-{optimizer}", tokenizer,
                    optimizer=optimizer, compile=compiling, **STEP)
    for count in (0, 1, 5):
        seen[f"score-{count}"] = evaluate.score(tiny(tokenizer).double(), tokenizer, batches(count))
    for out in ("dropout", "dropout-cut"):
        run(tiny(tokenizer, dropout=0.2), examples(STEPS["uneven"]), folder / out, tokenizer, **CUT)
    cut(folder / "dropout-cut")
    go_on(folder / "dropout-cut", tokenizer)
    run(tiny(tokenizer), examples(STEPS["uneven"]), folder / "begun", tokenizer, **CUT)
    cut(folder / "begun")
    if (folder / "moved").exists():
        go_on(folder / "moved", tokenizer)
    torch.save(seen, folder / f"seen-{processes.rank()}.pt")


def gradients_and_weights(out: Path, supervised: list[int], optimizer: str, tokenizer: Tokenizer) -> dict:
    """Of a run in float64: the gradients of each step, as clipping finds them, and the weights at the end."""
    model, gradients = tiny(tokenizer).double(), []

    def clip(parameters, limit, real=torch.nn.utils.clip_grad_norm_):
        if limit == STEP["clip"]:  # not in the rehearsal
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return real(parameters, limit)

    with patch.object(torch.nn.utils, "clip_grad_norm_", clip), patch.object(runtime, "product_speed", lambda *_: PEAK):
        run(model, examples(supervised), out, tokenizer, optimizer=optimizer, **STEP)
    return {"gradients": gradients, "weights": model.state_dict()}


def batches(count: int) -> Iterator[Batch]:
    data = RandomExamples([1, 7, 0, 16, 3])
    return (data.batch([index]) for index in range(count))


def cut(out: Path) -> None:
    """Leave what a kill after step 3 would have left."""
    processes.from_rank_0(lambda: shutil.rmtree(out / "step-000006"))


def go_on(out: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(99)
    step, state = processes.from_rank_0(lambda: runs.open_run(out, resume=True, overwrite=False))
    run(checkpoint.load(step)[0], examples(STEPS["uneven"]), out, tokenizer, resume=state, **CUT)


WORKER = """
import atexit, sys
from pathlib import Path
import test_processes
atexit.register(print, "Python's own end", file=sys.__stderr__)
from nanochat import runtime
runtime.run_as_script(lambda: test_processes.work(Path(sys.argv[1]), sys.argv[2]))
"""


def one_and_two(folder: Path, backend: str) -> tuple[Path, Path, str]:
    """Do `work` in this process and in two others: → (the folder of the one, that of the two, what the two printed)."""
    one, two = folder / "one", folder / "two"
    one.mkdir()
    work(one, backend)
    torch._dynamo.reset()
    shutil.copytree(one / "begun", two / "moved", symlinks=True)
    (folder / "worker.py").write_text(WORKER)
    done = torchrun("worker.py", two, backend, cwd=folder)
    assert done.returncode == 0, done.stderr
    return one, two, done.stderr


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path, str]:
    return one_and_two(tmp_path_factory.mktemp("processes"), "eager")


def all_seen(one: Path, two: Path, name: str) -> tuple[dict, list[dict]]:
    """What the one process saw, and what each of the two did."""
    return torch.load(one / "seen-0.pt")[name], [torch.load(two / f"seen-{rank}.pt")[name] for rank in range(2)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STEPS)
def test_two_processes_take_the_steps_of_one(name, optimizer, both):
    """Gradients and weights, with micro-batches of 1, 7, 0 and 40 supervised tokens, and where one process has none.

    Muon's products in bf16 round the same numbers alike: they differ by less than 1e-15.
    """
    one, two, _ = both
    expected, ranks = all_seen(one, two, f"{name}-{optimizer}")
    assert len(expected["gradients"]) == 6
    for of_rank in ranks:
        for gradients, others in zip(expected["gradients"], of_rank["gradients"], strict=True):
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(others[parameter], gradient, rtol=1e-9, atol=1e-14)
        for parameter, weights in expected["weights"].items():
            torch.testing.assert_close(of_rank["weights"][parameter], weights, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(w, ranks[1]["weights"][parameter]) for parameter, w in ranks[0]["weights"].items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STEPS)
def test_two_processes_log_what_one_does_once(name, optimizer, both, tokenizer):
    one, two = (read_metrics(out / f"{name}-{optimizer}" / "metrics.jsonl") for out in both[:2])
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5, 6]
    flops = 3 * forward_flops(tiny(tokenizer).config, 12 * BLOCK, sum(STEPS[name]), BLOCK) / (12 * BLOCK)  # a token
    for expected, record in zip(one, two):
        assert record.keys() == expected.keys()
        for key in {"loss", "grad_norm", "learning_rate", "val_loss"} & record.keys():
            assert record[key] == pytest.approx(expected[key], rel=1e-9)
        for count, line in ((1, expected), (2, record)):
            assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / (count * PEAK), rel=1e-9)


def assert_same_losses(one: Path, other: Path) -> None:
    losses, others = ([record["loss"] for record in read_metrics(out / "metrics.jsonl")] for out in (one, other))
    assert len(losses) == 6 and others == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_or_not_one_process_and_two_have_the_same_losses(optimizer, both):
    one, two, _ = both
    for other in (one / f"compile-yes-{optimizer}", two / f"compile-no-{optimizer}", two / f"compile-yes-{optimizer}"):
        assert_same_losses(one / f"compile-no-{optimizer}", other)


@pytest.mark.slow
def test_so_they_have_with_the_real_compiler(tmp_path):
    one, two, shown = one_and_two(tmp_path, "inductor")
    assert "compiled" in shown
    for optimizer in OPTIMIZERS:
        for other in (one / f"compile-yes-{optimizer}", two / f"compile-yes-{optimizer}"):
            assert_same_losses(one / f"compile-no-{optimizer}", other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compiling", ["no", "yes"])
def test_a_checkpoint_of_two_processes_has_the_names_of_one(compiling, optimizer, both):
    """Neither DistributedDataParallel nor the compiler shows in them."""
    steps = [out / f"compile-{compiling}-{optimizer}" / "step-000006" for out in both[:2]]
    states = [torch.load(step / "resume" / "state.pt", weights_only=True) for step in steps]
    names = [load_file(step / "model.safetensors").keys() for step in steps]
    assert names[0] == names[1] and states[0]["optimizer"].keys() == states[1]["optimizer"].keys()
    assert [state["conditions"]["compiled"] for state in states] == [compiling == "yes"] * 2
    assert [state["conditions"]["processes"] for state in states] == [1, 2]
    assert [len(state["rng"]) for state in states] == [1, 2]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_processes_share_an_evaluation(count, both):
    """Fewer batches than processes, and a number that they cannot share evenly."""
    expected, ranks = all_seen(*both[:2], f"score-{count}")
    assert ranks == [pytest.approx(expected, rel=1e-12)] * 2
    assert ranks[0] == ranks[1]


def test_two_processes_resume_to_the_same_end_with_dropout(both):
    """Bit for bit: each draws on where it was. And each drops others, as two halves of one batch would."""
    out = both[1]
    assert without_times(read_metrics(out / "dropout" / "metrics.jsonl")) == without_times(read_metrics(out / "dropout-cut" / "metrics.jsonl"))
    weights = [load_file(out / name / "step-000006" / "model.safetensors") for name in ("dropout", "dropout-cut")]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert_equal_states(out / "dropout", out / "dropout-cut")
    assert_each_draws_for_itself(out / "dropout" / "step-000006")


def assert_each_draws_for_itself(step: Path) -> None:
    one, other = torch.load(step / "resume" / "state.pt", weights_only=True)["rng"]
    assert not torch.equal(one["cpu"], other["cpu"])


def assert_same_end(one: Path, other: Path) -> None:
    """The biases of keys, which move no loss, have gradients of nothing but rounding: hence 1e-5, at a rate of 1e-2."""
    assert_same_losses(one, other)
    weights = [load_file(out / "step-000006" / "model.safetensors") for out in (one, other)]
    for name, w in weights[0].items():
        torch.testing.assert_close(weights[1][name], w, rtol=1e-5, atol=1e-5)


def test_a_run_moves_from_one_process_to_two(both):
    one, two, shown = both
    assert_same_end(one / "compile-no-adamw", two / "moved")
    notes = [line for line in shown.splitlines() if line.startswith("note:")]
    assert notes == ["note: the run was on 1 processes, now 2: equal but for rounding and dropout's draws"]
    assert_each_draws_for_itself(two / "moved" / "step-000006")


def test_a_run_moves_from_two_processes_to_one(both, tokenizer, tmp_path, capsys):
    one, two, _ = both
    shutil.copytree(two / "begun", tmp_path / "moved", symlinks=True)
    go_on(tmp_path / "moved", tokenizer)
    assert_same_end(one / "compile-no-adamw", tmp_path / "moved")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == ["note: the run was on 2 processes, now 1: equal but for rounding and dropout's draws"]


def test_two_processes_leave_what_one_leaves(both):
    """No file of another process, and nothing half-written."""
    one, two, _ = both
    for out in (path for path in one.iterdir() if path.is_dir()):
        files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, two / out.name)]
        assert files[0] == files[1], out.name


def test_several_processes_end_before_python_does(both, stopped):
    """In Python's own end gloo's threads may abort, one time in twenty-five, and torchrun says that a run failed which has
    ended well (pytorch/pytorch#179291): destroy_process_group does not stop them."""
    assert "Python's own end" not in both[2] + stopped[1].stderr


# ------------------------------------------------------------------ the scripts

FLAGS = ["--data", ROOT / "data" / "samples" / "garden.txt", *"--n-layer 2 --n-head 2 --n-embd 32 --vocab-size 384".split(),
         *"--block-size 64 --batch-size 2 --max-steps 8 --save-every 4 --eval-every 8 --dtype float32 --out out/run".split(),
         "--accumulate", 2]


def lines_of_rank_0(done: subprocess.CompletedProcess) -> list[str]:
    """What was said, without what rank 1 adds where torchrun is slow to end it."""
    return [line for line in done.stderr.splitlines() if not line.startswith("rank 1:")]


@pytest.mark.parametrize("name, flags, expected", [
    ("train.py", [*FLAGS[:-1], 3], "--accumulate is 3, must be a multiple of 2"),
    pytest.param("train.py", ["--data", "nothing.txt", "--accumulate", 2], "nothing.txt: no such file", marks=pytest.mark.slow),
    pytest.param("train.py", ["--data", "gbk.txt", "--accumulate", 2], "gbk.txt", marks=pytest.mark.slow),
    pytest.param("finetune.py", ["--data", "gbk.txt", "--accumulate", 2], "not UTF-8", marks=pytest.mark.slow),
])
def test_wrong_input_is_said_once_and_ends_all_processes(name, flags, expected, tmp_path):
    """torchrun adds a report of its own: rank 0 ended with 2."""
    (tmp_path / "gbk.txt").write_bytes("小河流过磨坊。".encode("gbk") * 100)
    done = torchrun(ROOT / name, *flags, cwd=tmp_path)
    lines = lines_of_rank_0(done)
    assert done.returncode == 1 and "\n".join(lines).count(expected) == 1, done.stderr
    assert any(line.startswith("error: ") and expected in line for line in lines), done.stderr
    assert not any(f'File "{ROOT / folder}' in line for folder in (name, "nanochat") for line in lines), done.stderr
    assert "exitcode  : 2" in done.stderr.replace("\t", " ") and not list(tmp_path.rglob("step-*"))


@pytest.mark.slow
def test_a_wrong_flag_is_said_once_and_ends_all_processes(tmp_path):
    done = torchrun(ROOT / "train.py", "--temprature", 1, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("Unrecognized options: --temprature") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr.replace("\t", " ") and not any(f'File "{ROOT / ours}' in done.stderr for ours in ("train.py", "nanochat")), done.stderr


# One process gives a signal, to itself or to torchrun, in step 5, and waits there until it has it.
SIGNALLING = """
import atexit, os, sys, time
import train as script
from nanochat import processes, runtime, training
atexit.register(print, "Python's own end", file=sys.__stderr__)
target, number, by = sys.argv.pop(), int(sys.argv.pop()), int(sys.argv.pop())
real = training.learning_rate_factor
def hit(step, *rest):
    if step == 4 and processes.rank() == by:
        os.kill(os.getppid() if target == "torchrun" else os.getpid(), number)
        while not runtime._received:
            time.sleep(0.01)
    return real(step, *rest)
training.learning_rate_factor = hit
runtime.run_as_script(script.main)
"""


def signalled(folder: Path, target: str, number: int, by: int) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SIGNALLING)
    return torchrun("script.py", *FLAGS, by, int(number), target, cwd=folder)


def assert_saved_once_at_step_5(folder: Path, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 1 and done.stderr.count("stopped: step 5 is saved in out/run") == 1, done.stderr
    assert done.stderr.count("finishing this step, then saving") <= 1, done.stderr
    out = folder / "out" / "run"
    assert checkpoint.followed(out / "last").name == "step-000005"
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not list(out.glob(".tmp-*"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder in which torchrun met SIGTERM in step 5 of 8, as when a cluster ends a job."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, signalled(folder, "torchrun", signal.SIGTERM, by=0)


def test_sigterm_to_torchrun_ends_the_step_in_all_processes_saved_once(stopped):
    assert_saved_once_at_step_5(*stopped)
    assert "finishing this step, then saving" in stopped[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("target, number, by", [
    ("itself", signal.SIGTERM, 1), ("itself", signal.SIGINT, 0), ("torchrun", signal.SIGINT, 1)])
def test_so_does_any_signal_to_any_process(target, number, by, tmp_path):
    assert_saved_once_at_step_5(tmp_path, signalled(tmp_path, target, number, by))


@pytest.mark.slow
def test_two_processes_go_on_and_only_one_prints_and_writes(stopped, tmp_path):
    shutil.copytree(stopped[0] / "out", tmp_path / "out", symlinks=True)
    done = torchrun(ROOT / "train.py", "--resume", "--out", "out/run", cwd=tmp_path)
    assert done.returncode == 0 and "rank" not in done.stdout + done.stderr and "note:" not in done.stderr, done.stderr
    for line in (r"settings: \{", "2 processes, 1 threads", "trying a few steps", "step 8: val_loss", r"about \d+\.\d minutes", "resumed at step 5"):
        assert len(re.findall(line, done.stderr)) == 1, line
    said = done.stdout.splitlines()
    assert said[-1] == "wrote out/run; next: python finetune.py --init out/run"
    assert len(said) == len(set(said))
    assert [record["step"] for record in read_metrics(tmp_path / "out" / "run" / "metrics.jsonl")] == list(range(1, 9))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus", "run"]
    assert len(list((tmp_path / "out" / "corpus").iterdir())) == 1 and not list(tmp_path.rglob(".tmp-*"))
    assert sorted(path.name for path in (tmp_path / "out" / "run").iterdir()) == [
        "best", "last", "loss.png", "metrics.jsonl", "step-000005", "step-000008"]


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(stopped, tmp_path):
    shutil.copytree(stopped[0] / "out", tmp_path / "out", symlinks=True)
    resumed = subprocess.run([sys.executable, ROOT / "train.py", "--resume", "--out", "out/run"], cwd=tmp_path, capture_output=True,
                             encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert resumed.returncode == 0 and "note: the run was on 2 processes, now 1" in resumed.stderr, resumed.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "out" / "run" / "metrics.jsonl")] == list(range(1, 9))
