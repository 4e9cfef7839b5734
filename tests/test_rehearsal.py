"""rehearsal.py: the steps before the first change nothing; what does not fit is said in numbers, before anything is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from test_training import RandomExamples, run, tiny
from torch import nn
from torch._dynamo.testing import CompileCounter

from nanochat import InputError, checkpoint, processes, rehearsal, runs, runtime, training
from nanochat.model import GPT, IGNORED, Batch, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training import TrainConfig, build_optimizer

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def what_is_compiled_ends_with_the_test():
    yield
    torch._dynamo.reset()


def rehearse(model, optimizer, dtype=torch.float32, compiling="no", batch_size=2, micro_steps=1, minutes=0.0):
    batch = RandomExamples([9] * batch_size).batch(range(batch_size))
    return rehearsal.rehearse(model, optimizer, batch, micro_steps, dtype, compiling, 0.05, lambda seconds: 60 * minutes)


# ------------------------------------------------------------------ nothing changes


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [True, False])
def test_a_rehearsal_leaves_everything_as_it_was(optimizer, dtype, mode, tokenizer):
    """Weights, optimizer, gradients, random state and mode, bit for bit, with dropout on."""
    model = tiny(tokenizer, dropout=0.2).train(mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    built, random_state = build_optimizer(model, TrainConfig(optimizer=optimizer)), torch.get_rng_state()
    network, seconds = rehearse(model, built, dtype)
    assert network is model and 0 < seconds < 60
    for name, p in model.named_parameters():
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32)), name
        assert p.grad is None, name
    assert not any(part.state for part in getattr(built, "parts", [built]))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training is mode


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_is_the_same_with_and_without_its_rehearsal(optimizer, dtype, tokenizer, tmp_path, monkeypatch):
    models, losses = [], []
    for rehearsed in (True, False):
        if not rehearsed:
            monkeypatch.setattr(rehearsal, "rehearse", lambda model, *_, **__: (model, 1.0))
        models.append(model := tiny(tokenizer, dropout=0.2))
        _, records = run(model, RandomExamples([9] * 5), tmp_path / str(rehearsed), tokenizer, dtype=dtype, optimizer=optimizer)
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(p, q), name


def test_the_time_of_a_step_counts_its_micro_steps_and_not_the_first(tokenizer, monkeypatch):
    times = iter([(100.0, 100.0), (3.0, 1.0), (5.0, 1.0), (4.0, 1.0)] + 20 * [(4.0, 1.0)])
    monkeypatch.setattr(rehearsal, "one_round", lambda *_: next(times))
    model = tiny(tokenizer)
    assert rehearse(model, build_optimizer(model, TrainConfig()), micro_steps=8)[1] == 8 * 4 + 1


def test_of_several_processes_only_the_last_micro_step_waits_for_the_others(tokenizer, monkeypatch):
    model, shared = tiny(tokenizer), nn.Module()
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(rehearsal, "DistributedDataParallel", lambda network, **_: shared)
    times = {(model, 8): (3.0, 8 * 3.0 + 1), (shared, 1): (5.0, 5.0 + 1)}
    monkeypatch.setattr(rehearsal, "time_steps", lambda network, micro_steps, **_: times[network, micro_steps])
    assert rehearse(model, build_optimizer(model, TrainConfig()), micro_steps=8) == (shared, 7 * 3 + 5 + 1)


# ------------------------------------------------------------------ compiler


def raising(*_, **__):
    raise RuntimeError("no C++ compiler\nfound in 40 places")


@pytest.mark.parametrize("broken", [raising, lambda *_, **__: raising], ids=["torch.compile", "the compiled network"])
def test_a_compiler_that_does_not_work_costs_one_warning(broken, tokenizer, tmp_path, monkeypatch, capsys):
    """Where Python or the system is unknown to it torch.compile itself raises, without a compiler its first call."""
    monkeypatch.setattr(torch, "compile", broken)
    progress, _ = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, compile="yes")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: --compile does not work here, going on without it: no C++ compiler"]
    assert progress.step == 4
    state = torch.load(tmp_path / "last" / "resume" / "state.pt", weights_only=True)
    assert state["conditions"]["compiled"] is False


def counting(monkeypatch) -> CompileCounter:
    """From now on torch.compile counts its graphs, forward ones, and runs them as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_one_graph_serves_all_layers_and_two_any_number_of_supervised_tokens(tokenizer, tmp_path, monkeypatch):
    """Each dialogue has its own number of tokens to learn from. A kernel set for each would take minutes;
    and beyond the compiler's limit the rest would run uncompiled: other rest, other rounding, after --resume."""
    counter, frames = counting(monkeypatch), []
    monkeypatch.setattr(training, "stop_if_not_finite", lambda *_: frames.append(counter.frame_count))
    run(tiny(tokenizer, n_layer=3), RandomExamples([1, 16] * 40), tmp_path, tokenizer, batch_size=16, max_steps=10, compile="yes")
    state = torch.load(tmp_path / "last" / "resume" / "state.pt", weights_only=True)
    assert state["conditions"]["compiled"] is True
    assert frames[-1] == 1 + 2


