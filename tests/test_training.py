"""training.py: the gradient of a step, the order of its calls, the schedule, the data order, resuming."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import product_speed
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nanochat import InputError, checkpoint, processes, runs, runtime, training
from nanochat.metrics import MetricsLog
from nanochat.model import GPT, IGNORED, Batch, GPTConfig, forward_flops
from nanochat.resume import Progress
from nanochat.training import TrainConfig, build_optimizer, example_order, learning_rate_factor, train

CPU = torch.device("cpu")
BLOCK = 16


class RandomExamples:
    """Examples with as many supervised tokens as `supervised` says, the same at every call."""

    block_size = BLOCK

    def __init__(self, supervised: list[int], vocab_size: int = 97):
        generator = torch.Generator().manual_seed(1)
        self.inputs, self.targets = torch.randint(vocab_size, (2, len(supervised), BLOCK), generator=generator)
        for row, count in zip(self.targets, supervised):
            row[count:] = IGNORED

    @property
    def fingerprint(self) -> str:
        return str((self.inputs.sum() + self.targets.sum()).item())

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices) -> Batch:
        return Batch(self.inputs[indices], self.targets[indices])


def run(model, data, out, tokenizer, dtype=torch.float32, resume=None, **settings):
    """train() on a tiny model; → (progress, the records of metrics.jsonl)."""
    config = TrainConfig(**dict(batch_size=2, max_steps=4, learning_rate=1e-3, warmup_steps=2, seed=3) | settings)
    progress = train(model, tokenizer, data, config, out=out, settings={}, device=CPU, dtype=dtype, resume=resume,
                     evaluate=lambda: {"val_loss": float(model.wte.weight.detach().double().norm())},
                     sample=lambda: {"a": "sample"})
    return progress, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tiny(tokenizer, **settings) -> GPT:
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**sizes | settings))


# ------------------------------------------------------------------ the step


@pytest.mark.parametrize("batch_size, accumulate", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accumulating_equals_one_batch_of_8_with_uneven_masks(
    batch_size, accumulate, tokenizer, tmp_path, monkeypatch
):
    """The gradient of a step is that of the mean over all its supervised tokens, however it is cut."""
    data = RandomExamples([1, 7, 0, 16, 3, 16, 0, 2])
    model = tiny(tokenizer).double()
    order = example_order(0, 8, 8, seed=3)
    model(*data.batch(order)).div(45).backward()  # 45 = the supervised tokens of all eight
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    seen = {}
    monkeypatch.setattr(  # the gradients as clipping finds them
        torch.nn.utils, "clip_grad_norm_",
        lambda parameters, limit: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}) or torch.ones(()),
    )
    _, records = run(model, data, tmp_path, tokenizer, batch_size=batch_size, accumulate=accumulate, max_steps=1)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-14)
    model = tiny(tokenizer).double()
    assert records[0]["loss"] == pytest.approx(model(*data.batch(order)).item() / 45, rel=1e-6)


def test_a_mean_of_means_would_be_another_gradient(tokenizer):
    data = RandomExamples([1, 7, 0, 16, 3, 16, 0, 2])
    model = tiny(tokenizer).double()
    whole = model(*data.batch(range(8))).item() / 45
    halves = [model(*data.batch(half)).item() / n for half, n in ((range(4), 24), (range(4, 8), 21))]
    assert abs(sum(halves) / 2 - whole) > 1e-4


def test_batches_without_supervised_tokens_change_nothing(tokenizer, tmp_path):
    """A step that has nothing to learn from gives a zero loss, not NaN."""
    model = tiny(tokenizer)
    _, records = run(model, RandomExamples([0, 0]), tmp_path, tokenizer, max_steps=2, weight_decay=0.0)
    assert [r["loss"] for r in records] == [0.0, 0.0]
    for name, p in tiny(tokenizer).named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name


class RecordingScaler:
    """Stands in for GradScaler: records the calls, and skips the steps in `overflow`."""

    def __init__(self, calls, overflow=(), scale=1024.0):
        self.calls, self.overflow, self.factor, self.steps = calls, overflow, scale, 0

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.factor

    def scale(self, loss):
        self.calls.append("scale")
        loss.register_hook(lambda grad: self.calls.append("backward"))
        return loss * self.factor

    def unscale_(self, optimizer):
        self.calls.append("unscale_")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= self.factor

    def step(self, optimizer):
        self.calls.append("step")
        if self.steps not in self.overflow:
            optimizer.step()

    def update(self):
        self.calls.append("update")
        self.factor *= 0.5 if self.steps in self.overflow else 1.0
        self.steps += 1

    def state_dict(self):
        return {}


def with_scaler(monkeypatch, scaler):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler)


def test_a_step_is_scale_backward_unscale_clip_step_update(tokenizer, tmp_path, monkeypatch):
    calls: list[str] = []
    with_scaler(monkeypatch, RecordingScaler(calls))
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: calls.append("clip") or clip(*args))
    run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, accumulate=2, max_steps=1)
    of_the_step = calls[calls.index("scale") :]  # the rehearsal clips too
    assert of_the_step == ["scale", "backward", "scale", "backward", "unscale_", "clip", "step", "update"]


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_the_clipped_step_does_not_depend_on_the_scale(scale, tokenizer, tmp_path, monkeypatch):
    expected, model = tiny(tokenizer), tiny(tokenizer)
    _, plain = run(expected, RandomExamples([9] * 4), tmp_path / "plain", tokenizer, clip=0.01)
    with_scaler(monkeypatch, RecordingScaler([], scale=scale))
    _, scaled = run(model, RandomExamples([9] * 4), tmp_path / "scaled", tokenizer, clip=0.01)
    # AdamW's step is the same for any multiple of the gradient: without unscale_ only the norm would show
    assert [r["grad_norm"] for r in scaled] == pytest.approx([r["grad_norm"] for r in plain])
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_gradient_is_scaled_down_as_a_whole_to_the_norm_of_clip(clip, tokenizer, tmp_path):
    norms = []

    def note(optimizer, *_) -> None:
        norms.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm().item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        _, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, clip=clip)
    finally:
        hook.remove()
    logged = [r["grad_norm"] for r in records]  # before clipping
    assert min(logged) > 0.1
    assert norms[-4:] == pytest.approx([min(norm, clip) for norm in logged], rel=1e-4)  # before them, the rehearsal's


def test_a_step_has_only_its_own_gradient_and_consumes_all_its_examples(tokenizer, tmp_path):
    """At a rate at which no weight moves, a step that has all examples has the same gradient every time."""
    progress, records = run(tiny(tokenizer), RandomExamples([9] * 6), tmp_path, tokenizer, accumulate=3, learning_rate=1e-30)
    assert [r["grad_norm"] for r in records] == pytest.approx([records[0]["grad_norm"]] * 4, rel=1e-4)
    assert progress.examples == 4 * 6


def test_a_skipped_step_does_not_advance_the_schedule(tokenizer, tmp_path, monkeypatch):
    calls: list[str] = []
    with_scaler(monkeypatch, RecordingScaler(calls, overflow={1, 2}))
    progress, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    assert progress.step == 4 and calls.count("step") == 6
    assert progress.examples == 6 * 2  # the examples of a skipped step are consumed all the same
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    factors = [learning_rate_factor(step, 4, 2) * 1e-3 for step in range(4)]
    assert [r["learning_rate"] for r in records] == pytest.approx(factors)


def test_fp16_with_the_real_scaler_trains_and_keeps_fp32_weights(tokenizer, tmp_path):
    model = tiny(tokenizer)
    _, records = run(model, RandomExamples([16] * 4), tmp_path, tokenizer, dtype=torch.float16, max_steps=12,
                     learning_rate=1e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert records[-1]["loss"] < records[0]["loss"] - 0.1


def test_overflow_in_either_optimizer_skips_both(tokenizer):
    model = tiny(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(*RandomExamples([16] * 4).batch(range(4)))).backward()
    model.h[0].attn.c_attn.weight.grad[0, 0] = math.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


# ------------------------------------------------------------------ what is not finite


class Poisoned(RandomExamples):
    """Examples whose batch number `at` (the rehearsal's is 0) breaks a weight when its turn comes."""

    def __init__(self, model: GPT, at: int, break_it, supervised=(9,) * 5):
        super().__init__(list(supervised))
        self.model, self.at, self.break_it, self.drawn = model, at, break_it, 0

    def batch(self, indices) -> Batch:
        if len(indices) == 1:  # the look at one example before the rehearsal
            return super().batch(indices)
        self.drawn += 1
        batch = super().batch(indices)
        return batch if self.drawn != self.at + 1 else self.Breaking(*batch, self)

    class Breaking(Batch):
        def __new__(cls, inputs, targets, segments, examples):
            batch = super().__new__(cls, inputs, targets, segments)
            batch.examples = examples
            return batch

        def to(self, device):
            self.examples.break_it(self.examples.model)
            return Batch(*self).to(device)


def overflowing(monkeypatch, steps: set[int], then=lambda: None) -> None:
    """The real scaler finds an infinite gradient in these steps (from 0, skipped ones counted)."""
    unscale, count = torch.amp.GradScaler.unscale_, iter(range(1000))

    def unscale_to_infinity(self, optimizer):
        if next(count) in steps:
            optimizer.param_groups[0]["params"][0].grad[0] = math.inf
            then()
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_to_infinity)


