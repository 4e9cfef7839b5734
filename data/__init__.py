"""Public data sets, one short script each; a script's `prepare()` returns the path of a file."""

import importlib
from pathlib import Path

from nanochat import InputError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def find(data: str) -> str:
    """What --data names: the name of a script here becomes its file; all else stays as it is.

    Raises InputError for a single word that is neither a path nor a name.
    """
    if not data.strip():
        raise InputError("--data is empty")
    if Path(data).exists() or "/" in data or "." in data:
        return data
    if data not in NAMES:
        raise InputError(f"--data {data}: no such file, and no data set of that name; names: {', '.join(NAMES)}")
    return str(importlib.import_module(f"data.{data}").prepare())