@pytest.mark.slow
def test_only_rows_of_another_length_and_no_supervised_token_have_graphs_of_their_own(tokenizer, monkeypatch):
    counter, model = counting(monkeypatch), tiny(tokenizer, n_layer=3).train()

    def batch(tokens: int, supervised: int) -> Batch:
        inputs, targets = torch.randint(97, (2, 20, tokens))
        targets.view(-1)[supervised:] = IGNORED
        return Batch(inputs, targets)

    network = rehearsal.compiled(model, build_optimizer(model, TrainConfig()), batch(16, 100), torch.float32)
    assert network is not model and counter.frame_count == 1 + 1
    for tokens, supervised, graphs in [
        (16, 70, 2), (16, 200, 3), (16, 320, 3), (16, 1, 3), (12, 50, 4), (16, 100, 4), (12, 240, 4), (8, 30, 5), (16, 0, 6), (8, 1, 6), (12, 0, 6),
    ]:
        network(*batch(tokens, supervised)).backward()
        assert counter.frame_count == graphs, (tokens, supervised)


def test_auto_does_not_try_the_compiler_in_a_short_run(tokenizer, monkeypatch):
    tried = []
    monkeypatch.setattr(rehearsal, "compiled", lambda model, *_: tried.append(model) or model)
    model = tiny(tokenizer)
    for minutes, tries in [(0.1, 0), (9.9, 0), (10.1, 1)]:
        assert rehearse(model, build_optimizer(model, TrainConfig()), compiling="auto", minutes=minutes)[0] is model
        assert len(tried) == tries, minutes


@pytest.mark.parametrize("share, taken", [(0.5, True), (0.96, True), (0.98, False), (1.5, False)])
def test_auto_takes_the_compiled_network_where_its_steps_are_faster(share, taken, tokenizer, monkeypatch):
    """By three percent at least, which the clock can tell."""
    model, candidate = tiny(tokenizer), tiny(tokenizer)
    monkeypatch.setattr(rehearsal, "compiled", lambda *_: candidate)
    monkeypatch.setattr(rehearsal, "time_steps", lambda network, **_: (0.1, 2.0 if network is model else 2.0 * share))
    chosen = rehearse(model, build_optimizer(model, TrainConfig()), compiling="auto", minutes=60)
    assert chosen == ((candidate, 2.0 * share) if taken else (model, 2.0))


def test_yes_takes_the_compiled_network_untimed_against_the_other_and_no_never_tries(tokenizer, monkeypatch):
    model, candidate = tiny(tokenizer), tiny(tokenizer)
    timed = []
    monkeypatch.setattr(rehearsal, "compiled", lambda *_: candidate)
    monkeypatch.setattr(rehearsal, "time_steps", lambda network, **_: timed.append(network) or (0.1, 2.0))
    assert rehearse(model, build_optimizer(model, TrainConfig()), compiling="yes") == (candidate, 2.0)
    assert rehearse(model, build_optimizer(model, TrainConfig()), compiling="no", minutes=60) == (model, 2.0)
    assert timed == [candidate, model]


@pytest.mark.slow
@pytest.mark.parametrize("compile_flag", ["auto", "yes"])
@pytest.mark.parametrize("began_compiled", [True, False])
def test_a_resumed_run_is_compiled_if_it_began_so(began_compiled, compile_flag, tokenizer, tmp_path, monkeypatch):
    """Whatever is faster now, and whether or not the compiler works now as it did then."""
    data, settings = RandomExamples([9, 4, 7, 12]), dict(save_every=2, compile=compile_flag)

    def go(compiler_pays: bool, **state):
        with monkeypatch.context() as machine:
            counter = counting(machine)
            machine.setattr(rehearsal, "WORTH_A_TRIAL", 0)
            machine.setattr(rehearsal, "time_steps", lambda network, **_: (0.1, 1.0 if ("layer" in vars(network)) == compiler_pays else 2.0))
            if compile_flag == "yes" and not compiler_pays and not state:
                machine.setattr(torch, "compile", raising)
            model = tiny(tokenizer, dropout=0.1) if not state else checkpoint.load(tmp_path / "last")[0]
            _, records = run(model, data, tmp_path, tokenizer, **settings, **state)
            return [record["loss"] for record in records], counter.frame_count > 0

    losses, _ = go(began_compiled)
    shutil.rmtree(tmp_path / "step-000004")
    _, state = runs.open_run(tmp_path, resume=True, overwrite=False)
    assert state["conditions"]["compiled"] is began_compiled
    again, compiled = go(not began_compiled, resume=state)
    assert again == losses and compiled is began_compiled
    assert runs.read_resume(tmp_path / "step-000004")["conditions"]["compiled"] is began_compiled


