"""corpus: cleaning, the held-out split, shards and crops."""

import bz2
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import InputError, corpus, sources, wikitext
from nanochat.corpus import TokenStream, is_held_out, prepare
from nanochat.model import IGNORED
from nanochat.sources import documents
from nanochat.tokenizer import Tokenizer
from nanochat.wikitext import clean

ROOT = Path(__file__).parent.parent
GARDEN = ROOT / "data" / "samples" / "garden.txt"

ARTICLE = """{{Infobox lake|name = Lake Miro|area = {{convert|12|km2}}}}
[[File:Miro.jpg|thumb|The [[lake]] in winter (see [https://example.org note])]]
'''Lake Miro''' ({{IPA|x}}; {{lang|fr|lac Miro|links=no}}) is a [[freshwater lake|lake]] {{convert|5|to|7|km|mi}} long.<ref
name="a">Some book</ref> Its water is {{small|often {{nowrap|very cold}}}}, 4&nbsp;{{snd}} 9&nbsp;°C.<!-- check -->

== History ==
=== Early years ===
* The ''first'' boat came in 1701<ref name="a" />; it held 10<sup>3</sup> barrels, H<sub>2</sub>O and {{cite|x}}
* [http://example.org A map] shows it.
{| class="wikitext"
! Year !! Boats
|-
| 1701 || {| nested
|}
|}
== Empty ==
{{main|Nothing}}
== See also ==
* [[Lake Other]]
=== Deeper ===
* more
== Today ==
{{quote|The lake is ours.|A. Fisher}}
Boats &amp; birds.

== References ==
{{reflist}}
[[Category:Lakes]]
[[fr:Lac Miro]]
"""

CLEANED = """Lake Miro (lac Miro) is a lake 5 to 7 km long. Its water is often very cold, 4 – 9 °C.

Early years
The first boat came in 1701; it held 10^3 barrels, H2O and
A map shows it.

Today
The lake is ours.
Boats & birds."""


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{text}</text></revision></page>"


def dump(path: Path, *pages: str) -> Path:
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    data = xml.encode("utf-8")
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else data)
    return path