def in_weight(value: float):
    def break_it(model: GPT) -> None:
        with torch.no_grad():
            model.ln_f.bias[0] = value

    return break_it


def in_gradient(model: GPT) -> None:
    model.ln_f.bias.register_hook(lambda grad: torch.full_like(grad, math.nan))


def assert_no_number_is_missing(out: Path) -> None:
    """metrics.jsonl is JSON in the strict sense, which knows no NaN or Infinity."""

    def refuse(word):
        raise AssertionError(word)

    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype, break_it, seen", [
    (torch.float32, in_weight(math.nan), "loss nan"), (torch.bfloat16, in_weight(math.inf), "loss (nan|inf)"),
    (torch.float16, in_weight(math.nan), "loss nan"), (torch.float32, in_gradient, r"loss 5\.\d+, gradient norm nan"),
    (torch.bfloat16, in_gradient, r"loss 5\.\d+, gradient norm nan"),
])
def test_what_is_not_finite_stops_the_run_and_harms_nothing(
    dtype, break_it, seen, optimizer, tokenizer, tmp_path, capsys, monkeypatch
):
    """Step, rate, norm and the texts of the step are told; weights and checkpoints stay as they were."""
    model = tiny(tokenizer)
    data = Poisoned(model, at=6, break_it=break_it)  # 1 for the rehearsal, 2 a step: the second batch of step 3
    before = {}
    learning_rate = training.learning_rate_factor(2, 4, 2) * 1e-3
    monkeypatch.setattr(training, "stop_if_not_finite", lambda *args, real=training.stop_if_not_finite: (
        before.update({name: p.detach().clone() for name, p in model.named_parameters()}), real(*args)))
    with pytest.raises(InputError, match=f"step 3: {seen}") as stop:
        run(model, data, tmp_path, tokenizer, optimizer=optimizer, dtype=dtype, accumulate=2, save_every=1, warmup_steps=2)
    assert f"at learning rate {learning_rate:.2g}" in str(stop.value) and "gradient norm" in str(stop.value)
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name
    shown = capsys.readouterr().err
    for index in example_order(8, 4, 5, seed=3):
        assert repr(tokenizer.decode(data.inputs[index].tolist())) in shown
    assert shown.count("in this step:") == 4
    assert [step.name for step in runs.saved_steps(tmp_path)] == ["step-000001", "step-000002"]
    assert checkpoint.load(tmp_path / "last")[0].wte.weight.isfinite().all()
    assert [record["step"] for record in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [1, 2]
    assert_no_number_is_missing(tmp_path)


def test_weights_that_are_not_finite_are_never_saved_over_sound_ones(tokenizer, tmp_path):
    """Here in the row of a position that no example reaches, so no loss shows it."""

    def in_a_row_that_is_not_read(model: GPT) -> None:
        with torch.no_grad():
            model.wpe.weight[-1, 0] = math.nan

    model = tiny(tokenizer, block_size=BLOCK + 1)
    with pytest.raises(InputError, match=r"step 3 is not saved: wpe\.weight is not finite; the checkpoints in .* stay as they were"):
        run(model, Poisoned(model, at=3, break_it=in_a_row_that_is_not_read), tmp_path, tokenizer, save_every=1)
    assert [step.name for step in runs.saved_steps(tmp_path)] == ["step-000001", "step-000002"]
    assert checkpoint.load(tmp_path)[0].wpe.weight.isfinite().all() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("first", [0, 2])
def test_ten_overflows_in_a_row_are_the_scalers_business_an_eleventh_is_not(first, tokenizer, tmp_path, monkeypatch):
    data = RandomExamples([9] * 4)
    with monkeypatch.context() as ten:
        overflowing(ten, {*range(first, first + 10), *range(first + 11, first + 21)})  # twice, with a step between
        progress, records = run(tiny(tokenizer), data, tmp_path / "ten", tokenizer, dtype=torch.float16, max_steps=5)
    assert progress.step == 5 and progress.examples == 2 * 25 and len(records) == 5
    assert_no_number_is_missing(tmp_path / "ten")
    overflowing(monkeypatch, set(range(first, first + 11)))
    with pytest.raises(InputError, match=f"step {first + 1}: loss 5.*, gradient norm (inf|nan) at learning rate"):
        run(tiny(tokenizer), data, tmp_path / "eleven", tokenizer, dtype=torch.float16, max_steps=5, save_every=1)
    assert len(runs.saved_steps(tmp_path / "eleven")) == first
    assert_no_number_is_missing(tmp_path / "eleven")


@pytest.mark.parametrize("val_loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_stops_the_run(val_loss, tokenizer, tmp_path):
    """Its step is no best, and no line of the log."""
    losses = iter([3.0, val_loss])
    config = TrainConfig(batch_size=2, max_steps=4, eval_every=2)
    with pytest.raises(InputError, match=f"step 4: validation loss {val_loss}: .*--learning-rate"):
        train(tiny(tokenizer), tokenizer, RandomExamples([9] * 4), config, out=tmp_path, settings={}, device=CPU,
              dtype=torch.float32, evaluate=lambda: {"val_loss": next(losses)}, sample=lambda: {})
    assert checkpoint.followed(tmp_path / "best").name == "step-000002"
    assert_no_number_is_missing(tmp_path)


# ------------------------------------------------------------------ optimizer and schedule


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_of_the_blocks_decay(optimizer, tokenizer):
    model = tiny(tokenizer)
    groups = build_optimizer(model, TrainConfig(optimizer=optimizer, weight_decay=0.1)).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[p] == (0.1 if p.dim() == 2 and name.startswith("h.") else 0.0), name


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tokenizer):
    model = tiny(tokenizer)
    muon, adamw = build_optimizer(model, TrainConfig(optimizer="muon")).parts
    name_of = {p: name for name, p in model.named_parameters()}
    of_muon = {name_of[p] for group in muon.param_groups for p in group["params"]}
    assert of_muon == {n for n in name_of.values() if n.startswith("h.") and n.endswith("weight") and "ln" not in n}
    assert isinstance(adamw, torch.optim.AdamW)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_schedule_counts_optimizer_steps(accumulate, tokenizer, tmp_path):
    _, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, accumulate=accumulate,
                     max_steps=6, warmup_steps=3)
    rates = [r["learning_rate"] / 1e-3 for r in records]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_group_steps_at_the_rate_that_is_logged(optimizer, tokenizer, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda part, *_: rates.append({group["lr"] for group in part.param_groups}))
    try:
        _, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, optimizer=optimizer)
    finally:
        hook.remove()
    parts = 2 if optimizer == "muon" else 1
    assert rates[-4 * parts :] == [{r["learning_rate"]} for r in records for _ in range(parts)]  # before them, the rehearsal's


