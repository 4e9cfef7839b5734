"""Training runs that one changed line has broken, each beside the right one: curves, held-out losses, samples.

The sources are copied into a temporary folder, one line is replaced there, and a small model is trained as the right one was:
same data, same seed, one core. Then the right code scores both on held-out data. docs/broken.md reads the pictures.

    python benchmarks/broken.py                                  all: docs/broken/*.png, benchmarks/results/broken-cpu.json
    python benchmarks/broken.py --cases shift leak --steps 100   some: pictures in out/broken, nothing is recorded
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from statistics import mean

import record
import torch

sys.path.insert(0, str(record.ROOT))  # for data/, which no package holds

from data import find  # noqa: E402
from nanochat import InputError, checkpoint, classifier, dialogue, evaluate, formats, splits  # noqa: E402
from nanochat.corpus import TokenStream  # noqa: E402
from nanochat.metrics import picture, read_metrics  # noqa: E402
from nanochat.runtime import run_as_script  # noqa: E402

STEPS, BLOCK = 300, 128
RIGHT = {"text": "train.py --n-layer 2 --n-head 2 --n-embd 128 --vocab-size 2048",
         "dropout": "train.py --n-layer 2 --n-head 2 --n-embd 128 --vocab-size 2048 --dropout 0.2",
         "chat": "finetune.py --init ../right-text --data ../chats.jsonl --batch-size 1 --accumulate 8"}
Case = namedtuple("Case", "file old new test beside", defaults=("", "text"))  # the test that catches it; its right run
CASES = {
    "shift": Case("nanochat/corpus.py", "rows[:, 1:].contiguous()", "rows[:, :-1].contiguous()",
                  "tests/test_corpus.py::test_a_batch_is_crops_with_targets_one_token_later"),
    "leak": Case("nanochat/model.py", "causal = mask is None and q.size(-2) > 1", "causal = False",
                 "tests/test_model.py::test_changing_a_token_changes_no_earlier_logit"),
    "rate-high": Case("train.py", "learning_rate=4e-3", "learning_rate=4e-2"),
    "rate-low": Case("train.py", "learning_rate=4e-3", "learning_rate=4e-4"),
    "warmup": Case("nanochat/training.py", "return (step + 1) / (warmup_steps + 1)", "return 1.0",
                   "tests/test_training.py::test_the_schedule_counts_optimizer_steps"),
    "zero-grad": Case("nanochat/training.py", "optimizer.zero_grad(set_to_none=True)", "",
                      "tests/test_training.py::test_training_on_a_pattern_learns_it"),
    "evaluation": Case("nanochat/evaluate.py", "model.eval()", "model.train()",
                       "tests/test_generate.py::test_two_evaluations_are_equal_bit_for_bit", "dropout"),
    "mean-of-means": Case("nanochat/training.py", "max(supervised, 1)", "max(int((batch.targets != IGNORED).sum()), 1) / len(batches)",
                          "tests/test_training.py::test_accumulating_equals_one_batch_of_8_with_uneven_masks", "chat"),
    "padding": Case("nanochat/rows.py", "torch.full((len(rows), T), IGNORED)", "torch.zeros(len(rows), T).long()",
                    "tests/test_dialogue.py::test_targets_are_the_next_ids_of_replies_and_padding_has_none", "chat"),
}


def difference(case: Case) -> str:
    """The line and what it becomes, as the pages show it."""
    old = next(line.strip() for line in (record.ROOT / case.file).read_text(encoding="utf-8").splitlines() if case.old in line)
    new = old.replace(case.old, case.new)
    return f"--- {case.file}\n-{old}" + f"\n+{new}" * bool(new)


def copy(folder: Path, case: Case | None = None) -> Path:
    """The sources in a new folder, with the line of the case replaced; InputError unless it occurs exactly once."""
    folder.mkdir(parents=True)
    for name in "nanochat data tests train.py finetune.py sample.py pyproject.toml".split():  # the tests, to catch the line
        (shutil.copytree if (record.ROOT / name).is_dir() else shutil.copy)(record.ROOT / name, folder / name)
    if case:
        text = (folder / case.file).read_text(encoding="utf-8")
        if text.count(case.old) != 1:
            raise InputError(f"{case.file}: {case.old!r} occurs {text.count(case.old)} times, must be once")
        (folder / case.file).write_text(text.replace(case.old, case.new), encoding="utf-8")
    return folder


def write_conversations(path: Path) -> None:
    """Replies long and short: of each chat the first four messages, and to the beginning of each article its section's name."""
    chats = [messages[:4] for messages in formats.read(find("chitchat"))[0]]
    for text, label in classifier.read(find("bbc"))[0]:
        chats.append([{"role": "user", "content": text[:200]}, {"role": "assistant", "content": label}])
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")


