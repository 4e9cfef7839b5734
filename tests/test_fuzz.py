"""Fuzzing: whatever is done to a file, its reader gives a result, or InputError or OSError in one line.

    pytest -m slow tests/test_fuzz.py                                   about 5 seconds a reader
    NANOCHAT_FUZZ_SECONDS=600 pytest -m slow tests/test_fuzz.py         10 minutes a reader

A case is made from its seed alone. A failure prints the seed, with which NANOCHAT_FUZZ_SEED=… begins
the next time, and the folder with the changed files.
"""

import bz2
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_corpus import ARTICLE, GARDEN, dump, jsonl, page
from torch import Tensor

from nanochat import InputError, checkpoint, corpus, formats, sources, splits
from nanochat.dialogue import to_rows
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

SECONDS = float(os.environ.get("NANOCHAT_FUZZ_SECONDS", 0))  # for each reader, in place of its number of cases
SEED = int(os.environ.get("NANOCHAT_FUZZ_SEED", 0))  # of the first case
LINE = 2_000  # characters that a message may have: config.json may hold a dozen unknown fields
HANGS = 20  # seconds that no reader may take, as all files are small
MEMORY = 8 * 2**30  # bytes of addresses more than at the start: a size read from a file must not be believed

TINY = Tokenizer.train(["to be or not to be " * 20], 320).for_chat()


# what is read: each writes valid files into a folder, and returns what reads them


def dialogues(name: str, text: str) -> Callable:
    def write(folder: Path) -> Callable:
        (folder / name).write_text(text, encoding="utf-8")

        def read():
            conversations, problems = formats.read(folder / name)
            assert not [problem for problem in problems if len(problem.splitlines()) != 1]
            rows = to_rows([c for part in splits.split(conversations) for c in part], TINY, 24)
            assert len(list(rows.batches(8))) and rows.fingerprint

        return read

    return write


def texts(*names: str) -> Callable:
    pages = [page("Lake", ARTICLE), page("Redirect", "", redirect="<redirect/>"), page("中", "'''中'''国[[湖]]")]
    writers = {".xml": lambda path: dump(path, *pages), ".bz2": lambda path: dump(path, *pages),
               ".jsonl": lambda path: jsonl(path, 5), ".txt": lambda path: shutil.copy(GARDEN, path)}

    def write(folder: Path) -> Callable:
        for name in names:
            writers[Path(name).suffix](folder / name)
        return lambda: list(sources.documents(folder if len(names) > 1 else folder / names[0], workers=1))

    return write


def prepared(folder: Path) -> Callable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_TOKENS", 200)
        corpus.prepare(jsonl(folder / "stories.jsonl", 40), folder / "corpus", tokenizer=TINY)

    def read():
        corpus.prepare(folder / "corpus", folder / "unused")
        for split in ("train", "val"):
            stream = corpus.TokenStream(folder / "corpus", split, TINY, 16)
            assert max(int(batch.inputs.max()) for batch in stream.batches(4)) < TINY.vocab_size
        corpus.prepare(folder / "stories.jsonl", folder / "corpus", tokenizer=TINY)  # used, or made anew

    return read


def tokenizer_json(folder: Path) -> Callable:
    TINY.save(folder)
    return lambda: round_trip(Tokenizer.load(folder))


def merges_txt(folder: Path) -> Callable:
    TINY._hugging_face().model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_bytes())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": len(vocab) + 1}), encoding="utf-8")
    return lambda: round_trip(Tokenizer.load(folder))


def round_trip(tokenizer: Tokenizer) -> None:
    text = "to be, 中国 <|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def weights(name: str) -> Callable:
    def write(folder: Path) -> Callable:
        config = GPTConfig(vocab_size=TINY.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=4)
        checkpoint.write_hugging_face(folder, GPT(config), TINY)
        tensors = checkpoint.read_tensors(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if name == "model.safetensors.index.json":
            shards = {f"model-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
            for shard, part in shards.items():
                save_file(part, folder / shard)
            index = {"metadata": {}, "weight_map": {key: shard for shard, part in shards.items() for key in part}}
            (folder / name).write_text(json.dumps(index), encoding="utf-8")
        else:
            (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)
        return lambda: checkpoint.load(folder)[0](torch.tensor([[1, 2, 3]]))

    return write


def nanogpt(folder: Path) -> Callable:
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 4, "vocab_size": 50257}
    state = {name: p.detach() for name, p in GPT(GPTConfig(**shape)).named_parameters() if not name.endswith("bias")}
    content = {"model": {f"_orig_mod.transformer.{name}": p for name, p in state.items()},
               "model_args": shape | {"bias": False, "dropout": 0.0}, "iter_num": 5, "config": {"out_dir": "out"}}
    torch.save(content, folder / "ckpt.pt")

    def read():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tokenizer, "gpt2", cache(Tokenizer.gpt2))  # a third of a second each time
            checkpoint.load(folder / "ckpt.pt")[0](torch.tensor([[1, 2, 3]]))

    return read


