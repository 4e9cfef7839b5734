"""The ways of adapting a GPT beside each other: finetune.py by --method, same start, same conversations, same steps.

    python benchmarks/methods.py --init out/pretrained --steps 1200

Each is a run of finetune.py in a process of its own; the figures are those of its report.json: parameters that
learn, seconds of training, peak memory of the process, the size of a checkpoint, and the perplexity on the test
conversations, with the tokens that end a turn and without them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import ROOT, save

METHODS = {  # each with a rate that suits it; the others' flags are finetune.py's defaults
    "only the new tokens' rows": ["--method", "freeze", "--learn", "0"],
    "LoRA, rank 8": ["--method", "lora", "--learning-rate", "4e-3"],
    "the last two blocks": ["--method", "freeze", "--learn", "2"],
    "full, rate 1e-3": ["--learning-rate", "1e-3"],
    "full, rate 5e-4": ["--learning-rate", "5e-4"],
}


def main() -> None:
    """Run each method; write benchmarks/results/methods-cpu.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="out/pretrained", help="as finetune.py's (default: out/pretrained)")
    parser.add_argument("--data", default="chitchat", help="as finetune.py's (default: chitchat)")
    parser.add_argument("--steps", type=int, default=1200, help="of each (default: 1200)")
    args = parser.parse_args()
    rows = {}
    for name, flags in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"--- {name}", file=sys.stderr)
            command = ["--init", args.init, "--data", args.data, "--max-steps", args.steps, "--out", f"{folder}/run", *flags]
            done = subprocess.run([sys.executable, ROOT / "finetune.py", *map(str, command)])
            if done.returncode:
                sys.exit(done.returncode)
            report = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))
        rows[name] = {"flags": flags, **report["run"], **{key: report["after"][key] for key in ("perplexity", "perplexity_without_end")}}
        rows[name]["perplexity before"] = report["before"]["perplexity"]
    print("| | parameters that learn | seconds | peak memory | a checkpoint | test perplexity | without the end tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        share = row["parameters that learn"] / row["parameters"]
        print(f"| {name} | {row['parameters that learn']:,} ({share:.2%}) | {row['seconds of training']:.0f} | {row['peak memory, MB'] / 1e3:.2f} GB | "
              f"{row['the best checkpoint, MB']:.1f} MB | {row['perplexity']:.1f} | {row['perplexity_without_end']:.1f} |")
    save("methods", torch.device("cuda" if torch.cuda.is_available() else "cpu"), rows, ["torch"])


if __name__ == "__main__":
    main()
