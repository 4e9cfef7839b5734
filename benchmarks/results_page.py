"""docs/results.md: what runs of the three scripts took and gave, so that a reader can tell whether their own is normal.

    python benchmarks/results_page.py out/pretrained out/finetuned     record these runs, and write the page
    python benchmarks/results_page.py                                  write the page again

A run is recorded on the machine that trained it: its figures come from metrics.jsonl, nanochat.json, resume/state.pt and
report.json of the run folder, into benchmarks/results/runs/NAME-MACHINE.json. The page is written from all files there,
so the rows of other machines stay; the same name on the same machine renews its row.
"""

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean, median

from PIL import Image
from record import ROOT, machine

sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import train  # noqa: E402
from nanochat import InputError, checkpoint, runtime  # noqa: E402
from nanochat.generate import SampleConfig  # noqa: E402
from nanochat.metrics import read_metrics  # noqa: E402
from nanochat.records import read_json  # noqa: E402
from nanochat.report import code, table  # noqa: E402
from nanochat.resume import flat  # noqa: E402

RUNS = ROOT / "benchmarks" / "results" / "runs"
PAGE = ROOT / "docs" / "results.md"
MEASURES = ("perplexity", "bits_per_byte", "accuracy", "macro_f1")
SMOOTH = 50  # steps over whose training losses a mean is taken


def recorded(folder: Path, note: str = "") -> dict:
    """The figures of a run folder, ready for JSON; InputError for a folder without a finished run. note: what its command does not say."""
    metrics, best = read_metrics(folder / "metrics.jsonl"), checkpoint.locate(folder)
    evaluated = [number for number, line in enumerate(metrics) if "val_loss" in line]
    if not evaluated or not (best / "resume" / "state.pt").exists():
        raise InputError(f"{folder}: no run with an evaluation; it needs metrics.jsonl and a step with resume/state.pt")
    about, conditions = read_json(best / "nanochat.json"), checkpoint.read_tensors(best / "resume" / "state.pt")["conditions"]
    report = read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    model, _ = checkpoint.load(folder)
    here = machine(runtime.pick_device(conditions["device"]), [])
    losses = [line["loss"] for line in metrics]
    return {
        "name": folder.resolve().name,
        "command": command(about["settings"]),
        "note": note,
        "preset": about["settings"].get("preset"),
        "date": str(date.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)),
        "machine": {
            **{name: here[name] for name in ("processor", "memory_gb", "python")},
            **{name: conditions[name] for name in ("device", "dtype", "threads", "processes", "compiled")},
            "torch": about["versions"]["torch"],
        },
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            **{name: getattr(model.config, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")},
        },
        "steps": metrics[-1]["step"],
        "best_step": about["step"],
        "seconds": metrics[-1]["seconds"],
        "tokens_per_second": median(line["tokens_per_second"] for line in metrics),
        "peak_memory_mb": max((line["peak_memory_mb"] for line in metrics if "peak_memory_mb" in line), default=None),
        "first_loss": losses[0],
        "curve": [
            {"step": metrics[i]["step"], "loss": mean(losses[max(0, i + 1 - SMOOTH) : i + 1])}
            | {name: metrics[i].get(name) for name in ("val_loss", "val_bits_per_byte")}
            for i in evaluated
        ],
        "test": {when: measures(report.get(when)) for when in ("before", "after")},
        "samples": next(line["samples"] for line in metrics if line["step"] == about["step"]),
    }


def measures(result: dict | None) -> dict | None:
    """Of what report.json says of a model, the figures that the page shows."""
    return result and {name: result[name] for name in MEASURES if name in result}