MESSAGES = [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), ("Be 中.", "a", "b c"))]
SHAREGPT = {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "to be"}]}
RECORDS = [{"messages": MESSAGES}, SHAREGPT, {"messages": MESSAGES[1:] * 9}]
READERS = {  # with the cases that each takes, on any machine: some 5 seconds' on a calm one
    "dialogue .jsonl": (2_500, dialogues("talk.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS))),
    "dialogue .json": (5_000, dialogues("talk.json", json.dumps(RECORDS, indent=1))),
    "dialogue .txt": (1_000, dialogues("talk.txt", "Hi\nto be\nor not\n\n你好\n你好。\n\n" * 3)),
    "corpus .txt": (5_000, texts("book.txt")),
    "corpus .jsonl": (3_000, texts("stories.jsonl")),
    "corpus .xml": (800, texts("wiki.xml")),
    "corpus .xml.bz2": (1_000, texts("wiki.xml.bz2")),
    "corpus folder": (500, texts("a.txt", "b.jsonl", "c.xml", "d.xml.bz2")),
    "corpus prepared": (200, prepared),
    "tokenizer.json": (1_500, tokenizer_json),
    "merges.txt": (2_000, merges_txt),
    "model.safetensors": (1_000, weights("model.safetensors")),
    "pytorch_model.bin": (700, weights("pytorch_model.bin")),
    "model.safetensors.index.json": (600, weights("model.safetensors.index.json")),
    "nanoGPT's ckpt.pt": (120, nanogpt),
}


# what is done to them: bytes, random → bytes


def place(data: bytes, r: random.Random) -> tuple[int, int]:
    """Where a change begins and ends: short mostly, and anywhere."""
    start = r.randrange(len(data) + 1)
    return start, min(len(data), start + r.choice([1, 2, 8, 100, 10_000]))


def put(new: bytes) -> Callable:
    return lambda data, r: data[: (at := place(data, r)[0])] + new + data[at:]


def flip_a_bit(data, r):
    at = r.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]


def lines_shuffled(data, r):
    lines = data.splitlines(keepends=True)
    r.shuffle(lines)
    return b"".join(lines[: r.randint(1, len(lines) + 1)])


NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"9" * 30, b"9" * 5_000, b"0.5", b"18446744073709551616", b"true"]
BYTES = [
    flip_a_bit,
    lines_shuffled,
    lambda data, r: data[: place(data, r)[0]],  # truncated
    lambda data, r: data[: (at := place(data, r))[0]] + data[at[1] :],  # deleted
    lambda data, r: data[: (at := place(data, r))[1]] + data[at[0] :],  # doubled
    lambda data, r: data[: (at := place(data, r))[0]] + r.randbytes(at[1] - at[0]) + data[at[1] :],
    lambda data, r: data[: place(data, r)[0]] + data[place(data, r)[0] :],  # spliced with itself
    lambda data, r: r.randbytes(r.choice([0, 1, 10, 1_000])),
    lambda data, r: put(r.choice(NUMBERS))(data, r),
    lambda data, r: data.replace(r.choice(b"0123456789").to_bytes(), r.choice(NUMBERS), r.choice([1, 2, -1])),
    lambda data, r: b"\xef\xbb\xbf" + data,
    lambda data, r: data.decode("utf-8", "replace").encode(r.choice(["utf-16", "utf-16-le", "utf-32", "gbk"]), "replace"),
    lambda data, r: data.replace(b"\n", r.choice([b"\r\n", b"\r", b"", b"\0", b"\xe2\x80\xa8"])),
    *map(put, [b"\0", b"\xff\xfe", b"\\ud800", b"\\u0000", b"[" * 3_000, b'{"a":' * 3_000, b"{{x|" * 200, b"[[" * 500,
               b"{|\n" * 200, b"<ref>" * 500, b"<a>" * 3_000, b"&amp;" * 99, b"x" * 300_000, b" " * 300_000, b"\n" * 3_000]),
]

# and to what a file means: JSON, the header of a shard or of a .safetensors, a pickle


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


VALUES = [None, True, 0, -1, 0.5, 2**31, 2**63, 2**64, 10**4000, 1e308, float("nan"), float("inf"), "", "0", "x" * 99_999,
          "\ud800", "\0", "a\nb", "../../x", "/etc/passwd", [], {}, [[]], [None], {"": {}}, nested(150), "中" * 999]