def jsonl(path: Path, count: int = 60) -> Path:
    lines = [
        {"title": f"Story {i}", "text": f"Story {i}: the fox met {i} hens. 狐狸 🦊\n\nThe end."} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(jsonl(folder / "stories.jsonl"), folder / "corpus", vocab_size=320)


def row(stream: TokenStream) -> list[int]:
    return stream.ids(0, stream.tokens).tolist()


# cleaning


def test_an_article_becomes_its_prose():
    assert clean(ARTICLE) == CLEANED


def test_cleaning_clean_text_changes_nothing():
    assert clean(CLEANED) == CLEANED


def test_chinese_markup_becomes_simplified_chinese_prose():
    wikitext = "'''米罗湖'''（{{lang|en|Lake Miro}}）是-{zh-tw:電腦;zh-cn:电脑;}-湖。-{H|zh-cn:甲;zh-tw:乙}-\n[[分类:湖泊]]\n== 参考资料 ==\n* 书"
    assert clean(wikitext) == "米罗湖（Lake Miro）是电脑湖。"


def test_brackets_that_are_never_closed_lose_only_themselves():
    assert clean("One [[two. {{three. Four]] five.") == "One two. three. Four five."


HOSTILE = [" ", ", ", "=", "= ", "\n", "{{x|", "[[", "{|\n", "<ref>", "-{H|", "{{x|}}", "<small>"]


@pytest.mark.parametrize("debris", HOSTILE)
def test_repeated_debris_costs_no_more_than_seconds(tmp_path, debris):
    wikitext = ARTICLE + "\n== a (" + debris * (30_000 // len(debris)) + "}}" * 3_000 + "b\n" + ARTICLE
    start = time.monotonic()
    clean(wikitext)
    assert len(list(documents(dump(tmp_path / "a.xml", page("a", "{{" + wikitext))))) == 1
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["lakes.xml", "lakes.xml.bz2", "lakes.bz2"])
def test_a_dump_gives_articles_only(tmp_path, name):
    path = dump(
        tmp_path / name,
        page("Lake Miro", ARTICLE),
        page("Miro", "#REDIRECT [[Lake Miro]]", redirect='<redirect title="Lake Miro" />'),
        page("Old redirect", "#redirect [[Lake Miro]]"),
        page("Miro (disambiguation)", "Miro is a lake or a name.\n{{disambiguation}}"),
        page("Talk:Lake Miro", "I like it.", namespace=1),
        page("Fox", "A fox. {{disambiguation needed|date=May}} {{About|the animal|others|Fox (disambiguation)}}"),
    )
    assert list(documents(path)) == [("Lake Miro", CLEANED), ("Fox", "A fox.")]


def test_cleaning_in_spawned_processes_gives_the_same_articles_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ALONE", 1)
    monkeypatch.setattr(sources, "QUEUE", 3)  # shorter than the dump: results leave while others enter
    path = dump(tmp_path / "lakes.xml", *(page(f"Lake {i}", f"'''Lake {i}'''\n{ARTICLE}") for i in range(9)))
    alone = list(documents(path, workers=1))
    assert len(alone) == 9 and alone == list(documents(path, workers=2))


DEBRIS = (
    "{{", "}}", "[[", "]]", "thumb|", "Category:", "File:", "ISBN", "http", "''", "()", "( ,", "  ", "\n\n\n", "&nbsp;",
    "<ref", "</", "<br", "\0",
)


@pytest.fixture(scope="module")
def articles() -> dict[str, str]:
    pytest.importorskip("gensim", reason="pip install the [sample] extra")
    from data.wikipedia import prepare as wikipedia

    return dict(documents(wikipedia()))


def test_the_real_fragment_is_cleaned_without_debris(articles):
    assert len(articles) == 98  # of 206 pages 100 are redirects, 8 tell homonyms apart
    assert 2_700_000 < sum(map(len, articles.values())) < 2_900_000
    found = {mark: sum(mark in text for text in articles.values()) for mark in DEBRIS}
    assert found == dict.fromkeys(DEBRIS, 0)
    assert sum(text.count("|") for text in articles.values()) <= 3  # two are in ASCII's prose about "|"
    assert not [line for text in articles.values() for line in text.split("\n") if re.match(r"[*#:;!|]", line)]


def test_cleaning_keeps_the_words_that_mwparserfromhell_keeps(articles):
    parser = pytest.importorskip("mwparserfromhell")
    from data.wikipedia import prepare as wikipedia

    with bz2.open(wikipedia()) as file:
        markup = dict(wikitext.articles(file))
    for title in ("Andre Agassi", "Aikido", "Abacus"):
        prose = [p for p in markup[title].split("\n") if re.match(r"[A-Z'][^{}<>|]{200,}$", p)]
        for paragraph in prose:  # without templates and footnotes, where the two differ on purpose
            theirs = Counter(re.findall(r"\w+", parser.parse(paragraph).strip_code()))
            assert not theirs - Counter(re.findall(r"\w+", articles[title])), paragraph
        assert len(prose) > 2


# sources


def test_a_long_text_file_is_cut_at_line_breaks_and_loses_nothing(tmp_path):
    text = GARDEN.read_text(encoding="utf-8") * 150  # 250 kB
    (tmp_path / "long.txt").write_text("\ufeff" + text, encoding="utf-8", newline="\r\n")
    pieces = list(documents(tmp_path / "long.txt"))
    assert len(pieces) > 2 and {title for title, _ in pieces} == {"long.txt"}
    assert "".join(piece for _, piece in pieces) == text
    assert all(piece.endswith("\n") for _, piece in pieces)


def test_a_text_without_line_breaks_is_cut_between_characters(tmp_path):
    text = "湖🦊" * 50_000
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    pieces = [piece for _, piece in documents(tmp_path / "line.txt")]
    assert len(pieces) > 2 and "".join(pieces) == text


def test_a_folder_is_read_in_order_with_paths_as_titles(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "二.md").write_text("two", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "b" / "empty.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": " "}\n{"title": "T", "text": "four"}', "utf-8")
    expected = [("a.txt", "one"), ("b/二.md", "two"), ("c.jsonl, line 1", "three"), ("T", "four")]
    assert list(documents(tmp_path)) == expected


def test_a_file_that_begins_with_a_thousand_blank_lines_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("\n" * 1200 + "text", "utf-8")
    (tmp_path / "b.jsonl").write_text(" " * 1200 + '{"text": "more"}', "utf-8")
    assert [text.strip() for _, text in documents(tmp_path)] == ["text", "more"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "no document with text in it"),
        ("blank.txt", b" \n \n", "no document with text in it"),
        ("gbk.txt", "ok\n中文".encode("gbk"), "gbk.txt, line 2: not UTF-8 at byte 3; convert it, e.g. iconv -f gbk -t utf-8"),
        ("bom.txt", b"\xef\xbb\xbf\n\xff", "bom.txt, line 2: not UTF-8 at byte 4"),
        ("late.txt", b"a line\n" * 20_000 + b"\xff", "late.txt, line 20001: not UTF-8 at byte 140000"),
        ("wide.txt", "text".encode("utf-16"), "has zero bytes, so it is not UTF-8; convert it, e.g. iconv -f utf-16 -t utf-8"),
        ("宽.txt", "中文".encode("utf-16"), "line 1: not UTF-8 at byte 0; convert it, e.g. iconv -f utf-16 -t utf-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', "a.jsonl, line 2: not a JSON object (Expecting value at column 10)"),
        ("b.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "b.jsonl, line 2: must be an object whose \"text\""),
        ("deep.jsonl", b"[" * 99_999, "deep.jsonl, line 1: not a JSON object (maximum recursion depth exceeded"),
        ("digits.jsonl", b'{"text": ' + b"9" * 5_000 + b"}", "digits.jsonl, line 1: not a JSON object (Exceeds"),
        ("c.jsonl", b'["text"]\n', "c.jsonl, line 1: must be an object"),
        ("d.jsonl", b'{"text": "\xd6\xd0"}\n', "d.jsonl, line 1: not UTF-8 at byte 10"),
        ("e.xml", b"<html><p>no</p></html>", "no MediaWiki dump"),
        ("f.xml", b"<mediawiki><page><title>a</tit", "broken XML"),
        ("u.xml", b'<?xml version="1.0" encoding="klingon"?><mediawiki></mediawiki>', "broken XML, unknown encoding"),
        ("h.xml.bz2", b"BZh9" + bytes(99), "Invalid data stream; copy or download it again"),
        ("g.xml.bz2", bz2.compress(b"<mediawiki>" + os.urandom(9_000).hex().encode())[:-900], "ends too early"),
    ],
)
def test_unusable_files_stop_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        list(documents(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_sources_stop_with_the_name(tmp_path):
    for source in (tmp_path / "none.txt", "data/none.txt", "nothing"):
        with pytest.raises(InputError, match="no such file or folder"):
            list(documents(source))
    with pytest.raises(InputError, match="no file in this folder ends in .txt"):
        list(documents(tmp_path))


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d y"}', encoding="utf-8")
    assert list(documents(tmp_path / "a.jsonl")) == [("a.jsonl, line 1", "x? y")]


# the held-out split


def test_held_out_titles_are_the_same_on_every_machine():
    held_out = [title for title in (f"Title {i}" for i in range(40)) if is_held_out(title)]
    assert held_out == ["Title 2", "Title 4", "Title 26", "Title 32", "Title 39"]  # a change moves articles that models were trained on
    assert is_held_out("Algeria") and not is_held_out("Anarchism") and not is_held_out("中国")
    assert 900 < sum(is_held_out(str(i)) for i in range(10_000)) < 1_100


def test_the_order_of_the_documents_does_not_change_the_split(prepared, tmp_path):
    lines = (prepared.parent / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    other = prepare(tmp_path / "other.jsonl", tmp_path / "corpus", vocab_size=320)
    titles = [sorted(json.loads((f / "corpus.json").read_text("utf-8"))["held_out"]) for f in (prepared, other)]
    assert titles[0] == titles[1] and 0 < len(titles[0]) < 20
    val = [json.loads(line)["title"] for line in (prepared / "val.jsonl").read_text("utf-8").splitlines()]
    train = [json.loads(line)["title"] for line in (prepared / "train.jsonl").read_text("utf-8").splitlines()]
    assert sorted(val) == titles[0] and not set(val) & set(train) and len(val + train) == 60


@pytest.mark.parametrize("times", [1, 200])  # one document; many pieces of one file
def test_a_single_text_holds_out_its_last_tenth(tmp_path, times):
    text = GARDEN.read_text(encoding="utf-8") * times
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.train([text], 320)
    folder = prepare(tmp_path / "book.txt", tmp_path / "corpus", tokenizer=tokenizer)
    head, tail = (tokenizer.decode(i for i in row(TokenStream(folder, split, tokenizer, 8)) if i != tokenizer.end_of_text)
                  for split in ("train", "val"))
    assert head + tail == text and head.endswith("\n")
    assert 0.05 < len(tail) / len(text) < 0.25


def test_one_large_file_among_few_is_not_held_out_whole(tmp_path):
    sizes = {"Title 0": 300, "Title 2": 9_000, "Title 1": 300}  # the title of the largest is among the tenth
    assert [is_held_out(title) for title in sizes] == [False, True, False]
    lines = [json.dumps({"title": title, "text": "to be or not\n" * (size // 13)}) for title, size in sizes.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = Tokenizer([])
    prepare(tmp_path / "a.jsonl", tmp_path / "corpus", tokenizer=tokenizer)
    parts = {split: [text for _, text in documents(tmp_path / "corpus" / f"{split}.jsonl")] for split in ("train", "val")}
    whole = [text for _, text in documents(tmp_path / "a.jsonl")]
    assert "".join(parts["train"] + parts["val"]) == "".join(whole)  # the last tenth of the whole
    assert 0.05 < sum(map(len, parts["val"])) / sum(map(len, whole)) < 0.15
    lines[1] = json.dumps({"title": "Title 2", "text": "to be or not\n" * 20})  # less than a third: by title
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(tmp_path / "a.jsonl", tmp_path / "corpus", tokenizer=tokenizer)
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_bytes())["held_out"] == ["Title 2"]


def test_val_source_is_the_whole_held_out_split(tmp_path):
    source = jsonl(tmp_path / "stories.jsonl", 30)
    folder = prepare(source, tmp_path / "corpus", vocab_size=320, val_source=GARDEN)
    manifest = json.loads((folder / "corpus.json").read_text("utf-8"))
    assert manifest["train"]["documents"] == 30 and manifest["held_out"] == ["garden.txt"]
    assert manifest["val"]["bytes"] == GARDEN.stat().st_size


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path, monkeypatch):
    seen = []
    train = Tokenizer.train.__func__
    monkeypatch.setattr(
        Tokenizer, "train", classmethod(lambda cls, texts, size: train(cls, seen.extend(texts) or seen, size))
    )
    prepare(jsonl(tmp_path / "stories.jsonl"), tmp_path / "corpus", vocab_size=320)
    titles = {text.split(":")[0] for text in seen}
    assert titles == {f"Story {i}" for i in range(60) if not is_held_out(f"Story {i}")}


# shards


def test_each_document_ends_with_end_of_text_and_decodes_to_itself(prepared):
    tokenizer = Tokenizer.load(prepared)
    ids = row(TokenStream(prepared, "val", tokenizer, 8))
    texts = [json.loads(line)["text"] for line in (prepared / "val.jsonl").read_text("utf-8").splitlines()]
    assert ids[0] == ids[-1] == tokenizer.end_of_text
    ends = [i for i, token in enumerate(ids) if token == tokenizer.end_of_text]
    assert [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)] == texts


def test_control_text_in_an_article_makes_no_control_id(tmp_path):
    (tmp_path / "a.txt").write_text("before <|endoftext|> after <|user|>\n" * 20, encoding="utf-8")
    folder = prepare(tmp_path / "a.txt", tmp_path / "corpus", vocab_size=320)
    tokenizer = Tokenizer.load(folder)
    ids = row(TokenStream(folder, "train", tokenizer, 8))
    assert [i for i in ids if i in tokenizer.control.values()] == [tokenizer.end_of_text] * 2


class WithIds:
    """A tokenizer of any size: text is a list of numbers."""

    end_of_text, hash = 0, "numbers"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]

    def save(self, folder):
        pass


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_only_if_all_fit(tmp_path, vocab_size, dtype):
    numbers = [1, 65_535, vocab_size - 1]
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, numbers)), encoding="utf-8")
    tokenizer = WithIds(vocab_size)
    folder = prepare(tmp_path / "train.txt", tmp_path / "corpus", tokenizer=tokenizer, val_source=tmp_path / "val.txt")
    stream = TokenStream(folder, "train", tokenizer, 2)
    assert stream.shards[0][1]["dtype"] == dtype
    assert row(stream) == [0, *numbers, 0]