def test_a_compiled_network_that_fails_leaves_no_gradient_and_no_draw(tokenizer, monkeypatch):
    """It fails in its backward pass, with gradients half way."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward")

    monkeypatch.setattr(torch, "compile", lambda features, **_: lambda *args, **given: Fails.apply(features(*args, **given)))
    model = tiny(tokenizer, dropout=0.2)
    built, random_state = build_optimizer(model, TrainConfig()), torch.get_rng_state()
    before = model.wte.weight.detach().clone()
    network, _ = rehearse(model, built, compiling="yes")
    assert network is model and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state) and torch.equal(model.wte.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_compiled_network_recomputes_to_the_same_losses(compiler, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    losses = {}
    for compiling, recompute in (("no", False), ("yes", False), ("yes", True)):
        _, records = run(tiny(tokenizer), RandomExamples([9, 4, 16, 7]), tmp_path / f"{compiling}-{recompute}", tokenizer,
                         max_steps=6, compile=compiling, recompute=recompute)
        losses[compiling, recompute] = [record["loss"] for record in records]
        torch._dynamo.reset()
    for others in losses.values():
        assert others == pytest.approx(losses["no", False], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "finetune.py"])
def test_without_a_c_compiler_the_scripts_train_eagerly(name, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=16))
    runs.save(tmp_path / "base", 1, model, tokenizer, settings={}, results={})
    samples = ROOT / "data" / "samples"
    data = ["--data", samples / "garden.txt"] if name == "train.py" else [
        "--data", samples / "dialogues.jsonl", "--val-data", samples / "dialogues.jsonl"]
    env = {"CXX": "/nonexistent", "CC": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / name, *data, "--init", "base", "--block-size", "64", "--max-steps", "3",
                           "--batch-size", "2", "--compile", "yes", "--out", "out"],
                          cwd=tmp_path, capture_output=True, encoding="utf-8", env=os.environ | env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: --compile does not work here") == 1 and "Traceback" not in done.stderr
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


# ------------------------------------------------------------------ disk


def with_free_disk(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))


def test_a_full_disk_is_told_in_numbers_before_the_old_run_is_deleted(tokenizer, tmp_path, monkeypatch):
    model, data = tiny(tokenizer), RandomExamples([9] * 4)
    run(model, data, tmp_path, tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with_free_disk(monkeypatch, 3_000_000)
    size = rehearsal.checkpoint_bytes(model, build_optimizer(model, TrainConfig()))
    with pytest.raises(InputError) as refusal:
        run(tiny(tokenizer), data, tmp_path, tokenizer, keep=3)
    there = sum(path.stat().st_size for path in tmp_path.glob("step-*/**/*") if path.is_file())
    assert str(refusal.value) == (
        f"--out {tmp_path}: 5 checkpoints (--keep, the best, the one being written) of {size / 1e6:.0f} MB need "
        f"{5 * size / 1e9:.2f} GB; {(3_000_000 + there) / 1e9:.2f} GB are free")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_disk_of_the_run_that_is_overwritten_counts_as_free(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "step-000007" / "resume").mkdir(parents=True)
    (tmp_path / "step-000007" / "resume" / "state.pt").write_bytes(bytes(900_000))
    with_free_disk(monkeypatch, 100_000)
    rehearsal.check_disk(tmp_path, 200_000, keep=3)
    with pytest.raises(InputError, match="are free"):
        rehearsal.check_disk(tmp_path, 205_000, keep=3)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [dict(n_embd=192), dict(n_layer=16, n_embd=8)])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(optimizer, sizes, tokenizer, tmp_path):
    for known, name in ((tokenizer, "own"), (Tokenizer.gpt2(), "gpt2")):
        model = tiny(known, **sizes)
        out = tmp_path / name
        estimate = rehearsal.checkpoint_bytes(model, build_optimizer(model, TrainConfig(optimizer=optimizer)))
        run(model, RandomExamples([9] * 4), out, known, optimizer=optimizer, max_steps=1)
        size = sum(path.stat().st_size for path in (out / "last").resolve().rglob("*") if path.is_file())
        assert size <= estimate <= 1.01 * size + 4_000_000, name


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("batch_size, accumulate", [(8, 1), (12, 5), (7, 3), (16, 4)])
def test_the_settings_that_fit_are_named(batch_size, accumulate, tokenizer, monkeypatch):
    """The largest micro-batch that fits among those that give the same rows a step, for memories of every size."""
    model = tiny(tokenizer)
    optimizer, rows = build_optimizer(model, TrainConfig()), batch_size * accumulate

    def check(size: int, more: int, memory: float) -> int:
        monkeypatch.setattr(rehearsal, "memory_of_machine", lambda: memory)
        return rehearsal.check_memory(model, optimizer, size, 16, False, more, torch.float32)

    needed = {size: check(size, 1, 1e12) for size in range(1, batch_size + 1)}
    assert check(batch_size, accumulate, needed[batch_size] / rehearsal.ROOM + 2) == needed[batch_size]
    for size in range(1, batch_size):
        memory = needed[size] / rehearsal.ROOM + 2
        with pytest.raises(InputError) as refusal:
            check(batch_size, accumulate, memory)
        fits = [fewer for fewer in range(1, size + 1) if rows % fewer == 0]
        small, more = map(int, re.search(r"--batch-size (\d+) --accumulate (\d+) fits", str(refusal.value)).groups())
        assert small == max(fits) and small * more == rows
        assert check(small, more, memory) == needed[small]
        assert f"--batch-size {batch_size} " in str(refusal.value) and f"{needed[batch_size] / 1e9:.1f} GB" in str(refusal.value)
    with pytest.raises(InputError, match="not even 1 fits: take a smaller model or --block-size"):
        check(batch_size, accumulate, needed[1] / rehearsal.ROOM - 1000)


def test_a_run_that_does_not_fit_stops_before_the_old_run_is_deleted(tokenizer, tmp_path, monkeypatch):
    run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(rehearsal, "memory_of_machine", lambda: 200_000)
    with pytest.raises(InputError, match="cpu has 0.0 GB; not even 1 fits"):
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("most, expected", [(5, "--batch-size 4 --accumulate 2 fits"), (1, "--batch-size 1 --accumulate 8 fits"),
                                            (0, "not even 1 fits")])
def test_a_rehearsal_that_runs_out_of_memory_finds_what_fits(error, most, expected, tokenizer, monkeypatch):
    model = tiny(tokenizer)
    forward = model.forward

    def limited(inputs, *rest):
        if len(inputs) > most:
            raise error
        return forward(inputs, *rest)

    monkeypatch.setattr(model, "forward", limited)
    with pytest.raises(InputError, match=f"--batch-size 8 does not fit the memory of cpu; {expected}"):
        rehearse(model, build_optimizer(model, TrainConfig()), batch_size=8)


def test_memory_that_cannot_be_had_is_told_in_one_line(capsys):
    """The real error of the CPU's allocator, and its kin, wherever they come up in a script."""

    def ask_for_40_terabytes():
        torch.empty(10**13)

    def without_memory(error):
        raise error

    for main in (ask_for_40_terabytes, *(lambda e=error: without_memory(e) for error in OUT_OF_MEMORY)):
        with pytest.raises(SystemExit) as end:
            runtime.run_as_script(main)
        shown = capsys.readouterr().err
        assert end.value.code == 2 and shown.count("\n") == 1 and "--batch-size" in shown
    with pytest.raises(RuntimeError, match="another"):  # a defect keeps its traceback
        runtime.run_as_script(lambda: without_memory(RuntimeError("another")))


