"""kdconv: 4,500 Chinese conversations of two people about films, music and travel, as dialogues to fine-tune on.

KdConv (Zhou et al., ACL 2020; github.com/thu-coai/KdConv, Apache-2.0) is in no package: download it, and
convert your copy. A conversation has 19 lines or so; the first speaker is taken as the user. KdConv's
train and dev become one file, since finetune.py holds out its own validation; its test stays apart.

    git clone https://github.com/thu-coai/KdConv
    python data/kdconv.py KdConv         writes data/kdconv.train.jsonl and data/kdconv.test.jsonl
    python finetune.py --data kdconv     takes the first of them
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from nanochat import InputError
from nanochat.records import not_utf8
from nanochat.runtime import run_as_script

DOMAINS = ("film", "music", "travel")
SPLITS = {"train": ("train", "dev"), "test": ("test",)}  # ours: KdConv's
DOWNLOAD = "get it with git clone https://github.com/thu-coai/KdConv (or from there as a zip)"
HERE = Path(__file__).parent


def prepare() -> Path:
    """The path of the converted training file; InputError says how to make it."""
    path = HERE / "kdconv.train.jsonl"
    if not path.exists():
        raise InputError(f"kdconv is not converted yet: {DOWNLOAD}, then run python data/kdconv.py KdConv")
    return path


def convert(source: Path, out: Path) -> dict[Path, int]:
    """Write one {"messages": […]} a line for each split; → how many each file has. Both files change, or none.

    source: the clone of KdConv, or its folder data. Raises InputError naming the file that is missing or odd.
    """
    source = source / "data" if (source / "data").is_dir() else source
    if not (source / DOMAINS[0]).is_dir():
        raise InputError(f"{source}: no KdConv in this folder, whose data has {', '.join(DOMAINS)}; {DOWNLOAD}")
    found = {}
    for ours, theirs in SPLITS.items():
        files = [source / domain / f"{split}.json" for domain in DOMAINS for split in theirs]
        found[ours] = [messages for path in files for messages in read(path)]
    counts = {}
    for split, conversations in found.items():
        path = out / f"kdconv.{split}.jsonl"
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
        path.with_suffix(".part").write_text("".join(lines), encoding="utf-8")
        counts[path] = len(lines)
    for path in counts:
        path.with_suffix(".part").replace(path)
    return counts


def read(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of one file of KdConv that have a reply; the speakers take turns."""
    if not path.is_file():
        raise InputError(f"{path}: missing; {DOWNLOAD}")
    try:
        dialogues = json.loads(path.read_bytes().decode("utf-8-sig"))
        talks = [[message["message"].strip() for message in dialogue["messages"]] for dialogue in dialogues]
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; {DOWNLOAD}") from None
    except (TypeError, KeyError, AttributeError):
        shape = '{"messages": [{"message": text}, …]}'
        raise InputError(f"{path}: must be a list of {shape}, as in KdConv; {DOWNLOAD}") from None
    roles = ("user", "assistant")
    return [[{"role": roles[i % 2], "content": said} for i, said in enumerate(talk)] for talk in talks if len(talk) > 1]


def main() -> None:
    """Convert a copy of KdConv, and print what was written."""
    parser = argparse.ArgumentParser(prog="python data/kdconv.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your copy of KdConv, which has data/film/train.json and more")
    parser.add_argument("--out", type=Path, default=HERE, help="where the two files go (default: beside this script)")
    args = parser.parse_args()
    for path, count in convert(args.folder, args.out).items():
        print(f"{path}: {count:,} conversations")
    print("next: python finetune.py --data kdconv")


if __name__ == "__main__":
    run_as_script(main)