@pytest.mark.parametrize("warmup", [3, 4])
def test_the_start_of_a_run_prints_its_length_and_that_it_ends_in_warm_up(warmup, tokenizer, tmp_path, capsys):
    run(tiny(tokenizer), RandomExamples([9] * 10), tmp_path, tokenizer, accumulate=3, max_steps=None, epochs=2, warmup_steps=warmup)
    shown = capsys.readouterr().err
    assert "6 a step, 96 tokens; 4 steps, 2.40 epochs" in shown  # 20 examples fill 3.3 steps
    assert ("the rate rises for --warmup-steps 4" in shown) == (warmup == 4)


def test_minutes_become_a_number_of_steps_before_the_first(tokenizer, tmp_path, capsys):
    progress, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, max_steps=None, max_minutes=0.01)
    assert len(records) == progress.step == progress.max_steps > 4
    assert f"{progress.max_steps:,} steps" in capsys.readouterr().err


def test_minutes_do_not_lengthen_a_run_of_few_steps(tokenizer, tmp_path):
    progress, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, max_steps=5, max_minutes=9)
    assert progress.step == 5 and "val_loss" in records[-1]


@pytest.mark.parametrize("count, given", [(1, 1), (1, 3), (2, 2), (2, 6), (8, 24)])
def test_what_has_no_length_gets_one_and_micro_steps_that_can_be_shared_stay(count, given, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    config = TrainConfig(accumulate=given, learning_rate=0.5)
    assert config.completed(2.5) == replace(config, max_minutes=2.5)
    assert replace(config, epochs=2).completed(2.5) == replace(config, epochs=2)


@pytest.mark.parametrize("count, given", [(2, 1), (2, 3), (4, 6), (8, 9)])
def test_micro_steps_that_cannot_be_shared_evenly_are_refused(count, given, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    with pytest.raises(InputError, match=f"--accumulate is {given}, must be a multiple of {count}, the number of processes"):
        TrainConfig(accumulate=given).completed(2.5)


def test_a_run_without_a_length_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="--max-steps, --max-minutes or --epochs"):
        run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, max_steps=None)