def test_the_memory_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("123456789\n")
    (tmp_path / "none").write_text("max\n")
    real_exists, real_read = os.path.exists, Path.read_text
    for name, expected in (("memory.max", 123456789), ("none", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))):
        monkeypatch.setattr(os.path, "exists", lambda p: p == "/sys/fs/cgroup/memory.max" or "cgroup" not in str(p) and real_exists(p))
        monkeypatch.setattr(Path, "read_text", lambda p, *a, name=name, **k: real_read(tmp_path / name if "cgroup" in str(p) else p, *a, **k))
        assert rehearsal.memory_of_machine() == expected


MEASURE = """
import json, sys
from pathlib import Path
import torch
from nanochat import rehearsal, runtime
from nanochat.model import GPT, IGNORED, GPTConfig
from nanochat.training import TrainConfig, build_optimizer

sizes, B, dtype, optimizer, recompute = json.loads(sys.argv[1])
dtype, T = runtime.DTYPES[dtype], sizes["block_size"]
runtime.keep_freed_memory()  # as the scripts do; it costs up to half as much again

def peak():  # of this process alone: ru_maxrss begins with that of the process that started it
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])

def train(sizes, B, T, steps):
    model = GPT(GPTConfig(**sizes)).train()
    model.recompute = recompute
    built = build_optimizer(model, TrainConfig(optimizer=optimizer))
    for _ in range(steps):
        for _ in range(2):
            x = torch.randint(sizes["vocab_size"], (B, T))
            with runtime.autocast(x.device, dtype):
                loss = model(x, x) / (B * T)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        built.step()
        built.zero_grad(set_to_none=True)
    return model, built

train(dict(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=8), 1, 8, 1)  # the libraries' own
before = peak()
model, built = train(sizes, B, T, 3)
real = peak() - before
print(json.dumps([rehearsal.memory_needed(model, built, T, False, dtype)(B), real]))
"""