def test_many_shards_read_as_one(prepared, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(prepared)
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 100)
    folder = prepare(prepared.parent / "stories.jsonl", tmp_path / "corpus", tokenizer=tokenizer)
    one, many = (TokenStream(f, "train", tokenizer, 16) for f in (prepared, folder))
    assert len(one.shards) == 1 and len(many.shards) > 3
    assert row(one) == row(many)
    every = range(len(one))
    assert one.batch(every).inputs.equal(many.batch(every).inputs)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=30), min_size=1, max_size=40),
    vocab_size=st.sampled_from([1_000, 70_000]),
    shard_tokens=st.integers(1, 200),
    block_size=st.integers(1, 40),
    batch_size=st.integers(1, 5),
)
def test_crops_are_slices_of_the_documents_joined_by_end_of_text(numbers, vocab_size, shard_tokens, block_size, batch_size):
    numbers[0][0] = vocab_size - 1  # of two bytes, or of four
    tokenizer = WithIds(vocab_size)
    expected = [0] + [i for document in numbers for i in (*document, 0)]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_TOKENS", shard_tokens)
        source, folder = Path(name) / "a.jsonl", Path(name) / "corpus"
        source.write_text("\n".join(json.dumps({"text": " ".join(map(str, d))}) for d in numbers), encoding="utf-8")
        stream = TokenStream(prepare(source, folder, tokenizer=tokenizer, val_source=source), "val", tokenizer, block_size)
        for i in range(len(stream)):
            batch = stream.batch([i])
            crop = expected[i * block_size : (i + 1) * block_size + 1]
            assert batch.inputs.tolist() == [crop[:-1]] and batch.targets.tolist() == [crop[1:]]
        windows = list(stream.batches(batch_size))
    dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    assert stream.fingerprint == sha256(np.array(expected, dtype).tobytes()).hexdigest()
    assert len(stream) == (len(expected) - 1) // block_size
    known = [batch.targets != IGNORED for batch in windows]
    assert [i for batch, k in zip(windows, known, strict=True) for i in batch.inputs[k].tolist()] == expected[:-1]
    assert [i for batch, k in zip(windows, known, strict=True) for i in batch.targets[k].tolist()] == expected[1:]


