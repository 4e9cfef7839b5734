"""A user's file → records: JSON lines, one JSON array, or a table (CSV, TSV) with named columns.

Conversations and labelled texts come in the same kinds of file. `read` tells the kind by the content
and gives each record with its line, so that whatever is wrong with one can be said with its place.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nanochat import InputError
from nanochat.tokenizer import not_utf8


def read_text(path: str | Path) -> str:
    """A whole text file, its line ends as "\\n"; InputError if it is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line}: has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8")
    return text


def read(path: str | Path) -> Iterator[tuple[int, object]]:
    """(line, record) pairs: a dict, or what stands there instead; a line that cannot be read becomes its InputError.

    A file whose first sign is { or [ is JSON: an object a line, or one array, of which the n-th record counts as
    line n. All else is a table, whose first line names the columns.
    """
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "[") or Path(path).suffix.lower() in (".json", ".jsonl"):
        return read_json_text(text)
    return read_table(text, path)


def read_json_text(text: str) -> Iterator[tuple[int, object]]:
    """The records of one array, an object a line, or one object over several lines."""
    if text.lstrip().startswith("["):
        line, whole = parse(text)
        yield from enumerate(whole, start=1) if isinstance(whole, list) else [(line, whole)]
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and isinstance(parse(lines[0][1])[1], InputError) and isinstance(whole := parse(text)[1], dict):
        lines = [(1, text)]
    yield from ((number, parse(line)[1]) for number, line in lines)


def parse(text: str) -> tuple[int, object]:
    """(line of the error if there is one, the JSON value or the error)."""
    try:
        return 1, json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno, InputError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return 1, InputError(f"not JSON: {error}")


def read_table(text: str, path: str | Path) -> Iterator[tuple[int, object]]:
    """Rows under a line of column names; tabs, else commas or semicolons, whichever that line has more of, part them.

    Quotes are as spreadsheets write them. Only a table of tabs whose every line has as many fields as the first
    is taken as it is: there a quote at the start of a field is part of the text.
    """
    header = text.lstrip("\n").partition("\n")[0]
    sign = "\t" if "\t" in header else max(",;", key=header.count)
    plain = sign == "\t" and all(line.count(sign) == header.count(sign) for line in text.split("\n") if line)
    quoting = {"quoting": csv.QUOTE_NONE} if plain else {"strict": True}
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text), delimiter=sign, **quoting)
    columns: list[str] = []
    line = 1
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, InputError(f"not a table of columns from here on: {error}")
            return
        if not columns and any(fields):
            columns = [name.strip() for name in fields]
            if len(set(columns)) < len(columns) or not all(columns):
                raise InputError(f"{path}, line {line}: columns are {shown(columns)}: each needs a name of its own, in the first line")
        elif any(field.strip() for field in fields):
            same = len(fields) == len(columns)
            yield line, dict(zip(columns, fields)) if same else InputError(
                f"{len(fields)} fields, the first line names {len(columns)} columns: {shown(columns)}")
        line = rows.line_num + 1


def shown(names: list) -> str:
    """Names out of a file, as part of one line."""
    text = ", ".join(" ".join(str(name).split())[:30] for name in names[:8])
    return text + (f", … ({len(names)} in all)" if len(names) > 8 else "")