# ------------------------------------------------------------------ data order, checkpoints, resume


def test_every_epoch_visits_each_example_once_in_another_order():
    order = example_order(0, 30, 10, seed=1)
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert example_order(0, 30, 10, seed=1) == order != example_order(0, 30, 10, seed=2)
    assert example_order(7, 11, 10, seed=1) == order[7:18]  # one counter is the whole state


def test_evaluating_changes_no_training_loss(tokenizer, tmp_path):
    losses = []
    for eval_every in (1, 100):
        _, records = run(tiny(tokenizer, dropout=0.2), RandomExamples([9] * 6), tmp_path / str(eval_every), tokenizer,
                         max_steps=6, eval_every=eval_every)
        losses.append([r["loss"] for r in records])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_reproduces_the_uninterrupted_run(optimizer, dtype, tokenizer, tmp_path):
    data = RandomExamples([9, 3, 16, 5, 11])
    settings = dict(accumulate=2, max_steps=7, optimizer=optimizer, dtype=dtype, save_every=3, eval_every=100)
    whole, stopped = tiny(tokenizer, dropout=0.1), tiny(tokenizer, dropout=0.1)
    torch.manual_seed(5)
    _, expected = run(whole, data, tmp_path / "whole", tokenizer, **settings)
    torch.manual_seed(5)

    class Stop(Exception):
        """The plug is pulled in step 4, when it draws the batches of step 5: after the checkpoint of step 3."""

    class Unplugged(RandomExamples):
        drawn = 0

        def batch(self, indices):
            self.drawn += 1
            if self.drawn > 2 + 2 * 4:  # two for the rehearsal
                raise Stop
            return super().batch(indices)

    with pytest.raises(Stop):
        run(stopped, Unplugged([9, 3, 16, 5, 11]), tmp_path / "cut", tokenizer, **settings)
    torch.manual_seed(99)  # a new process has another random state
    step, resume = runs.open_run(tmp_path / "cut", resume=True, overwrite=False)
    assert step.name == "step-000003"
    resumed, _ = checkpoint.load(step)
    _, records = run(resumed, data, tmp_path / "cut", tokenizer, resume=resume, **settings)
    assert without_times(records) == without_times(expected)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name
    assert_equal_states(tmp_path / "whole", tmp_path / "cut")


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in r.items() if "second" not in key and key not in ("mfu", "peak_memory_mb")} for r in records]


