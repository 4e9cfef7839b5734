"""chitchat: 7,168 real conversations between two people, as dialogues to fine-tune on.

Collected by the BYU Perception, Control and Cognition lab (github.com/BYU-PCCL/chitchat-dataset,
MIT licence); the Python package chitchat-dataset carries them. 4,018 have a reply. The second
speaker is taken as the assistant; lines that one person sent in a row are one message, joined by
spaces (joined by line breaks, a small model's likeliest next token is one more line, without end).

    python data/chitchat.py        writes data/chitchat.jsonl and prints how many
"""

import json
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from nanochat import InputError
from nanochat.runtime import run_as_script


def prepare() -> Path:
    """Convert the package's JSON once; → data/chitchat.jsonl, {"messages": […]} a line."""
    converted = Path(__file__).with_suffix(".jsonl")
    if converted.exists():
        return converted
    package = find_spec("chitchat_dataset")  # found, not imported: it opens its file in the locale's encoding
    if package is None:
        raise InputError('chitchat is not installed: pip install -c constraints.txt -e ".[sample]"')
    source = Path(package.submodule_search_locations[0]) / "dataset.json"
    conversations = json.loads(source.read_text(encoding="utf-8")).values()
    partial = converted.with_suffix(".part")
    with open(partial, "w", encoding="utf-8") as file:
        for conversation in conversations:
            lines = [line for turn in conversation["messages"] for line in turn]
            messages = []
            for sender, said in groupby(lines, key=lambda line: line["sender"]):
                role = "user" if sender == lines[0]["sender"] else "assistant"
                messages.append({"role": role, "content": " ".join(line["text"].strip() for line in said)})
            if len(messages) > 1:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    partial.replace(converted)
    return converted


def main() -> None:
    """Convert the sample, and print where it is."""
    path = prepare()
    print(f"{path}: {sum(1 for _ in open(path, encoding='utf-8')):,} conversations with a reply")


if __name__ == "__main__":
    run_as_script(main)