def test_the_fingerprint_is_of_the_ids_whatever_the_shards(prepared, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(prepared)
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 100)
    folder = prepare(prepared.parent / "stories.jsonl", tmp_path / "corpus", tokenizer=tokenizer)
    prints = {split: [TokenStream(f, split, tokenizer, 8).fingerprint for f in (prepared, folder)] for split in ("train", "val")}
    ids = b"".join(path.read_bytes()[corpus.HEADER :] for path in sorted(folder.glob("train-*.bin")))
    assert prints["train"] == [sha256(ids).hexdigest()] * 2 != prints["val"]
    assert json.loads((folder / "corpus.json").read_bytes())["val"]["sha256"] == prints["val"][0] == prints["val"][1]


def test_an_existing_folder_is_reused_until_the_request_changes(tmp_path, capsys):
    source, folder = jsonl(tmp_path / "stories.jsonl"), tmp_path / "corpus"
    prepare(source, folder, vocab_size=320)
    before = (folder / "train-00000.bin").stat().st_mtime_ns
    prepare(source, folder, vocab_size=320)
    assert "already prepared" in capsys.readouterr().out.splitlines()[-1]
    assert (folder / "train-00000.bin").stat().st_mtime_ns == before
    tokenizer = Tokenizer.gpt2()
    prepare(source, folder, tokenizer=tokenizer)
    assert TokenStream(folder, "train", tokenizer, 8).tokens
    jsonl(source, 40)
    prepare(source, folder, tokenizer=tokenizer)
    manifest = json.loads((folder / "corpus.json").read_text("utf-8"))
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 40


