"""Where text comes from: a Wikipedia dump, text files, JSONL, a folder, a URL, a data set of the hub → documents.

`documents` reads any of them as (title, text), a few MB at a time. wikitext.py cleans the articles of a dump,
in as many processes as there are cores.
"""

import bz2
import json
import multiprocessing
import os
import re
import reprlib
import signal
import threading
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from io import BufferedIOBase
from itertools import chain, islice
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from nanochat import InputError, wikitext
from nanochat.records import not_utf8

PIECE = 1 << 16  # bytes read at a time, and the length at which a text file is cut
ALONE = 200  # articles cleaned in this process before others are started, which takes a second
QUEUE = 256  # articles in flight: enough for 64 processes, some 10 MB
SUFFIXES = (".txt", ".md", ".jsonl", ".xml", ".bz2")  # of the files that a folder is searched for


def documents(source: str | Path, *, workers: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of every document with text in `source`, in order, a few MB at a time.

    source is told by what it is: a MediaWiki dump (XML, also .bz2); a text file, titled by its name
    and cut at line breaks into documents of 64 kB if longer; JSONL with `text` and maybe `title`, or with
    `messages`, whose words are then the text;
    a folder of such files; an http(s) URL of one (kept in the working directory); or a Hugging
    Face data set, `owner/name` or `owner/name:config`: its split "train", column `text`.
    Raises InputError naming file and line. A progress bar is on stderr after two seconds.
    """
    source = Path(local(source, Path()))
    files, found = _files(source), 0
    top = source if source.is_dir() else source.parent
    with progress_bar(f"reading {source.name}", sum(path.stat().st_size for path in files)) as bar:
        readers = [_read_file(path, top, workers, bar) for path in files] or [_read_hub(source)]
        for title, text in chain(*readers):
            if text.strip():
                found += 1
                bar.set_postfix(documents=found, refresh=False)
                # to UTF-8 and back: half a surrogate pair, possible in JSON, becomes "?"
                title, text = (part.encode("utf-8", "replace").decode("utf-8") for part in (title, text))
                yield title, text
    if not found:
        raise InputError(f"{source}: no document with text in it")


def _files(source: str | Path) -> list[Path]:
    """The files of a source; none for a data set on the Hugging Face hub."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path}: no file in this folder ends in {' '.join(SUFFIXES)}")
        return files
    if path.exists():
        return [path]
    if re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]+)?", str(source)) and path.suffix not in SUFFIXES:
        return []
    raise InputError(f"{path}: no such file or folder (nor a URL, nor owner/name of a data set)")


def _read_file(path: Path, top: Path, workers: int | None, bar: tqdm) -> Iterator[tuple[str, str]]:
    # Under LC_ALL=C Python decodes file names as ASCII: take the bytes, titles are UTF-8 everywhere.
    name = os.fsencode(path.relative_to(top).as_posix()).decode("utf-8", "replace")
    suffix = Path(name.removesuffix(".bz2")).suffix
    before = bar.n
    with open(path, "rb") as raw:
        file = bz2.open(raw) if raw.peek(3).startswith(b"BZh") else raw
        try:
            head = file.peek(1000)[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()
            if not file.peek(1):  # an empty file
                return
            if b"\0" in head:
                raise InputError(f"{path}: has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8")
            if re.match(rb"(<\?xml[^>]*>\s*)?<mediawiki", head):
                pairs = _wikipedia(file, workers)
            elif suffix == ".xml":
                raise InputError(f"{path} is no MediaWiki dump: it starts with {head[:40]!r}")
            else:
                pairs = (json_lines if suffix.startswith(".json") else _plain_text)(file, name)
            for pair in pairs:
                bar.update(before + raw.tell() - bar.n)
                yield pair
        except EOFError as error:
            raise InputError(f"{path} ends too early: copy or download it again") from error
        except (ElementTree.ParseError, LookupError) as error:  # LookupError: an unknown encoding
            raise InputError(f"{path}: broken XML, {error}") from error
        except OSError as error:  # bz2 does not name the file
            raise InputError(f"{path}: {error}; copy or download it again") from error
        except BrokenProcessPool as error:
            raise InputError(f"{path}: a process that cleans it died (of memory?); try --workers 1") from error


def _plain_text(file: BufferedIOBase, name: str) -> Iterator[tuple[str, str]]:
    """Pieces of at most 2 · PIECE bytes, cut at a blank line, else a line, else a character."""
    position, line, rest = 0, 1, b""
    while (chunk := file.read(PIECE)) or rest:
        rest += chunk
        cut = len(rest)
        if len(chunk) == PIECE:  # more may come: leave the last, perhaps unfinished, paragraph
            lead = len(rest.rstrip(bytes(range(0x80, 0xC0)))) - 1  # where the last character starts
            cut = rest.rfind(b"\n\n") + 1 or rest.rfind(b"\n") + 1 or max(lead, 1)
        try:
            text = rest[:cut].decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, line, position) from error
        yield name, text.removeprefix("" if position else "\ufeff").replace("\r\n", "\n")
        position, line, rest = position + cut, line + rest.count(b"\n", 0, cut), rest[cut:]


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """(title, text) of each line; one without a title is titled by its file and line."""
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8").removeprefix("\ufeff").rstrip()
            record = json.loads(text) if text else {"text": ""}
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, number) from error
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{where}: not a JSON object ({reason})") from error
        seen = reprlib.repr(list(record)) if isinstance(record, dict) else type(record).__name__
        if not isinstance(record, dict) or not isinstance(said := record.get("text", _said(record)), str):
            raise InputError(f'{where}: must be an object whose "text" is a string, not {seen}')
        title = record.get("title")
        yield str(title) if title and isinstance(title, (str, int)) else where, said


