"""Pre-training text: a Wikipedia dump, plain text or JSONL → documents → token shards → crops.

`prepare` runs the whole way once. It writes the cleaned documents to `train.jsonl` and `val.jsonl`
(open them: this is what the model reads), trains a tokenizer on the first if none was given, and
encodes both into shards. `corpus.json` comes last: a folder without it is unfinished and made
anew, one that answers the same request is used at once. A tenth of the documents is held out by a
hash of the title: the same articles on every machine. Where that would hold out nothing, or over a third
of the characters (one large file among few), the last tenth of the whole is held out instead.
`TokenStream` reads the shards as one row of ids: an end-of-text, then every document followed by its
own. Memory is a few MB for any source.

Sources: GPT-2 (Radford et al. 2019) for crops that run across documents; wikitext.py cleans.
"""

import argparse
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from itertools import chain, count, islice
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
import torch
from tqdm import tqdm

from nanochat import InputError, wikitext
from nanochat.model import IGNORED, Batch
from nanochat.runtime import run_as_script
from nanochat.tokenizer import Tokenizer, not_utf8, read_json

VERSION = 2  # of the cleaning rules and the shard format; a new number makes old folders anew
HELD_OUT = 0.10  # of the titles
HELD_OUT_MOST = 1 / 3  # of the characters; beyond, the titles are too few for a fair draw
SALT = b"nanochat: "  # chosen once, so that the Wikipedia sample holds out near a tenth of its text too
VOCAB_SIZE = 8_192  # train.py's default: better than 16,384 after five minutes on the Wikipedia sample
TOKENIZER_DOCUMENTS = 100_000  # to learn merges from; more cost hours and hardly move a merge
SHARD_TOKENS = 100_000_000  # 200 MB a file in uint16
HEADER = 512  # bytes before a shard's ids: JSON padded with spaces (`head -c 512` shows it)
PIECE = 1 << 16  # bytes read at a time, and the length at which a text file is cut
ALONE = 200  # articles cleaned in this process before others are started, which takes a second
QUEUE = 256  # articles in flight: enough for 64 processes, some 10 MB
SUFFIXES = (".txt", ".md", ".jsonl", ".xml", ".bz2")  # of the files that a folder is searched for


def prepare(
    source: str | Path,
    folder: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    val_source: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """Turn `source` into token shards, the tokenizer's files and a manifest, all in `folder`.

    source, val_source: what `documents` takes; with `val_source` nothing of `source` is held out;
    a `source` that was prepared earlier is returned as it is
    vocab_size: train a tokenizer of this size (default 8,192) on the training split, or
    tokenizer: use this one
    workers: processes that clean Wikipedia articles, default one a CPU core
    Returns the folder. Raises InputError for an unusable source or one too small for two splits.
    Call it from one process (rank 0) and under `if __name__ == "__main__"`: workers are spawned.
    """
    if (Path(source) / "corpus.json").exists():
        if val_source:
            raise InputError(f"{source} was prepared with its own held-out text; leave out --val-data")
        _manifest(Path(source))
        return Path(source)
    if tokenizer and vocab_size is not None:
        raise InputError(f"give a tokenizer or --vocab-size {vocab_size}, not both")
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}, must be at least 1")
    vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
    Tokenizer.train([], vocab_size)  # refuses a bad size now, not in an hour
    folder = Path(folder)
    source, val_source = _local(source, folder.parent), val_source and _local(val_source, folder.parent)
    request = {
        "version": VERSION,
        "source": fingerprint(source),
        "val_source": val_source and fingerprint(val_source),
        "tokenizer": tokenizer.hash if tokenizer else f"own, {vocab_size} ids",
    }
    manifest = folder / "corpus.json"
    if manifest.exists() and _manifest(folder, any_version=True)["request"] == request:
        print(f"{folder}: already prepared from {source}")
        return folder
    for path in filter(None, (source, val_source)):
        if folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise InputError(f"{path} lies in {folder}, which will be overwritten: name another")
        if Path(path).is_dir() and Path(path).resolve() in folder.resolve().parents:
            raise InputError(f"{folder} lies in {path}, which is being read: put --out elsewhere")

    folder.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)  # first to go and last to come: without it, no corpus
    for old in (*folder.glob("train-*.bin"), *folder.glob("val-*.bin")):
        old.unlink()
    held_out = _write_splits(source, val_source, folder, workers)
    if tokenizer is None:
        texts = islice(_texts(folder / "train.jsonl"), TOKENIZER_DOCUMENTS)
        tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(folder)
    sums = {split: _write_shards(folder, split, tokenizer) for split in ("train", "val")}
    about = {"request": request, "tokenizer_hash": tokenizer.hash, **sums, "held_out": held_out}
    partial = folder / "corpus.json.part"
    partial.write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, manifest)
    for split in sums:
        print(f"{split}: " + ", ".join(f"{sums[split][what]:,} {what}" for what in ("documents", "bytes", "tokens")))
    print(f"held out {len(held_out):,}: {', '.join(held_out[:4])}{' …' if held_out[4:] else ''}")
    return folder


