"""docs/results.md is what the recorded runs give, and recording a run keeps all others."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

import finetune
import train
from nanochat import InputError, runs
from nanochat.metrics import draw_losses
from nanochat.training import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results_page():
    """benchmarks/results_page.py as a module: benchmarks/ is no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("results_page", ROOT / "benchmarks" / "results_page.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture
def elsewhere(results_page, tmp_path, monkeypatch):
    """The module, with a page and records of its own."""
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    monkeypatch.setattr(results_page, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "docs" / "results.md")
    return results_page


@pytest.fixture
def run_folder(tmp_path, make_model, tokenizer) -> Path:
    """What a run of three steps of train.py would leave, with losses that are known."""
    out = tmp_path / "small"
    out.mkdir()
    settings = json.loads(json.dumps(vars(train.Settings()) | {"training": vars(train.TrainConfig(batch_size=3, max_steps=3))}, default=str))
    conditions = {"device": "cpu", "dtype": "float32", "threads": 1, "processes": 1, "compiled": False}
    lines = [{"step": n, "loss": 7.0 - n, "tokens_per_second": 100.0 * n, "seconds": 2.0 * n} for n in (1, 2, 3)]
    for line, val_loss in zip(lines[1:], (4.5, 4.75)):
        line |= {"val_loss": val_loss, "val_bits_per_byte": val_loss / 2, "samples": {"The river": f" runs {val_loss}"}}
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_losses(out / "metrics.jsonl", out / "loss.png")
    model = make_model(vocab_size=tokenizer.vocab_size)
    for step in (2, 3):
        state = {"progress": {"step": step}, "conditions": conditions}
        runs.save(out, step, model, tokenizer, settings=settings, results={}, resume=state)
        runs.add_results(out, step, {}, best=step == 2)
    return out


def call(module, monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["results_page.py", *map(str, args)])
    module.main()


def test_the_page_is_what_the_stored_runs_give(results_page):
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(results_page.stored())


def test_each_picture_of_the_page_exists_and_each_row_leads_to_its_section(results_page):
    text = results_page.PAGE.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert pictures and all((results_page.PAGE.parent / picture).exists() for picture in pictures)
    assert re.findall(r"\]\(#(.+?)\)", text) == re.findall(r'<a id="(.+?)">', text)


def test_each_recorded_command_parses_to_the_settings_that_write_it(results_page):
    for run in results_page.stored():
        _, script, *args = shlex.split(run["command"])
        settings = {"train.py": train.Settings, "finetune.py": finetune.Settings}[script]
        parsed = tyro.cli(settings, args=args)
        again = results_page.command(json.loads(json.dumps(asdict(parsed), default=str)))
        assert tyro.cli(settings, args=shlex.split(again)[2:]) == parsed


def test_a_recorded_command_keeps_its_zeros(results_page):
    zeros = train.Settings(dropout=0.0, training=TrainConfig(weight_decay=0.0, warmup_steps=0))
    words = results_page.command(json.loads(json.dumps(asdict(zeros), default=str)))
    assert "--dropout 0.0" in words and "--weight-decay 0.0" in words and "--warmup-steps 0" in words


def test_presets_without_a_run_are_named(results_page):
    text = results_page.page([])
    for preset in train.PRESETS:
        assert f"`{preset}`" in text
    assert "`laptop`" not in results_page.page([run for run in results_page.stored() if run["preset"] == "laptop"])


def test_a_run_is_recorded_with_the_figures_of_its_files(elsewhere, run_folder, monkeypatch):
    call(elsewhere, monkeypatch, run_folder)
    [run] = elsewhere.stored()
    assert run["command"] == "python train.py --batch-size 3 --max-steps 3 --optimizer adamw --learning-rate 0.0006"
    assert (run["steps"], run["best_step"], run["seconds"], run["tokens_per_second"]) == (3, 2, 6.0, 200.0)
    assert run["first_loss"] == 6.0 and [point["loss"] for point in run["curve"]] == [5.5, 5.0]
    assert run["samples"] == {"The river": " runs 4.5"}
    text = elsewhere.PAGE.read_text(encoding="utf-8")
    assert "not recorded" in text and "' runs 4.5'" in text
    assert "| 4.500 | 2.250 | not recorded |" in text  # of the best step, not of the last
    assert (elsewhere.PAGE.parent / "results" / f"{elsewhere.file_name(run)}.png").exists()


def test_recording_again_renews_the_row_and_keeps_those_of_other_machines(elsewhere, run_folder, monkeypatch):
    call(elsewhere, monkeypatch, run_folder)
    [run] = elsewhere.stored()
    other = run | {"machine": run["machine"] | {"processor": "Another CPU"}, "seconds": 4321.0}
    (elsewhere.RUNS / f"{elsewhere.file_name(other)}.json").write_text(json.dumps(other), encoding="utf-8")
    call(elsewhere, monkeypatch, run_folder)
    assert sorted(one["seconds"] for one in elsewhere.stored()) == [6.0, 4321.0]
    assert "4,321 s" in elsewhere.PAGE.read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_one_line_and_changes_nothing(elsewhere, run_folder, monkeypatch):
    (run_folder / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="metrics.jsonl"):
        call(elsewhere, monkeypatch, run_folder)
    assert not elsewhere.PAGE.exists()