def command(settings: dict) -> str:
    """The command line with these settings: what differs from the defaults."""
    fine = "task" in settings
    defaults = finetune.Settings() if fine else train.PRESETS[settings["preset"]]
    usual = flat(json.loads(json.dumps(asdict(defaults), default=str)))
    words = ["python", "finetune.py" if fine else "train.py"]
    if settings.get("preset", "laptop") != "laptop":
        words += ["--preset", settings["preset"]]
    for name, value in flat(settings).items():
        if name not in ("resume", "overwrite") and value is not None and value is not False and value != usual.get(name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def place(run: dict) -> str:
    """A run's processor and threads in a few words."""
    threads = f", {run['machine']['threads']} threads" if run["machine"]["device"] == "cpu" else f" × {run['machine']['processes']}"
    return run["machine"]["processor"] + threads.replace(" 1 threads", " 1 thread")


def file_name(run: dict) -> str:
    """pretrained-amd-epyc-2-threads"""
    return re.sub(r"[^\w]+", "-", f"{run['name']} {place(run)}".lower()).strip("-")


def page(runs: list[dict]) -> str:
    """docs/results.md."""
    rows = [["run", "machine", "parameters", "steps", "training", "tokens/s", "first loss", "best validation loss", "bits per byte", "memory", "date"]]
    for run in runs:
        best = min(run["curve"], key=lambda point: point["val_loss"])
        rows.append([
            f"[{run['name']}](#{file_name(run)})", place(run), f"{run['model']['parameters']:,}", f"{run['steps']:,}",
            f"{run['seconds']:,.0f} s", f"{run['tokens_per_second']:,.0f}", f"{run['first_loss']:.2f}",
            f"{best['val_loss']:.3f}", number(best["val_bits_per_byte"]), memory(run), run["date"],
        ])
    missing = [name for name in train.PRESETS if name not in {run["preset"] for run in runs}]
    parts = [
        "# Results: what a run takes, and what it gives",
        "Recorded runs, one a row. `benchmarks/results_page.py` writes this page from the run folders; do not edit it. "
        "Loss is in nats a target; bits per byte are of the validation text at the best step, in the precision of the run. "
        "Seconds are of training, without evaluations and saves; tokens/s is the median of the steps.",
        table(rows),
        "Presets of `train.py` that have not been run, so that there are no figures for them: "
        f"{', '.join(f'`{name}`' for name in missing) or 'none'}.",
        "To add a run of yours: `python benchmarks/results_page.py out/pretrained`, on the machine that trained it.",
        "## Is my curve normal?",
        "The first loss of a new model is near ln V, that of guessing: 9.01 for 8,192 ids, 10.82 for GPT-2's 50,257. It falls "
        "fast while the commonest tokens are learned, then slowly; training loss wavers from step to step (the tables below "
        f"have means of {SMOOTH} steps) and drops where an epoch begins, since the text is then known. Fine-tuning begins at "
        "what the pre-trained model makes of a format that it has not seen. Validation loss that rises while training loss "
        "falls is overfitting: the best step is kept.",
    ]
    for run in runs:
        parts += [f'<a id="{file_name(run)}"></a>', f"## {run['name']}: {place(run)}", *details(run)]
    return "\n\n".join(parts) + "\n"


def details(run: dict) -> list[str]:
    """The section of one run."""
    where, model = run["machine"], run["model"]
    curve = [["step", "training loss", "validation loss", "bits per byte"], ["1", f"{run['first_loss']:.3f}", "–", "–"]]
    curve += [[f"{point['step']:,}", *map(number, (point["loss"], point["val_loss"], point["val_bits_per_byte"]))] for point in run["curve"]]
    found = [
        code(run["command"]),
        *([run["note"]] if run.get("note") else []),
        f"{run['date']}, {place(run)}, {where['memory_gb']} GB, {where['dtype']}{', compiled' * where['compiled']}, "
        f"torch {where['torch']}, Python {where['python']}. {model['n_layer']} layers × {model['n_embd']}, {model['n_head']} heads, "
        f"{model['vocab_size']:,} ids, block {model['block_size']:,}: {model['parameters']:,} parameters. "
        f"{run['steps']:,} steps in {run['seconds']:,.0f} s; peak memory: {memory(run)}. Best step: {run['best_step']:,}.",
        table(curve),
    ]
    before, after = run["test"]["before"] or {}, run["test"]["after"]
    if after:
        rows = [[name.replace("_", " "), number(before.get(name)), number(value)] for name, value in after.items()]
        held_out = "--val-data, which also chose the best step" if "--val-data" in run["command"] else "the test split"
        found.append(table([[f"on {held_out}, fp32", "before", "after"], *rows]))
    samples = list(run["samples"].items())[:5]
    how = "greedily" if run["preset"] is None else f"at temperature {SampleConfig().temperature}"
    return [
        *found,
        f"![Loss](results/{file_name(run)}.png)",
        f"What the best step says, {how}:",
        code("\n".join(f"{prompt[:80] + ' …' * (len(prompt) > 80)!r} → {text!r}" for prompt, text in samples)),
    ]


def memory(run: dict) -> str:
    """Of the process, or of a GPU's tensors, at most."""
    return f"{run['peak_memory_mb'] / 1e3:.2f} GB" if run["peak_memory_mb"] else "not recorded"


def number(value: float | None) -> str:
    """With as many digits as say something."""
    return "–" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def stored() -> list[dict]:
    """All recorded runs: pre-training first, then by name."""
    runs = [read_json(path) for path in RUNS.glob("*.json")]
    return sorted(runs, key=lambda run: (run["preset"] is None, file_name(run)))


def main() -> None:
    """Record run folders, and write docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="as train.py and finetune.py leave them in --out")
    parser.add_argument("--note", default="", help="what the command of the run does not say, for instance of its data")
    args = parser.parse_args()
    for run, folder in [(recorded(folder, args.note), folder) for folder in args.folders]:
        name = file_name(run)
        for target in (RUNS, PAGE.parent / "results"):
            target.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(RUNS / f"{name}.json", run)
        Image.open(folder / "loss.png").convert("RGB").quantize(32).save(PAGE.parent / "results" / f"{name}.png", optimize=True)
        print(f"recorded {name}")
    PAGE.write_text(page(stored()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    runtime.run_as_script(main)
