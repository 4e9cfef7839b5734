"""A fine-tuned classifier beside TF-IDF and logistic regression: accuracy and macro F1 on the same held-out texts.

    python train.py                                   makes out/pretrained, unless --init names another model
    python benchmarks/classify.py                     the BBC's five sections, three seeds
    python benchmarks/classify.py --data reviews.tsv --epochs 2 -- --optimizer adamw --learning-rate 1e-3

nanochat    finetune.py --task classify, as a user runs it, once for each seed (of the order of texts, label head,
            dropout); its best step by validation loss. Flags after -- go to finetune.py.
TF-IDF      scikit-learn's TfidfVectorizer and LogisticRegression, in which there is no chance. Words or also pairs of
            them, counts or their logarithms, and C: the setting with the best validation accuracy, the first of equals

Both learn from the training split of finetune.py, choose on its validation split, and are measured once on its test
split, a twentieth of the texts: the standard error of an accuracy on so few is printed too. TF-IDF reads whole
texts, the GPT the beginning that fits its block.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))
import record  # noqa: E402

from data import find  # noqa: E402
from nanochat import InputError, classifier, runtime, splits  # noqa: E402
from nanochat.classifier import Labelled  # noqa: E402

FINETUNE = Path(__file__).parent.parent / "finetune.py"
GRID = list(product([1, 2], [False, True], [1.0, 10.0, 100.0]))  # longest run of words; logarithms of counts; C


def main() -> None:
    """Read the flags; run both; print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="out/pretrained", help="checkpoint to start from (default: out/pretrained)")
    parser.add_argument("--data", default="bbc", help="labelled texts, as finetune.py takes them (default: bbc)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the training texts")
    length.add_argument("--minutes", type=float, help="minutes of training instead; neither: finetune.py's default")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: classify-DATA)")
    parser.add_argument("more", nargs="*", metavar="-- FLAGS", help="further flags of finetune.py")
    args = parser.parse_args()
    if args.init == "out/pretrained" and not Path(args.init).exists():
        raise InputError("there is no out/pretrained: python train.py makes it, --init names another checkpoint")
    train, val, test = splits.split(classifier.read(find(args.data))[0])
    if not (train and val and test):
        raise InputError(f"--data {args.data}: too few texts to hold some out")
    texts = {"training": len(train), "validation": len(val), "test": len(test), "labels": classifier.labels_of(train)}
    print(texts, file=sys.stderr)

    linear = tfidf(train, val, test)
    runs = [finetuned(seed, args) for seed in args.seeds]
    error = math.sqrt(linear["accuracy"] * (1 - linear["accuracy"]) / len(test))
    print("\n| | accuracy | macro F1 | validation accuracy | seconds |\n|---|---|---|---|---|")
    for name, found in {"nanochat": runs, "TF-IDF and logistic regression": [linear]}.items():
        cells = [shown([one[key] for one in found]) for key in ("accuracy", "macro_f1", "val_accuracy")]
        print(f"| {name} | {' | '.join(cells)} | {mean(one['seconds'] for one in found):,.0f} |")
    print(f"standard error of an accuracy on {len(test)} texts: {error:.3f}; "
          f"of always saying the commonest label: {runs[0]['majority']:.3f}\n")
    results = {"texts": texts, "standard_error": error, "nanochat": runs, "tfidf": linear}
    name = args.name or f"classify-{Path(args.data).stem}"
    record.save(name, runtime.pick_device(), results, packages=("torch", "scikit-learn"))


def shown(values: list[float]) -> str:
    """Mean ± standard deviation of the seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def tfidf(train: list[Labelled], val: list[Labelled], test: list[Labelled]) -> dict:
    """The setting of GRID that is best on `val`, and what it does on `test`; seconds are those of its own fit."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = classifier.labels_of(train)

    def report(pipeline, split: list[Labelled]) -> dict:
        texts, truth = zip(*split)
        said = pipeline.predict(texts)
        return classifier.report(labels, *([labels.index(label) for label in given] for given in (truth, said)))

    found = []
    for longest, logarithms, C in GRID:
        began = time.perf_counter()
        words = TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=logarithms)
        pipeline = make_pipeline(words, LogisticRegression(C=C, max_iter=2000)).fit(*zip(*train))
        seconds, on_val = time.perf_counter() - began, report(pipeline, val)["accuracy"]
        found.append({"ngram_range": [1, longest], "sublinear_tf": logarithms, "C": C,
                      "val_accuracy": on_val, "seconds": seconds})
        if on_val > max((each["val_accuracy"] for each in found[:-1]), default=-1):
            best, on_test = found[-1], report(pipeline, test)
        print(f"TF-IDF: {found[-1]}", file=sys.stderr)
    return best | {"accuracy": on_test["accuracy"], "macro_f1": on_test["macro_f1"], "grid": found}


def finetuned(seed: int, args: argparse.Namespace) -> dict:
    """One run of finetune.py: what its report says of the best checkpoint, on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        length = {"--epochs": args.epochs, "--max-minutes": args.minutes}
        flags = {"--init": args.init, "--data": args.data, "--seed": seed, "--out": folder} | length
        given = [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]
        command = [sys.executable, str(FINETUNE), "--task", "classify", "--overwrite", *given, *args.more]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise InputError(f"finetune.py failed with seed {seed} (its words are above)")
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run, after = report["run"], report["after"]
    evaluations = {one["step"]: one["val_accuracy"] for one in map(json.loads, lines) if "val_accuracy" in one}
    measures = {key: after[key] for key in ("accuracy", "macro_f1", "majority", "loss", "confusion")}
    return {"seed": seed, **measures, "val_accuracy": evaluations[run["the best step"]], "evaluations": evaluations,
            "best_step": run["the best step"], "steps": run["steps"], "seconds": run["seconds of training"],
            "parameters": run["parameters"], "training": report["settings"]["training"]}


if __name__ == "__main__":
    runtime.run_as_script(main)