def test_an_interrupted_preparation_is_refused_and_then_done_anew(tmp_path, monkeypatch):
    source, folder = jsonl(tmp_path / "stories.jsonl"), tmp_path / "corpus"
    tokenizer = Tokenizer.gpt2()
    prepare(source, folder, tokenizer=tokenizer)
    expected = row(TokenStream(folder, "train", tokenizer, 8))
    jsonl(source, 61)  # so that it is made anew, and is interrupted in the second split

    def interrupted(folder, split, tokenizer, write=corpus._write_shards):
        if split == "val":
            raise KeyboardInterrupt
        return write(folder, split, tokenizer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "_write_shards", interrupted)
        prepare(source, folder, tokenizer=tokenizer)
    with pytest.raises(InputError, match="no corpus.json"):
        TokenStream(folder, "train", tokenizer, 8)
    jsonl(source, 60)
    prepare(source, folder, tokenizer=tokenizer)
    assert row(TokenStream(folder, "train", tokenizer, 8)) == expected


def test_another_tokenizer_or_a_cut_shard_is_refused(prepared, tmp_path):
    with pytest.raises(InputError, match="50,257 ids"):
        TokenStream(prepared, "train", Tokenizer.gpt2(), 8)
    tokenizer = Tokenizer.load(prepared)
    folder = prepare(prepared.parent / "stories.jsonl", tmp_path / "corpus", tokenizer=tokenizer)
    shard = folder / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=f"{len(whole) - 2:,} bytes, not {len(whole):,}"):
        TokenStream(folder, "train", tokenizer, 8)
    shard.write_bytes(b"x" * 600)
    with pytest.raises(InputError, match="no shard of version"):
        TokenStream(folder, "train", tokenizer, 8)


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[:200],
    "no object": lambda text: "[]",
    "foreign": lambda text: '{"name": "my corpus"}',
    "no request": lambda text: text.replace('"request"', '"requested"'),
    "no split": lambda text: text.replace('"val": {', '"other": {'),
    "no hash": lambda text: text.replace('"sha256"', '"md5"'),
    "tokens of another type": lambda text: text.replace('"tokens": ', '"tokens": 0.'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_is_one_clear_line_wherever_it_is_read(tmp_path, damage):
    tokenizer, source = Tokenizer([]), jsonl(tmp_path / "stories.jsonl")
    folder = prepare(source, tmp_path / "corpus", tokenizer=tokenizer)
    manifest = folder / "corpus.json"
    manifest.write_text(DAMAGE[damage](manifest.read_text("utf-8")), encoding="utf-8")
    shards = sorted(folder.glob("*.bin"))
    for use in (lambda: TokenStream(folder, "train", tokenizer, 8), lambda: prepare(folder, tmp_path / "other"),
                lambda: prepare(source, folder, tokenizer=tokenizer)):
        with pytest.raises(InputError) as error:
            use()
        assert str(manifest) in str(error.value) and "\n" not in str(error.value)
    assert shards == sorted(folder.glob("*.bin"))  # nothing is lost


def test_a_folder_of_an_older_version_is_made_anew(tmp_path):
    tokenizer, source = Tokenizer([]), jsonl(tmp_path / "stories.jsonl")
    folder = prepare(source, tmp_path / "corpus", tokenizer=tokenizer)
    manifest = folder / "corpus.json"
    whole = json.loads(manifest.read_bytes())
    old = {**whole, "request": whole["request"] | {"version": 1}, "train": {"tokens": 5}}
    manifest.write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(InputError, match="damaged or of another version: delete it and prepare again"):
        TokenStream(folder, "train", tokenizer, 8)
    prepare(source, folder, tokenizer=tokenizer)
    assert json.loads(manifest.read_bytes()) == whole


@pytest.mark.parametrize("change", [('"dtype": "<u2"', '"dtype": "<f2"'), ('"tokens": ', '"tokens":-'), ('"vocab_size": ', '"vocab_size":x'),
                                    ('"tokenizer_hash": "', '"tokenizer_hash":["'), ('"magic"', '"tragic"'), ("}", " ")])
def test_a_damaged_shard_header_is_one_clear_line(tmp_path, change):
    tokenizer = Tokenizer([])
    folder = prepare(jsonl(tmp_path / "stories.jsonl"), tmp_path / "corpus", tokenizer=tokenizer)
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes().replace(*(part.encode() for part in change), 1))
    with pytest.raises(InputError, match="prepare again$") as error:
        TokenStream(folder, "train", tokenizer, 8)
    assert str(error.value).startswith(str(shard)) and "\n" not in str(error.value)