SHAPES = [
    dict(vocab_size=8192, block_size=256, n_layer=4, n_head=4, n_embd=256),  # train.py's default
    dict(vocab_size=50257, block_size=256, n_layer=2, n_head=4, n_embd=128),  # all in the logits
    dict(vocab_size=512, block_size=512, n_layer=6, n_head=6, n_embd=384),  # all in the blocks
    dict(vocab_size=512, block_size=1024, n_layer=2, n_head=6, n_embd=384),  # rows too long for a written-out attention
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, batch_size, optimizer", [("float32", 4, "adamw"), ("bfloat16", 16, "muon")])
@pytest.mark.parametrize("sizes, recompute", [*((sizes, False) for sizes in SHAPES), (SHAPES[2], True), (SHAPES[3], False)])
def test_the_estimate_of_memory_is_near_what_a_step_takes(sizes, recompute, dtype, batch_size, optimizer):
    """Against the growth of the process's peak over three steps of two micro-steps, from before the model was made."""
    if dtype == "bfloat16" and runtime.bf16_speedup() < 1:
        pytest.skip("this CPU emulates bf16 products, which would take minutes")
    asked = json.dumps([sizes, batch_size, dtype, optimizer, recompute])
    done = subprocess.run([sys.executable, "-c", MEASURE, asked], capture_output=True, encoding="utf-8", cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    estimate, real = json.loads(done.stdout)
    assert 0.75 * real < estimate < 1.6 * real  # the heap's fragments differ from run to run


# ------------------------------------------------------------------ the report


def test_before_the_first_step_a_run_says_what_it_will_take(tokenizer, tmp_path, monkeypatch, capsys):
    """And before the progress bar: a large model's first step may take a minute."""
    monkeypatch.setattr(rehearsal, "rehearse", lambda model, *_, **__: (model, 90.0))
    monkeypatch.setattr(rehearsal, "check_memory", lambda *_, **__: 3_210_000_000)
    monkeypatch.setattr(rehearsal, "checkpoint_bytes", lambda *_: 77_000_000)
    model = tiny(tokenizer)
    run(model, RandomExamples([9] * 10), tmp_path, tokenizer, accumulate=3, max_steps=4, dtype=torch.bfloat16, keep=5)
    shown = capsys.readouterr().err
    report = shown[: shown.index("0/4")]
    for what in (f"{sum(p.numel() for p in model.parameters()):,} parameters", "on cpu in bfloat16", "1 threads",
                 "10 examples of up to 16 tokens", "96 tokens", "4 steps", "2.40 epochs", "about 6.0 minutes",
                 "3.2 GB of memory", "77 MB a checkpoint", "6 kept at most", "settings: {"):
        assert what in report, what


def test_counting_what_a_forward_keeps_keeps_nothing(make_model):
    model = make_model(dtype=torch.float32, block_size=512, n_embd=96)
    resident = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # noqa: E731
    kept = rehearsal.kept_for_backward(model, 8, 512, torch.float32)
    before = resident()
    for _ in range(8):
        assert rehearsal.kept_for_backward(model, 8, 512, torch.float32) == kept
    assert kept > 20e6 and resident() - before < 2 * kept