def assert_equal_states(one: Path, other: Path) -> None:
    """Two run folders end in the same state, bit by bit: optimizer, scaler, generators, data position."""
    states = [torch.load(out / "last" / "resume" / "state.pt", weights_only=True) for out in (one, other)]
    for state in states:
        state["progress"].pop("seconds")
    assert states[0]["progress"] == states[1]["progress"] and states[0]["scaler"] == states[1]["scaler"]
    assert without_times([states[0]["record"]]) == without_times([states[1]["record"]])
    assert len(states[0]["rng"]) == len(states[1]["rng"])  # one for each process
    assert all(torch.equal(one["cpu"], other["cpu"]) for one, other in zip(states[0]["rng"], states[1]["rng"]))
    assert states[0]["optimizer"].keys() == states[1]["optimizer"].keys() != set()
    for name, values in states[0]["optimizer"].items():
        for key, value in values.items():
            assert torch.equal(value, states[1]["optimizer"][name][key]), (name, key)


def test_the_best_checkpoint_is_kept_and_patience_stops(tokenizer, tmp_path, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])
    model = tiny(tokenizer)
    config = TrainConfig(batch_size=2, max_steps=10, eval_every=1, keep=1, patience=3)
    progress = train(model, tokenizer, RandomExamples([9] * 4), config, out=tmp_path, settings={}, device=CPU,
                     dtype=torch.float32, evaluate=lambda: {"val_loss": next(losses)}, sample=lambda: {})
    assert progress.step == 5 and progress.best_loss == 2.0
    assert checkpoint.locate(tmp_path).resolve().name == "step-000002"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000005"]
    assert "step 5 of 10 is the last: no better validation loss in --patience 3 evaluations" in capsys.readouterr().err