def test_an_id_beyond_the_vocabulary_is_told_before_it_reaches_a_model(tmp_path):
    tokenizer = Tokenizer([])
    folder = prepare(jsonl(tmp_path / "stories.jsonl"), tmp_path / "corpus", tokenizer=tokenizer)
    shard = folder / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:601] + b"\xff" + content[602:])
    stream = TokenStream(folder, "train", tokenizer, 8)
    for use in (lambda: stream.batch(range(9)), lambda: list(stream.batches(9))):
        with pytest.raises(InputError, match="damaged: id .* but the tokenizer has 257 ids; delete corpus.json and prepare again"):
            use()


@pytest.mark.parametrize("given, message", [({"vocab_size": 0}, "--vocab-size is 0"), ({"workers": 0}, "--workers is 0")])
def test_a_bad_setting_stops_before_an_older_folder_is_touched(tmp_path, given, message):
    source = jsonl(tmp_path / "stories.jsonl")
    folder = prepare(source, tmp_path / "corpus", vocab_size=320)
    jsonl(source, 61)  # so that the folder would be made anew
    with pytest.raises(InputError, match=message):
        prepare(source, folder, **{"vocab_size": 320} | given)
    assert TokenStream(folder, "train", Tokenizer.load(folder), 8)


def test_too_little_text_stops_with_the_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("ab", encoding="utf-8")
    with pytest.raises(InputError, match="'val': 0"):
        prepare(tmp_path / "a.txt", tmp_path / "corpus", vocab_size=320)
    (tmp_path / "b.txt").write_text("1 2 3", encoding="utf-8")
    tokenizer = WithIds(10)
    folder = prepare(tmp_path / "b.txt", tmp_path / "corpus", tokenizer=tokenizer, val_source=tmp_path / "b.txt")
    with pytest.raises(InputError, match="5 training tokens, one crop of --block-size 5 needs 6"):
        TokenStream(folder, "train", tokenizer, 5)
    assert len(TokenStream(folder, "train", tokenizer, 4)) == 1