TENSORS = [lambda w: w.double(), lambda w: w.int(), lambda w: w[:0], lambda w: w.t() if w.dim() == 2 else w[None], lambda w: w * torch.nan,
           lambda w: w.to_sparse(), lambda w: w.to(torch.complex64), lambda w: w.sum(), lambda w: w.bool()]


def swap_a_value(tree, r: random.Random):
    """The tree with one node of it replaced, removed, renamed or put elsewhere."""
    if isinstance(tree, Tensor) and r.random() < 0.7:
        return r.choice(TENSORS)(tree)
    if not isinstance(tree, dict | list) or not tree or r.random() < 0.1:
        return r.choice(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, other = r.choice(keys), r.choice(keys)
    what = r.random()
    if what < 0.7:
        tree[key] = swap_a_value(tree[key], r)
    elif what < 0.8:
        del tree[key]
    elif what < 0.9:
        tree[key] = tree[other]
    elif isinstance(tree, dict):
        tree[r.choice(["", "\ud800", "x", key + "x", "\0", other])] = tree.pop(key)
    else:
        tree.insert(key, r.choice(VALUES))
    return tree


def change_the_meaning(name: str, data: bytes, r: random.Random) -> bytes:
    """Raises some error where the file is of no such kind, or is damaged already."""
    if name.endswith(".json"):
        return json.dumps(swap_a_value(json.loads(data), r)).encode("ascii")
    if name.endswith(".jsonl"):
        lines = swap_a_value([json.loads(line) for line in data.splitlines()], r)
        return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
    if name.endswith(".safetensors"):
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(swap_a_value(json.loads(data[8:size]), r)).encode("ascii")
        return len(header).to_bytes(8, "little") + header + data[size:]
    if name.endswith((".pt", "model.bin")):
        file = io.BytesIO()
        torch.save(swap_a_value(torch.load(io.BytesIO(data), weights_only=True), r), file)
        return file.getvalue()
    header = json.dumps(swap_a_value(json.loads(data[: corpus.HEADER]), r)).encode("ascii")  # of a shard
    return header.ljust(corpus.HEADER) + data[corpus.HEADER :]


def changed(name: str, data: bytes, r: random.Random) -> bytes:
    if name.endswith(".bz2") and r.random() < 0.7:
        return bz2.compress(changed("", bz2.decompress(data), r))
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        try:
            data = change_the_meaning(name, data, r) if r.random() < 0.5 else r.choice(BYTES)(data, r)
        except Exception:  # not JSON, no more a pickle, empty: take another
            data = r.choice(BYTES)(data or b"{}", r)
    return data


# the harness


class Hang(BaseException):
    """No reader can take it for its own error."""


def alarm(*_):
    raise Hang(f"more than {HANGS} s")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_changed_file_is_read_or_refused_in_one_line(reader, tmp_path, capfd):
    whole, case = tmp_path / "whole", tmp_path / "case"
    whole.mkdir()
    cases, write = READERS[reader]
    write(whole)()  # as it is, it is read
    before = signal.signal(signal.SIGALRM, alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    outcomes, deadline = {"read": 0, "refused": 0}, time.monotonic() + SECONDS
    try:
        for seed in count(SEED):
            if time.monotonic() > deadline if SECONDS else seed == SEED + cases:
                break
            r = random.Random(f"{reader} {seed}")
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            read = write(case)
            files = [path for path in sorted(case.rglob("*")) if path.is_file()]
            for path in r.sample(files, min(len(files), r.choice([1, 1, 1, 2]))):
                path.write_bytes(changed(path.name, path.read_bytes(), r))
            signal.setitimer(signal.ITIMER_REAL, HANGS)
            try:
                read()
                outcome = "read"
            except (InputError, OSError) as error:
                line = str(error)
                if len(line.splitlines()) != 1 or len(line) > LINE:
                    raise AssertionError("not one line of a bearable length") from error
                if not any(name in line for name in (str(case), *(path.name for path in files))):
                    raise AssertionError("names no file") from error
                outcome = "refused"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes[outcome] += 1
            capfd.readouterr()
    except BaseException as error:  # a panic of Rust code is one
        kept = tmp_path / "failed"
        case.rename(kept)
        lines = [line[:200] for part in traceback.format_exception(error, limit=-4) for line in part.splitlines()]
        pytest.fail("\n".join([f"{reader}: NANOCHAT_FUZZ_SEED={seed}, files in {kept}", *lines[-40:]]), pytrace=False)
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with capfd.disabled():
        print(f"\n{reader}: {outcomes}", end=" ")
    assert all(outcomes.values())