def test_a_validation_loss_that_only_equals_the_best_is_no_better(tokenizer, tmp_path):
    config = TrainConfig(batch_size=2, max_steps=10, eval_every=1, patience=3)
    progress = train(tiny(tokenizer), tokenizer, RandomExamples([9] * 4), config, out=tmp_path, settings={}, device=CPU,
                     dtype=torch.float32, evaluate=lambda: {"val_loss": 2.0}, sample=lambda: {})
    assert progress.step == 4 and checkpoint.followed(tmp_path / "best").name == "step-000001"


def test_the_last_step_is_evaluated_wherever_the_one_before_was(tokenizer, tmp_path):
    _, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, eval_every=3)
    assert [r["step"] for r in records if "val_loss" in r] == [3, 4]


def test_metrics_and_picture_are_written(tokenizer, tmp_path):
    _, records = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer, eval_every=2)
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "seconds"} <= records[0].keys()
    assert [r["step"] for r in records if "val_loss" in r and r["peak_memory_mb"] > 50] == [2, 4]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_mfu_is_the_share_of_the_peak_that_three_forward_passes_a_token_take(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "product_speed", lambda *args: asked.append(args) or 2.5e9)
    model = tiny(tokenizer, block_size=40)
    _, records = run(model, RandomExamples([9] * 4), tmp_path, tokenizer, dtype=torch.bfloat16, accumulate=2)
    assert asked == [(CPU, torch.bfloat16)]
    # of rows of BLOCK, not of the longest that the model takes; and the head only where it was computed
    flops = 3 * forward_flops(model.config, BLOCK, 9, BLOCK)
    assert flops < 3 * forward_flops(model.config, BLOCK, 9) < 3 * forward_flops(model.config, BLOCK)
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] / BLOCK * flops / 2.5e9, rel=1e-9)


def test_the_speed_of_products_is_their_operations_over_the_median_time(monkeypatch):
    times = iter([0, 9, 0, 2, 0, 2, 0, 2, 0, 1, 0, 1, 0, 50])
    monkeypatch.setattr(runtime, "clock", lambda device: next(times))
    assert product_speed(CPU, torch.float32, 64) == 2 * 64**3 / 2


