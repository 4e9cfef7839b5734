"""Pre-training text: documents (sources.py) → two splits → token shards → crops.

`prepare` runs the whole way once. It writes the cleaned documents to `train.jsonl` and `val.jsonl`
(open them: this is what the model reads), trains a tokenizer on the first if none was given, and
encodes both into shards. `corpus.json` comes last: a folder without it is unfinished and made
anew, one that answers the same request is used at once. A tenth of the documents is held out by a
hash of the title: the same articles on every machine. Where that would hold out nothing, or over a third
of the characters (one large file among few), the last tenth of the whole is held out instead.
`TokenStream` reads the shards as one row of ids: an end-of-text, then every document followed by its
own. Memory is a few MB for any source.

Source: GPT-2 (Radford et al. 2019) for crops that run across documents.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from nanochat import InputError, wordpiece
from nanochat.model import IGNORED, Batch
from nanochat.records import read_json
from nanochat.runtime import run_as_script
from nanochat.sources import documents, fingerprint, json_lines, local, progress_bar
from nanochat.tokenizer import Tokenizer

VERSION = 2  # of the cleaning rules and the shard format; a new number makes old folders anew
HELD_OUT = 0.10  # of the titles
HELD_OUT_MOST = 1 / 3  # of the characters; beyond, the titles are too few for a fair draw
SALT = b"nanochat: "  # chosen once, so that the Wikipedia sample holds out near a tenth of its text too
VOCAB_SIZE = 8_192  # train.py's default: better than 16,384 after five minutes on the Wikipedia sample
TOKENIZER_DOCUMENTS = 100_000  # to learn merges from; more cost hours and hardly move a merge
SHARD_TOKENS = 100_000_000  # 200 MB a file in uint16
HEADER = 512  # bytes before a shard's ids: JSON padded with spaces (`head -c 512` shows it)


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
    source = local(source, folder.parent)
    val_source = val_source and local(val_source, folder.parent)
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
    for path in (Path(text) for text in (source, val_source) if text):
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"{path} lies in {folder}, which will be overwritten: name another")
        if path.is_dir() and path.resolve() in folder.resolve().parents:
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


def folder_for(source: str | Path, val_source: str | Path | None, parent: Path, *, vocab_size: int | None = None,
               tokenizer: Tokenizer | None = None) -> Path:
    """A folder in `parent` for these texts as they are now: another run may be reading the one of the text as it was."""
    texts = [fingerprint(text) for text in (source, val_source) if text is not None]
    request = f"{texts} {tokenizer.hash if tokenizer else vocab_size}"
    return parent / f"{Path(source).name.split('.')[0]}-{sha256(request.encode('utf-8', 'replace')).hexdigest()[:8]}"


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
        rows = torch.from_numpy(np.stack([self.ids(start, start + self.block_size + 1) for start in starts]))  # (B, T + 1)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Fixed windows for evaluation: each token but the first is a target once, in order.

        The last window is padded: end-of-text, target -100.
        """
        last = self.tokens - 1
        for start in range(0, last, batch_size * self.block_size):
            count = min(batch_size * self.block_size, last - start)
            rows = -(-count // self.block_size)
            ids = torch.from_numpy(self.ids(start, start + count + 1))
            inputs = torch.full((rows * self.block_size,), self.end_of_text)
            targets = torch.full((rows * self.block_size,), IGNORED)
            inputs[:count], targets[:count] = ids[:-1], ids[1:]
            yield Batch(inputs.view(rows, -1), targets.view(rows, -1))

    def ids(self, start: int, stop: int) -> np.ndarray:
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
        """→ (characters of each split, titles of the second)."""
        characters = {"train": 0, "val": 0}
        held_out: list[str] = []
        files = {split: open(folder / f"{split}.jsonl", "wb") for split in characters}
        with files["train"], files["val"]:
            for split, title, text in rows:
                if text.strip():
                    line = json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n"
                    files[split].write(line.encode("utf-8"))
                    characters[split] += len(text)
                    if split == "val":
                        held_out.append(title)
        return characters, list(dict.fromkeys(held_out))  # each once, in order

    characters, held_out = write(by_title())
    total = sum(characters.values())
    if not val_source and not 0 < characters["val"] <= HELD_OUT_MOST * total:  # too few titles
        characters, held_out = write(last_tenth(round(total * (1 - HELD_OUT))))
    if 0 in characters.values():
        raise InputError(f"{source}: {characters} characters, but both splits need text; give more")
    return held_out


def _write_shards(folder: Path, split: str, tokenizer: Tokenizer) -> dict:
    """Encode `split`.jsonl into shards that end where a document ends; return the sums, and SHA-256 of the ids."""
    header: dict = {"magic": "nanochat tokens", "version": VERSION, "vocab_size": tokenizer.vocab_size}
    header["dtype"] = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    header["tokenizer_hash"] = tokenizer.hash
    total, digest = Counter(documents=0, bytes=0, tokens=0), sha256()
    with progress_bar(f"encoding {split}", (folder / f"{split}.jsonl").stat().st_size) as bar:
        stream = _texts(folder / f"{split}.jsonl")
        for number in count():
            sums = Counter(documents=0, bytes=0, tokens=0)
            with open(folder / f"{split}-{number:05}.bin", "wb") as shard:
                shard.write(b" " * HEADER)
                while sums["tokens"] < SHARD_TOKENS and (texts := list(islice(stream, 16))):
                    ids = [] if total["tokens"] + sums["tokens"] else [tokenizer.end_of_text]
                    for document in tokenizer.encode_batch(texts):
                        ids += [*document, tokenizer.end_of_text]
                    shard.write(data := np.array(ids, header["dtype"]).tobytes())
                    digest.update(data)
                    size = sum(len(text.encode("utf-8")) for text in texts)
                    sums.update(documents=len(texts), bytes=size, tokens=len(ids))
                    bar.set_postfix(tokens=total["tokens"] + sums["tokens"], refresh=False)
                    bar.update(size)
                shard.seek(0)
                shard.write(json.dumps(header | sums).encode("ascii").ljust(HEADER))
            total.update(sums)
            if not texts:
                break
    return {**total, "sha256": digest.hexdigest()}


def _texts(path: Path) -> Iterator[str]:
    """The documents of a split, as _write_splits left them."""
    with open(path, "rb") as file:
        yield from (text for _, text in json_lines(file, path.name))


def _manifest(folder: Path, any_version: bool = False) -> dict:
    """corpus.json; InputError if it is damaged. Of another version, if asked for, only "request" is certain."""
    path = folder / "corpus.json"
    if not path.exists():
        raise InputError(f"{folder} has no corpus.json: not prepared, or not to the end")
    about = read_json(path)
    request = about.get("request")
    version = request.get("version") if isinstance(request, dict) else None
    if version == VERSION:
        whole = all(isinstance(sums, dict) and type(sums.get("tokens")) is int and isinstance(sums.get("sha256"), str)
                    for sums in (about.get("train"), about.get("val")))
    else:
        whole = any_version and version is not None
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


def main() -> None:
    """Prepare a folder of shards from the command line."""
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
        tokenizer = Tokenizer.gpt2() if args.tokenizer == "gpt2" else wordpiece.load(Path(args.tokenizer))
    prepare(args.source, args.folder, vocab_size=args.vocab_size, tokenizer=tokenizer,
            val_source=args.val_data, workers=args.workers)


if __name__ == "__main__":
    run_as_script(main)