class TokenStream:
    """One split of a prepared folder as a row of ids, cut into crops of `block_size` = T.

    Crops run across document boundaries, as in GPT-2's training. Ids are read from the file when
    asked for: pages of a memory map would count as this process's memory, up to the whole corpus.
    `fingerprint` is the SHA-256 of all ids of the split as they were written.
    Raises InputError for a folder that is unfinished, damaged, made with another tokenizer, or
    (training split) too short for one crop.
    """

    def __init__(self, folder: str | Path, split: str, tokenizer: Tokenizer, block_size: int):
        folder = Path(folder)
        about = _manifest(folder)[split]
        self.folder, self.vocab_size, self.end_of_text = folder, tokenizer.vocab_size, tokenizer.end_of_text
        self.block_size, self.fingerprint = block_size, about["sha256"]
        self.shards = [(path, _header(path)) for path in sorted(folder.glob(f"{split}-*.bin"))]
        for path, header in self.shards:
            if header["tokenizer_hash"] != tokenizer.hash:
                ids = f"{header['vocab_size']:,} ids, hash {header['tokenizer_hash'][:12]}"
                mine = f"{tokenizer.vocab_size:,} ids, hash {tokenizer.hash[:12]}"
                raise InputError(f"{path}: its tokenizer ({ids}) is not the model's ({mine})")
        self.starts = np.cumsum([0] + [header["tokens"] for _, header in self.shards])
        self.tokens = int(self.starts[-1])  # including the end-of-text tokens
        if self.tokens != about["tokens"]:
            raise InputError(
                f"{folder}: {split} shards hold {self.tokens:,} tokens of {about['tokens']:,}; "
                f"delete corpus.json and prepare again"
            )
        if split == "train" and not len(self):
            needed = f"one crop of --block-size {block_size} needs {block_size + 1}"
            raise InputError(f"{folder}: {self.tokens} training tokens, {needed}; give more text")

    def __len__(self) -> int:
        return (self.tokens - 1) // self.block_size

    def batch(self, indices: Sequence[int]) -> Batch:
        """The crops `indices`: inputs (B, T), and targets (B, T) one token later, int64."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"crops {list(indices)}: this stream has 0 … {len(self) - 1}")
        starts = [index * self.block_size for index in indices]
        rows = np.stack([self._ids(start, start + self.block_size + 1) for start in starts])
        rows = torch.from_numpy(rows)  # (B, T + 1)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Fixed windows for evaluation: each token but the first is a target once, in order.

        The last window is padded: end-of-text, target -100.
        """
        last = self.tokens - 1
        for start in range(0, last, batch_size * self.block_size):
            count = min(batch_size * self.block_size, last - start)
            rows = -(-count // self.block_size)
            ids = torch.from_numpy(self._ids(start, start + count + 1))
            inputs = torch.full((rows * self.block_size,), self.end_of_text)
            targets = torch.full((rows * self.block_size,), IGNORED)
            inputs[:count], targets[:count] = ids[:-1], ids[1:]
            yield Batch(inputs.view(rows, -1), targets.view(rows, -1))

    def _ids(self, start: int, stop: int) -> np.ndarray:
        """Ids start … stop - 1 of the row, int64, from as many shards as they lie in."""
        parts = []
        for (path, header), first in zip(self.shards, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, header["tokens"])
            if low < high:
                offset = HEADER + low * np.dtype(header["dtype"]).itemsize
                parts.append(np.fromfile(path, header["dtype"], high - low, offset=offset))
        ids = np.concatenate(parts).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise InputError(
                f"{self.folder}: damaged: id {ids.max()} near token {start:,}, but the tokenizer has "
                f"{self.vocab_size:,} ids; delete corpus.json and prepare again"
            )
        return ids


# ---- splits and shards --------------------------------------------------------------------------


def is_held_out(title: str) -> bool:
    """Whether a title is among the tenth kept for validation: its salted SHA-256 decides."""
    digest = sha256(SALT + title.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _write_splits(source, val_source, folder: Path, workers: int | None) -> list[str]:
    """Write `train.jsonl` and `val.jsonl`; return the titles in the second."""

    def by_title() -> Iterator[tuple[str, str, str]]:
        for title, text in documents(source, workers=workers):
            yield "val" if not val_source and is_held_out(title) else "train", title, text
        for title, text in documents(val_source, workers=workers) if val_source else ():
            yield "val", title, text

    def last_tenth(left: int) -> Iterator[tuple[str, str, str]]:
        for title, text in documents(source, workers=workers):
            cut = min(left, len(text))
            left -= cut
            if cut < len(text):  # back to a line break, if there is one near
                cut = text.rfind("\n", cut // 2, cut) + 1 or cut
            yield "train", title, text[:cut]
            yield "val", title, text[cut:]

    def write(rows: Iterable[tuple[str, str, str]]) -> tuple[dict[str, int], list[str]]:
        characters, held_out = {"train": 0, "val": 0}, {}  # the second an ordered set
        files = {split: open(folder / f"{split}.jsonl", "wb") for split in characters}
        with files["train"], files["val"]:
            for split, title, text in rows:
                if text.strip():
                    line = json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n"
                    files[split].write(line.encode("utf-8"))
                    characters[split] += len(text)
                    held_out |= {title: None} if split == "val" else {}
        return characters, list(held_out)

    characters, held_out = write(by_title())
    total = sum(characters.values())
    if not val_source and not 0 < characters["val"] <= HELD_OUT_MOST * total:  # too few titles
        characters, held_out = write(last_tenth(round(total * (1 - HELD_OUT))))
    if 0 in characters.values():
        raise InputError(f"{source}: {characters} characters, but both splits need text; give more")
    return held_out


def _write_shards(folder: Path, split: str, tokenizer: Tokenizer) -> dict[str, int]:
    """Encode `split`.jsonl into shards that end where a document ends; return the sums, and SHA-256 of the ids."""
    header = {"magic": "nanochat tokens", "version": VERSION, "vocab_size": tokenizer.vocab_size}
    header["dtype"] = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    header["tokenizer_hash"] = tokenizer.hash
    total, digest = {"documents": 0, "bytes": 0, "tokens": 0}, sha256()
    with _bar(f"encoding {split}", (folder / f"{split}.jsonl").stat().st_size) as bar:
        stream = _texts(folder / f"{split}.jsonl")
        for number in count():
            sums = dict.fromkeys(total, 0)
            with open(folder / f"{split}-{number:05}.bin", "wb") as shard:
                shard.write(b" " * HEADER)
                while sums["tokens"] < SHARD_TOKENS and (texts := list(islice(stream, 16))):
                    ids = [] if total["tokens"] + sums["tokens"] else [tokenizer.end_of_text]
                    for document in tokenizer.encode_batch(texts):
                        ids += [*document, tokenizer.end_of_text]
                    shard.write(data := np.array(ids, header["dtype"]).tobytes())
                    digest.update(data)
                    size = sum(len(text.encode("utf-8")) for text in texts)
                    for key, n in zip(sums, (len(texts), size, len(ids)), strict=True):
                        sums[key] += n
                    bar.set_postfix(tokens=total["tokens"] + sums["tokens"], refresh=False)
                    bar.update(size)
                shard.seek(0)
                shard.write(json.dumps(header | sums).encode("ascii").ljust(HEADER))
            total = {key: total[key] + sums[key] for key in total}
            if not texts:
                return total | {"sha256": digest.hexdigest()}


def _manifest(folder: Path, any_version: bool = False) -> dict:
    """corpus.json; InputError if it is damaged. Of another version, if asked for, only "request" is certain."""
    path = folder / "corpus.json"
    if not path.exists():
        raise InputError(f"{folder} has no corpus.json: not prepared, or not to the end")
    about = read_json(path)
    version = request.get("version") if isinstance(request := about.get("request"), dict) else None
    splits = [sums for sums in (about.get("train"), about.get("val")) if isinstance(sums, dict)]
    kinds = [(type(sums.get("tokens")), type(sums.get("sha256"))) for sums in splits]
    whole = kinds == [(int, str)] * 2 if version == VERSION else any_version and version is not None
    if not whole:
        raise InputError(f"{path} is damaged or of another version: delete it and prepare again")
    return about


def _header(path: Path) -> dict:
    """The header of a shard: vocab_size, dtype, tokenizer_hash; documents, bytes and tokens in it."""
    with open(path, "rb") as shard:
        head = shard.read(HEADER)
    try:
        header = json.loads(head) if head.startswith(b'{"magic": "nanochat tokens"') else {}
    except ValueError:
        header = {}
    kinds = [type(header.get(key)) for key in ("vocab_size", "tokens", "tokenizer_hash")]
    sound = kinds == [int, int, str] and header["tokenizer_hash"].isalnum() and header.get("dtype") in ("<u2", "<u4")
    if header.get("version") != VERSION or not sound:
        raise InputError(f"{path} is no shard of version {VERSION}, or damaged: delete corpus.json and prepare again")
    size = HEADER + header["tokens"] * np.dtype(header["dtype"]).itemsize
    if path.stat().st_size != size:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}: delete corpus.json and prepare again")
    return header


# ---- sources ------------------------------------------------------------------------------------


def documents(source: str | Path, *, workers: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of every document with text in `source`, in order, a few MB at a time.

    source is told by what it is: a MediaWiki dump (XML, also .bz2); a text file, titled by its name
    and cut at line breaks into documents of 64 kB if longer; JSONL with `text` and maybe `title`;
    a folder of such files; an http(s) URL of one (kept in the working directory); or a Hugging
    Face data set, `owner/name` or `owner/name:config`: its split "train", column `text`.
    Raises InputError naming file and line. A progress bar is on stderr after two seconds.
    """
    source = Path(_local(source, Path()))
    files, found = _files(source), 0
    top = source if source.is_dir() else source.parent
    with _bar(f"reading {source.name}", sum(path.stat().st_size for path in files)) as bar:
        readers = [_read_file(path, top, workers, bar) for path in files] or [_read_hub(source)]
        for title, text in chain(*readers):
            if text.strip():
                found += 1
                bar.set_postfix(documents=found, refresh=False)
                # to UTF-8 and back: half a surrogate pair, possible in JSON, becomes "?"
                yield tuple(part.encode("utf-8", "replace").decode("utf-8") for part in (title, text))
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
            if not head:
                raise InputError(f"{path} is empty")
            if b"\0" in head:
                raise InputError(f"{path}: has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8")
            if re.match(rb"(<\?xml[^>]*>\s*)?<mediawiki", head):
                pairs = _wikipedia(file, workers)
            elif suffix == ".xml":
                raise InputError(f"{path} is no MediaWiki dump: it starts with {head[:40]!r}")
            else:
                pairs = (_json_lines if suffix.startswith(".json") else _plain_text)(file, name)
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


def _plain_text(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
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


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
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
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            seen = reprlib.repr(list(record)) if isinstance(record, dict) else type(record).__name__
            raise InputError(f'{where}: must be an object whose "text" is a string, not {seen}')
        title = record.get("title")
        yield str(title) if title and isinstance(title, (str, int)) else where, record["text"]


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
    yield from _json_lines((json.dumps(row, default=str).encode("ascii") for row in rows), str(source))


def _wikipedia(file: BinaryIO, workers: int | None) -> Iterator[tuple[str, str]]:
    """The cleaned articles of a dump: namespace 0, no redirects, no disambiguation pages."""
    articles = wikitext.articles(file)
    for title, markup in islice(articles, ALONE if workers != 1 else None):
        yield title, wikitext.clean(markup)
    # "spawn", since a forked copy of a process with threads (torch, tokenizers) may hang. A queue,
    # since Executor.map would read the whole dump before the first result.
    context, queue = multiprocessing.get_context("spawn"), deque()
    pool = ProcessPoolExecutor(workers or os.cpu_count(), context, _follow_parent)
    try:
        for title, markup in articles:
            with _interrupts_wait():
                queue.append((title, pool.submit(wikitext.clean, markup)))
            if len(queue) == QUEUE:
                title, text = queue.popleft()
                yield title, text.result()
        for title, text in queue:
            yield title, text.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back; processes started in here inherit that, so it stops this one only."""
    if os.name == "nt":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- small parts --------------------------------------------------------------------------------


def _local(source: str | Path, folder: Path) -> str | Path:
    """`source`, or the file in `folder` to which this URL was downloaded, now or earlier."""
    if not re.match("https?://", str(source)):
        return source
    file = Path(urllib.parse.urlparse(source).path).name or "download"
    target = folder / f"{sha256(str(source).encode()).hexdigest()[:8]}-{file}"  # two sites may use one file name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    request = urllib.request.Request(source, headers={"User-Agent": "nanochat-gpt2"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, open(partial, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with _bar(f"downloading {target.name}", size) as bar:
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


def _records(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        yield from _json_lines(file, path.name)


def _texts(path: Path) -> Iterator[str]:
    return (text for _, text in _records(path))


def _bar(what: str, size: int) -> tqdm:
    return tqdm(total=size or None, desc=what, unit="B", unit_scale=True, delay=2)


def main() -> None:
    parser = argparse.ArgumentParser("python -m nanochat.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="Wikipedia dump, text, JSONL, folder, URL or owner/name")
    parser.add_argument("folder", help="where shards, tokenizer and manifest go")
    parser.add_argument("--val-data", help="held-out text; default: a tenth of the titles of SOURCE")
    parser.add_argument("--vocab-size", type=int, help=f"of a new tokenizer, default {VOCAB_SIZE:,}")
    parser.add_argument("--tokenizer", help="instead of a new one: gpt2, or a folder that has one")
    parser.add_argument("--workers", type=int, help="processes that clean, default: one a CPU core")
    args = parser.parse_args()
    tokenizer = None
    if args.tokenizer:
        tokenizer = Tokenizer.gpt2() if args.tokenizer == "gpt2" else Tokenizer.load(Path(args.tokenizer))
    prepare(args.source, args.folder, vocab_size=args.vocab_size, tokenizer=tokenizer,
            val_source=args.val_data, workers=args.workers)


if __name__ == "__main__":
    run_as_script(main)