def test_the_folder_that_holds_the_source_is_not_overwritten(tmp_path):
    source = jsonl(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="name another"):
        prepare(source, tmp_path, vocab_size=320)
    assert source.exists()


# crops


def test_a_batch_is_crops_with_targets_one_token_later(prepared):
    stream = TokenStream(prepared, "train", Tokenizer.load(prepared), 16)
    ids = row(stream)
    assert len(stream) == (len(ids) - 1) // 16
    batch = stream.batch([3, 0, len(stream) - 1])
    assert batch.inputs.shape == batch.targets.shape == (3, 16)
    assert batch.inputs.dtype == batch.targets.dtype and str(batch.inputs.dtype) == "torch.int64"
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous() and batch.segments is None
    assert batch.inputs[0].tolist() == ids[48:64] and batch.targets[0].tolist() == ids[49:65]
    with pytest.raises(IndexError):
        stream.batch([len(stream)])


@pytest.mark.parametrize("block_size", [7, 16, 5_000])
def test_windows_predict_every_token_but_the_first_exactly_once(prepared, block_size):
    stream = TokenStream(prepared, "val", Tokenizer.load(prepared), block_size)
    ids = np.array(row(stream))
    batches = list(stream.batches(3))
    targets = np.concatenate([batch.targets.flatten() for batch in batches])
    inputs = np.concatenate([batch.inputs.flatten() for batch in batches])
    assert (targets[targets != IGNORED] == ids[1:]).all() and (inputs[targets != IGNORED] == ids[:-1]).all()
    assert (targets[: len(ids) - 1] != IGNORED).all() and len(targets) % block_size == 0
    again = list(stream.batches(3))
    assert all(a.inputs.equal(b.inputs) and a.targets.equal(b.targets) for a, b in zip(batches, again, strict=True))


# the machine around it


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, timeout=300
    )