def train(root: Path, beside: str, steps: int, out: Path) -> tuple[list[dict], dict]:
    """Run a script of `root` on one core → its records, and its end: losses, as said by itself and by the right code, and samples."""
    command = (f"{RIGHT[beside]} --out ../{out.name} --block-size {BLOCK} --max-steps {steps} --eval-every {max(1, steps // 6)}"
               " --device cpu --dtype float32 --compile no --keep 1")
    run = subprocess.run([sys.executable, *command.split()], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode:
        raise InputError(f"{out.name}: {run.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    records = read_metrics(out / "metrics.jsonl")
    model, tokenizer = checkpoint.load(out / "last")
    held_out = (dialogue.to_rows(splits.split(formats.read(out.parent / "chats.jsonl")[0])[1], tokenizer, BLOCK) if beside == "chat"
                else TokenStream(next((out.parent / "corpus").iterdir()), "val", tokenizer, BLOCK))
    last = records[-max(1, steps // 10):]  # single steps are too noisy to compare
    end = {"first_step": records[0]["loss"], "training": mean(r["loss"] for r in last), "grad_norm": mean(r["grad_norm"] for r in last),
           "own_held_out": records[-1]["val_loss"], "held_out": evaluate.score(model, tokenizer, held_out.batches(8))["loss"],
           "samples": records[-1]["samples"]}
    print(out.name, json.dumps(end, ensure_ascii=False), flush=True)
    return records, end


def draw(runs: dict[str, tuple[list[dict], dict]], path: Path) -> None:
    """Training losses as lines, what each run says of held-out data as dots, what the right code says of its end as a cross."""
    with picture(path, (7.5, 3)) as axes:
        for (name, (records, end)), colour in zip(runs.items(), ("#1f5fa8", "#d1495b")):
            steps, losses = zip(*((r["step"], r["loss"]) for r in records))
            smooth = [mean(losses[max(0, i - len(losses) // 50): i + 1]) for i in range(len(losses))]
            axes.plot(steps, smooth, color=colour, linewidth=1, label=f"{name}: training")
            own = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
            axes.plot(*zip(*own), "o", color=colour, markersize=4, label=f"{name}: held out, by itself")
            axes.plot(steps[-1], end["held_out"], "x", color=colour, markersize=10, label=f"{name}: held out, by the right code")
        axes.set(xlabel="step", ylabel="loss, nats per target")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def gallery(names: list[str], steps: int, pictures: Path) -> dict[str, dict]:
    """Train what is named, and the right runs beside it; draw a picture of each → the ends of all runs."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_conversations(work / "chats.jsonl")
        sources = copy(work / "right")
        wanted = {"text"} | {CASES[name].beside for name in names}  # from the first the chats start
        right = {beside: train(sources, beside, steps, work / f"right-{beside}") for beside in RIGHT if beside in wanted}
        ends = {f"right-{beside}": end for beside, (_, end) in right.items()}
        for name in names:
            case = CASES[name]
            records, ends[name] = train(copy(work / f"{name}-sources", case), case.beside, steps, work / name)
            draw({"right": right[case.beside], "broken": (records, ends[name])}, pictures / f"{name}.png")
    return ends


def main() -> None:
    """Train the cases and draw them; record the figures if they are all of them, at the usual length."""
    parser = argparse.ArgumentParser(prog="python benchmarks/broken.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default: {STEPS})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = set(args.cases) == set(CASES) and args.steps == STEPS
    ends = gallery(args.cases, args.steps, record.ROOT / ("docs" if whole else "out") / "broken")
    if whole:
        record.save("broken", torch.device("cpu"), ends, ("torch",))


if __name__ == "__main__":
    run_as_script(main)