def _said(record: dict) -> str | None:
    """The text of a conversation, as finetune.py takes them, a message a line: its words can be pre-trained on too."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return None
    return "\n".join(message["content"] for message in messages)


def _read_hub(source: Path) -> Iterator[tuple[str, str]]:
    name, _, config = source.as_posix().partition(":")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config or None, split="train", streaming=True)
    except ImportError as error:
        raise InputError(f"{source}: no such file; for a data set, pip install datasets") from error
    except Exception as error:  # theirs are of many kinds: offline, misspelt, gated, no such config
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source}: no such file, and as a data set of the hub: {reason}") from error
    yield from json_lines((json.dumps(row, default=str).encode("ascii") for row in rows), str(source))


def _wikipedia(file: BufferedIOBase, workers: int | None) -> Iterator[tuple[str, str]]:
    """The cleaned articles of a dump: namespace 0, no redirects, no disambiguation pages."""
    articles = wikitext.articles(file)
    for title, markup in islice(articles, ALONE if workers != 1 else None):
        yield title, wikitext.clean(markup)
    # "spawn", since a forked copy of a process with threads (torch, tokenizers) may hang. A queue,
    # since Executor.map would read the whole dump before the first result.
    context = multiprocessing.get_context("spawn")
    queue: deque[tuple[str, Future[str]]] = deque()
    pool = ProcessPoolExecutor(workers or os.cpu_count(), context, _follow_parent)
    try:
        for title, markup in articles:
            with _interrupts_wait():
                queue.append((title, pool.submit(wikitext.clean, markup)))
            if len(queue) == QUEUE:
                title, future = queue.popleft()
                yield title, future.result()
        for title, future in queue:
            yield title, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back; processes started in here inherit that, so it stops this one only."""
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []  # the mask holds for this thread only: another (tqdm has one) may take the signal, and Python passes it on to here
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def local(source: str | Path, folder: Path) -> str | Path:
    """`source`, or the file in `folder` to which this URL was downloaded, now or earlier."""
    url = str(source)
    if not re.match("https?://", url):
        return source
    name = Path(urllib.parse.urlparse(url).path).name or "download"
    target = folder / f"{sha256(url.encode()).hexdigest()[:8]}-{name}"  # two sites may use one file name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat-gpt2"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, open(partial, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with progress_bar(f"downloading {target.name}", size) as bar:
                while chunk := response.read(PIECE):
                    bar.update(file.write(chunk))
                if bar.n < size:
                    raise OSError(f"the connection ended after {bar.n:,} of {size:,} bytes")
    except OSError as error:
        raise InputError(f"{source}: {error}; try again, or download it to a file") from error
    os.replace(partial, target)
    return target


def fingerprint(source: str | Path) -> str:
    """Changes when a file of the source does (path, size, time of change); a URL is its own."""
    if re.match("https?://", str(source)):
        return str(source)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(source)]
    where = Path(source).resolve() if stats else source
    return f"{ascii(str(where))} {sha256(ascii(stats).encode('ascii')).hexdigest()[:16]}"


def progress_bar(what: str, size: int) -> tqdm:
    """Over `size` bytes, 0 if nobody knows; shown after two seconds."""
    return tqdm(total=size or None, desc=what, unit="B", unit_scale=True, delay=2)