def test_everything_is_utf8_in_a_c_locale(tmp_path):
    (tmp_path / "故事.jsonl").write_bytes(jsonl(tmp_path / "a.jsonl").read_bytes().replace(b"Story", "故事".encode()))
    env = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run(
        "-m", "nanochat.corpus", str(tmp_path / "故事.jsonl"), str(tmp_path / "out"), "--vocab-size", "320", **env
    )
    assert done.returncode == 0, done.stderr
    assert "故事" in done.stdout.decode("utf-8") and "故事" in (tmp_path / "out" / "train.jsonl").read_text("utf-8")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run("-m", "nanochat.corpus", str(tmp_path / "none.txt"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: ") and done.stderr.count(b"\n") == 1


def test_a_data_set_of_the_hub_is_streamed_by_name_and_config(monkeypatch):
    def load_dataset(name, config, split, streaming):
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach the hub\nand a long story")
        assert (name, config, split, streaming) == ("owner/stories", "small", "train", True)
        return iter([{"text": "one", "date": object()}, {"title": "T", "text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = list(documents("owner/stories:small"))
    assert rows == [("owner/stories:small, line 1", "one"), ("T", "two")]
    with pytest.raises(InputError, match="no such file, and as a data set of the hub: Couldn't reach the hub$"):
        list(documents("nobody/nothing"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        list(documents("owner/stories"))


@pytest.mark.skipif(os.name == "nt", reason="signals are held back on POSIX only")
def test_ctrl_c_waits_while_workers_start_whichever_thread_takes_it():
    end = threading.Event()
    threading.Thread(target=end.wait).start()  # it does not hold SIGINT back, so the kernel gives it to this one
    done = False
    try:
        with pytest.raises(KeyboardInterrupt), sources._interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the handler would run in here
            done = True
    finally:
        end.set()
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX's")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_at_any_moment_ends_the_workers_too_and_the_next_run_is_whole(tmp_path, kill):
    text = "".join(f"\n== Part {i} ==\n{ARTICLE}" for i in range(15))
    source = dump(tmp_path / "lakes.xml", *(page(f"Lake {i}", text) for i in range(200)))
    expected = prepare(source, tmp_path / "expected", vocab_size=320)
    script = tmp_path / "script.py"  # a file, since the workers import it, which takes them seconds
    script.write_text("""import sys\nfrom nanochat import corpus, runtime, sources\nif __name__ == "__main__":
    sources.ALONE = 1
    runtime.run_as_script(lambda: corpus.prepare(*sys.argv[1:], vocab_size=320, workers=2))""")
    folder = tmp_path / "corpus"
    for seconds in (0, 1, 2, 3, 5):  # the workers start, clean, end; a tokenizer is trained
        (folder / "train.jsonl").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, script, source, folder], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])},
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        while not (folder / "train.jsonl").exists():  # all is imported by then, and reading has begun
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        (os.killpg if kill == signal.SIGINT else os.kill)(process.pid, kill)  # Ctrl-C reaches the whole group
        stderr = process.communicate(timeout=60)[1].decode()
        deadline = time.monotonic() + 100
        while group_is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_is_alive(process.pid)
        if (folder / "corpus.json").exists():  # written last: it had ended before the signal came
            break
        if kill == signal.SIGINT:
            ours = [line for line in stderr.splitlines() if "resource_tracker" not in line]  # Python's, if met between two of its own lines
            assert process.returncode == 130 and ours[-1].split()[-1] == "interrupted" and "Traceback" not in stderr, stderr
    assert seconds > 0  # at least one signal met it at work
    prepare(source, folder, vocab_size=320)
    for name in ("train-00000.bin", "val-00000.bin", "tokenizer.json", "corpus.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def group_is_alive(group: int) -> bool:
    """Whether a process of it runs: not one that has ended and that nobody has waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            states += [state] if int(its_group) == group else []
    return not states or any(state not in "ZX" for state in states)


@pytest.mark.slow
def test_40_mb_of_text_and_2000_batches_take_less_than_100_mb(tmp_path):
    text = GARDEN.read_text(encoding="utf-8") * 600
    Tokenizer.train([text[: 2**20]], 1024).save(tmp_path)  # here: its peak would hide all that follows
    (tmp_path / "book.txt").write_text(text * (40_000_000 // len(text.encode("utf-8")) + 1), encoding="utf-8")
    script = """
        import random, re, sys
        import torch
        from nanochat import corpus
        from nanochat.tokenizer import Tokenizer
        tokenizer = Tokenizer.load(sys.argv[3])
        tokenizer.encode_batch(["warm"] * 16)
        # of this process alone, in MB: ru_maxrss begins with that of the process that started it
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        before = peak()
        folder = corpus.prepare(sys.argv[1], sys.argv[2], tokenizer=tokenizer)
        stream = corpus.TokenStream(folder, "train", tokenizer, 256)
        for _ in range(2_000):
            stream.batch(random.sample(range(len(stream)), 12))
        print("grew by", peak() - before)
    """
    done = run("-c", textwrap.dedent(script), str(tmp_path / "book.txt"), str(tmp_path / "corpus"), str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert float(done.stdout.split()[-1]) < 100
