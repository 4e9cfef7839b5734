"""Files of text: UTF-8, or refused with their line. A user's file → records: JSON lines, one JSON array, or a table (CSV, TSV).

Conversations and labelled texts come in the same kinds of file. `read` tells the kind by the content
and gives each record with its line, so that whatever is wrong with one can be said with its place.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanochat import InputError


def not_utf8(path: str | Path, error: UnicodeDecodeError, line: int = 1, byte: int = 0) -> InputError:
    """What to say of a text in another encoding; line, byte: where in the file the failed bytes begin."""
    line += error.object.count(b"\n", 0, error.start)
    guess = "utf-16" if error.object.startswith((b"\xff\xfe", b"\xfe\xff")) else "gbk"
    return InputError(f"{path}, line {line}: not UTF-8 at byte {byte + error.start}; "
                      f"convert it, e.g. iconv -f {guess} -t utf-8")


def read_text(path: str | Path) -> str:
    """A whole text file, its line ends as "\\n"; InputError if it is not UTF-8."""
    try:
        data = Path(path).read_bytes()
        if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
            raise InputError(f"{path}: a spreadsheet or an archive, not text; save it as CSV in UTF-8")
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line}: has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8")
    return text


def read_json(path: Path) -> dict:
    """A JSON file as a dict; InputError naming the file if it is damaged."""
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, found a {type(content).__name__}")
    return content


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

    Quotes are as spreadsheets write them; but where every line has the same number of those signs, and quotes that do
    not make a table of them, a quote is part of the text. InputError if the quotes leave rows in doubt.
    """
    header = text.lstrip("\n").partition("\n")[0]
    sign = "\t" if "\t" in header else max(",;", key=header.count)
    even = all(line.count(sign) == header.count(sign) for line in text.split("\n") if line)
    csv.field_size_limit(sys.maxsize)
    plain = even and not is_quoted_table(text, sign, header.count(sign) + 1)
    quoting = {"quoting": csv.QUOTE_NONE} if plain else {"strict": True}
    rows = csv.reader(io.StringIO(text), delimiter=sign, **quoting)
    columns: list[str] = []
    line = 1
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # nothing after it can be told from text in quotes
            raise InputError(f"{path}, line {line}: a quote that is not closed, or has text beside it ({error}); "
                             'a quote inside a field is written twice ("")') from None
        if not columns and any(fields):
            columns = [name.strip() for name in fields]
            if len(set(columns)) < len(columns) or not all(columns):
                raise InputError(f"{path}, line {line}: columns are {shown(columns)}: each needs a name of its own, in the first line")
        elif any(field.strip() for field in fields):
            if len(fields) != len(columns):
                yield line, InputError(f"{len(fields)} fields, the first line names {len(columns)} columns: {shown(columns)}")
            elif not plain and any(field.startswith(' "') and field.endswith('"') for field in fields):
                yield line, InputError(f'a field begins with a space and a quote, which would be part of its text: leave out the space after "{sign}"')
            else:
                yield line, dict(zip(columns, fields))
        line = rows.line_num + 1


def is_quoted_table(text: str, sign: str, columns: int) -> bool:
    """Whether every row, read with its quotes, has so many fields."""
    try:
        return all(len(row) in (0, columns) for row in csv.reader(io.StringIO(text), delimiter=sign, strict=True))
    except csv.Error:
        return False


def converted(path: str | Path, found: Iterable[tuple[int, object]], convert: Callable, kind: str) -> tuple[list, list[str]]:
    """Records by `convert`, and one line "file:line: reason" for each left out; InputError if that is all of them."""
    usable, problems = [], []
    for line, record in found:
        try:
            if isinstance(record, InputError):
                raise record
            usable.append(convert(record))
        except InputError as error:
            problems.append(f"{path}:{line}: {error}")
    if not usable:
        raise InputError(f"{problems[0] if problems else f'{path}: empty'} (no usable {kind} in the file)")
    return usable, problems


def named(record: dict) -> dict:
    """A record by its names in lower case; InputError if two of them are then one."""
    found = {str(name).strip().lower(): value for name, value in record.items()}
    if len(found) < len(record):
        raise InputError(f"keys are {shown(list(record))}: two of them differ in nothing but case")
    return found


def shown(names: list) -> str:
    """Names out of a file, as part of one line."""
    text = ", ".join(" ".join(str(name).split())[:30] for name in names[:8])
    return text + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def print_left_out(problems: list[str]) -> None:
    """Say on standard error which records of a file are of no use: the first five, each with its reason, and how many."""
    for problem in problems[:5]:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"left out {len(problems)} records in all", file=sys.stderr)


def whole_pairs(text: str) -> str:
    """The text with halves of surrogate pairs joined, or replaced by U+FFFD where alone, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