def test_progress_is_saved_as_it_is(tokenizer, tmp_path):
    progress, _ = run(tiny(tokenizer), RandomExamples([9] * 4), tmp_path, tokenizer)
    state = torch.load(tmp_path / "last" / "resume" / "state.pt", weights_only=True)
    saved = Progress(**state["progress"])
    assert saved.evaluations_since_best == progress.evaluations_since_best - 1  # saved before its evaluation
    assert dataclasses.replace(saved, evaluations_since_best=progress.evaluations_since_best) == progress
    assert set(state["optimizer"]) == {name for name, _ in tiny(tokenizer).named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit_of_a_run(dtype, tokenizer, tmp_path, monkeypatch):
    """With dropout, whose masks are drawn again; and the rehearsal recomputes too."""
    seen, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *batch: seen.append(self.recompute) or forward(self, *batch))
    runs_of_both = []
    for recompute in (False, True):
        model = tiny(tokenizer, dropout=0.2)
        _, records = run(model, RandomExamples([9] * 6), tmp_path / str(recompute), tokenizer, dtype=dtype, recompute=recompute)
        runs_of_both.append((without_times(records), model.state_dict()))
        assert set(seen[-12:]) == {recompute}  # before, the estimate of memory compares both
        seen.clear()
    (records, weights), (others, other_weights) = runs_of_both
    assert records == others and all(torch.equal(w, other_weights[name]) for name, w in weights.items())


def test_training_on_a_pattern_learns_it(tokenizer, tmp_path):
    """Both optimizers bring the loss of a repeating sequence near zero."""
    data = RandomExamples([16] * 2)
    data.inputs = torch.stack([torch.arange(BLOCK), torch.arange(3, BLOCK + 3)]) % 5
    data.targets = (data.inputs + 1) % 5
    for optimizer in ("adamw", "muon"):
        _, records = run(tiny(tokenizer), data, tmp_path / optimizer, tokenizer, optimizer=optimizer, max_steps=60,
                         learning_rate=3e-2)
        assert records[-1]["loss"] < 0.2, optimizer


def test_a_step_of_adamw_and_of_muon_follows_the_published_rule(tokenizer):
    """One step from zero state, by hand: AdamW moves each weight by the rate, Muon a matrix by an
    orthogonal one (G = U S Vᵀ → U Vᵀ) whose root mean square is about 0.2 of the rate, whatever its size."""
    for optimizer in ("adamw", "muon"):
        model = tiny(tokenizer, n_embd=64)
        before = model.h[0].mlp.c_fc.weight.detach().clone()
        table = model.wte.weight.detach().clone()
        built = build_optimizer(model, TrainConfig(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.0))
        model(*RandomExamples([16] * 4).batch(range(4))).backward()
        built.step()
        moved = (model.h[0].mlp.c_fc.weight.detach() - before) / 1e-2
        torch.testing.assert_close((model.wte.weight - table).abs().max().item(), 1e-2, rtol=1e-3, atol=0)
        if optimizer == "adamw":
            assert moved.abs().max() == pytest.approx(1, rel=1e-3)
        else:
            assert moved.pow(2).mean().sqrt() == pytest.approx(0.2, rel=0.2)
            U, _, Vh = torch.linalg.svd(model.h[0].mlp.c_fc.weight.grad, full_matrices=False)
            assert torch.cosine_similarity(moved.flatten(), -(U @ Vh).flatten(), dim=0) > 0.9


def test_planned_steps_take_the_smallest_limit():
    config = TrainConfig(batch_size=4, accumulate=2, max_steps=100, epochs=3)
    assert training.steps_in(config, 1.0, examples=40) == 15
    assert training.steps_in(config, 1.0, examples=41) == 16  # ceil(3 · 41 / 8)
    assert training.steps_in(TrainConfig(max_minutes=1, max_steps=50), 2.0, examples=40) == 30


def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", before=0)
    log.file = open("/dev/full", "w")
    with pytest.raises(InputError, match=r"metrics.jsonl: No space left on device; --resume goes on"):
        log.write(step=1)
    log.close()
