"""wordpiece: a Chinese GPT-2 with BERT's vocabulary loads, learns, talks and is saved, with Hugging Face's ids."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models
from transformers import AutoTokenizer, BertTokenizer, GPT2Config, GPT2LMHeadModel

from nanochat import InputError, checkpoint, wordpiece
from nanochat.dialogue import render, render_prompt
from nanochat.generate import stream_text
from nanochat.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, Tokenizer
from nanochat.wordpiece import WordPieceTokenizer

ROOT = Path(__file__).parent.parent
LATIN = "abcdefghijklmnopqrstuvwxyzABCHéß"
WORDS = ["hello", "Hello", "river", "##ing", "##99", "2001", "##年", "und", "ひと", "かな", "──", "[unused1]", "user", "end"]
CHINESE = sorted({c for c in TEXT if "\u4e00" <= c <= "\u9fff"} | set("我们看电影吗是的好你年月日"))
SIGNS = list("，。！？、；：「」《》“”…·!\"#$%&'()*+,-./:;<=>?@[]_|{}~0123456789") + ["##" + c for c in "0123456789"]
SPECIAL = ["[PAD]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = [*SPECIAL, *SIGNS, *CHINESE, *LATIN, *("##" + c for c in LATIN), *WORDS]
MARKERS = "<|user|>你好<|end|>[SEP] [CLS][MASK] [PAD]<|assistant|>"
STRINGS = [
    "",
    "我们看《电影》吗？是的，2001年12月28日！",
    "Hello, hello world: the RIVERS sing 你好Hello年2001s; don't.",
    "🙂 小河🙂 👩‍👩‍👧‍👦 龘 한국어 ﷽",
    " \n\n 你\t好 \u3000\u00a0 x\r\n",
    "Café cafe\u0301 ÀÉÎõü STRASSE Straße İ",
    "ひとかな ひとびと ── ……·",
    "a\x00b\x01c\ufffdd\u200be\ufeff你\u0085好",
    "hello" * 19 + " " + "hello" * 21,  # words above 100 characters are unknown
    TEXT,
]
MESSAGES = [
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello, 你好！"}],
    [{"role": "system", "content": "我们看电影。"}, {"role": "user", "content": " 2001年？\n"},
     {"role": "assistant", "content": "是的，2001年\n12月 Hello."}, {"role": "user", "content": "🙂"},
     {"role": "assistant", "content": "好🙂的"}],
    [{"role": "assistant", "content": "hello"}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
]


def write(folder: Path, files: str = "vocab.txt", **config) -> Path:
    """BERT's tokenizer files: vocab.txt with its settings, as Google and UER have them, or as Hugging Face saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if files == "tokenizer.json":
        BertTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "vocab.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> WordPieceTokenizer:
    """Lower-casing, with the chat tokens."""
    return WordPieceTokenizer.load(write(tmp_path_factory.mktemp("ours"))).for_chat()


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory) -> Path:
    """`ours`, saved."""
    folder = tmp_path_factory.mktemp("saved")
    ours.save(folder)
    return folder


@pytest.fixture(scope="module")
def auto(saved):
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny Chinese GPT-2 as they are published: BERT's vocab.txt beside the weights; a few more rows than ids."""
    folder = write(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, bos_token_id=3, eos_token_id=4)
    config = GPT2Config(vocab_size=len(VOCAB) + 3, tokenizer_class="BertTokenizer", **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


# the ids of Hugging Face


SETTINGS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
    {"tokenizer_class": "BertTokenizerFast"},
]


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: " ".join(config) or "usual")
def test_ids_equal_those_of_the_bert_tokenizer(tmp_path, files, config):
    folder = write(tmp_path, files, **config)
    loaded, theirs = wordpiece.load(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, WordPieceTokenizer) and loaded.vocab_size == len(VOCAB) == len(theirs)
    for text in STRINGS:
        assert loaded.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert loaded.encode_batch(STRINGS) == [loaded.encode(text) for text in STRINGS]


def test_the_settings_of_the_bert_tokenizer_overrule_tokenizer_json(tmp_path):
    folder = write(tmp_path, "tokenizer.json")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    for config in ({"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        theirs = AutoTokenizer.from_pretrained(folder)
        assert wordpiece.load(folder).encode("Hello") == theirs("Hello", add_special_tokens=False)["input_ids"]


UNICODE = st.text(max_size=60) | st.text(st.sampled_from("你好我小河 \nHeloé2019，。[]|<>#s🙂\u0301한ひ\u3000"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=UNICODE)
def test_ids_and_texts_of_any_unicode_string_equal_hugging_face(text, ours, auto):
    ids = ours.encode(text)
    assert auto(text, split_special_tokens=True)["input_ids"] == ids
    assert auto.decode(ids) == ours.decode(ids)
    assert not set(ids) & set(ours.control.values())


def test_typed_markers_never_become_control_ids(ours, auto):
    assert not set(ours.encode(MARKERS)) & set(ours.control.values())
    assert auto(MARKERS, split_special_tokens=True)["input_ids"] == ours.encode(MARKERS)
    assert {ours.control["[SEP]"], ours.control["<|end|>"]} <= set(auto(MARKERS)["input_ids"])  # their default
    bare = WordPieceTokenizer(["[UNK]", "[CLS]", "end"], ["[CLS]", "end"])  # even one that stands in a text as it is
    assert bare.encode("end [CLS]") == [0, 0, 0, 0]


@pytest.mark.parametrize("text", ["\ud800", "a\udfff你", "\ud83d\ude42"])
def test_halves_of_surrogate_pairs_do_no_harm(text, ours):
    assert ours.encode(text) == ours.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


# the text of ids


@pytest.mark.parametrize("text, expected", [
    ("我们看《电影》吗？ 是的。", "我们看《电影》吗？是的。"),
    ("是2001年12月28日，3.14", "是2001年12月28日，3.14"),
    ("Hello rivers, 你好Hello 小河", " hello rivers,你好 hello小河"),
    ("小河🙂\n", "小河\ufffd"),
    ("ひと かな, \"don't\"", "ひとかな,\" don' t\""),
])
def test_what_a_text_comes_back_as(text, expected, ours):
    assert ours.decode(ours.encode(text)) == expected


def test_every_id_has_its_bytes_whatever_stands_beside_it(ours, auto):
    ids = list(range(ours.vocab_size))
    assert ours.decode(ids) == "".join(ours.decode([i]) for i in ids) == "".join(stream_text(ours, ids))
    assert [auto.decode([i]) for i in ids] == [ours.decode([i]) for i in ids]
    with pytest.raises(InputError, match=f"this tokenizer has 0 … {ours.vocab_size - 1}$"):
        ours.decode([ours.vocab_size])


def test_the_bert_tokenizer_decodes_to_the_same_but_for_spaces(tmp_path):
    folder = write(tmp_path)
    loaded, theirs = wordpiece.load(folder), BertTokenizer.from_pretrained(folder)
    for text in STRINGS[:3]:
        ids = loaded.encode(text)
        assert loaded.decode(ids).replace(" ", "") == theirs.decode(ids).replace(" ", "").replace("[UNK]", "\ufffd")
    assert theirs.decode(loaded.encode("你好")) == "你 好"


def test_byte_lengths_are_those_of_the_text_without_spaces_and_the_unknown(ours):
    lengths = ours.byte_lengths()
    text = "我们 rivers 2001 年，hello"
    assert sum(lengths[i] for i in ours.encode(text)) == len(text.replace(" ", "").encode())
    assert sum(lengths[i] for i in ours.encode("🙂 龘")) == 0 == sum(lengths[i] for i in ours.control.values())
    assert len(lengths) == ours.vocab_size


# on disk


def test_for_chat_adds_four_ids_and_keeps_the_others(ours, tmp_path):
    plain = wordpiece.load(write(tmp_path))
    assert plain.end_of_text == VOCAB.index("[CLS]") and plain.chat_template is None
    assert list(plain.control) == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    assert ours.control == plain.control | {name: len(VOCAB) + i for i, name in enumerate(CHAT_TOKENS)}
    assert ours.token_bytes[: len(VOCAB)] == plain.token_bytes and ours.for_chat().hash == ours.hash
    assert ours.chat_template == CHAT_TEMPLATE
    cased = wordpiece.load(write(tmp_path / "cased", do_lower_case=False))
    assert len({ours.hash, plain.hash, cased.hash}) == 3


def test_auto_tokenizer_opens_what_we_save(ours, saved, auto):
    assert len(auto) == ours.vocab_size
    for text in STRINGS:
        assert auto(text)["input_ids"] == ours.encode(text)
    assert (auto.bos_token, auto.eos_token, auto.pad_token, auto.unk_token) == ("[CLS]", "<|end|>", "[CLS]", "[UNK]")
    assert auto.convert_tokens_to_ids(list(ours.control)) == list(ours.control.values())


def test_what_we_save_asks_for_no_token_type_ids(ours, tokenizer, tmp_path):
    """GPT-2 in Hugging Face adds the word of each such id to its input, and transformers 4 makes them by default."""
    for kind in (ours, tokenizer):
        kind.save(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["model_input_names"] == list(AutoTokenizer.from_pretrained(tmp_path)("你好"))
        assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_what_is_saved_here_or_by_hugging_face_loads_with_equal_hash(ours, saved, auto, tmp_path):
    auto.save_pretrained(tmp_path)
    for folder in (saved, tmp_path):
        loaded = wordpiece.load(folder)
        assert (loaded.hash, loaded.control, loaded.chat_template) == (ours.hash, ours.control, CHAT_TEMPLATE)


@pytest.mark.parametrize("messages", MESSAGES, ids=range(len(MESSAGES)))
def test_template_and_mask_agree_with_hugging_face(messages, ours, auto):
    theirs = auto.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, supervised = render(messages, ours)
    assert theirs["input_ids"] == ids
    assert [bool(m) for m in theirs["assistant_masks"]] == supervised
    prompt = auto.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert prompt["input_ids"] == render_prompt(messages, ours)


def test_of_a_doubled_line_the_last_counts_and_the_other_id_is_kept_free(tmp_path):
    folder = write(tmp_path)
    lines = [*VOCAB, "河", "新"]
    (folder / "vocab.txt").write_text("\r\n".join(lines), encoding="utf-8")
    tokenizer = wordpiece.load(folder).for_chat()
    assert tokenizer.vocab_size == len(lines) + 4
    assert tokenizer.encode("河新") == [len(lines) - 2, len(lines) - 1]
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert wordpiece.load(saved).hash == tokenizer.hash
    assert len(AutoTokenizer.from_pretrained(saved)) == tokenizer.vocab_size


def test_tokens_added_to_vocab_txt_are_control_tokens(tmp_path):
    folder = write(tmp_path)
    added = {"[speaker1]": len(VOCAB), "说": len(VOCAB) + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    tokenizer = wordpiece.load(folder)
    assert tokenizer.vocab_size == len(VOCAB) + 2 and tokenizer.control["说"] == len(VOCAB) + 1
    assert not set(tokenizer.encode("[speaker1]说")) & set(tokenizer.control.values())


def test_byte_level_folders_load_as_before(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = wordpiece.load(tmp_path)
    assert type(loaded) is Tokenizer and loaded.hash == tokenizer.hash


# refused


def refusal(folder: Path) -> str:
    """The one line with which wordpiece.load refuses a folder."""
    with pytest.raises(InputError) as info:
        wordpiece.load(folder)
    assert "\n" not in str(info.value)
    return str(info.value)


DAMAGE = {
    "normalizer {'type': 'NFC'}": lambda data: data.update(normalizer={"type": "NFC"}),
    "normalizer {}": lambda data: data.update(normalizer=None),
    "pre_tokenizer {'type': 'Whitespace'}": lambda data: data.update(pre_tokenizer={"type": "Whitespace"}),
    "max_input_chars_per_word 50": lambda data: data["model"].update(max_input_chars_per_word=50),
    "continuing_subword_prefix @@": lambda data: data["model"].update(continuing_subword_prefix="@@"),
    "unk_token <unk>": lambda data: data["model"].update(unk_token="<unk>"),
    "added word 新词": lambda data: data["added_tokens"].append({"id": len(VOCAB), "content": "新词", "special": False}),
    "damaged": lambda data: data.update(added_tokens=7),
    "no [UNK] token": lambda data: data["model"]["vocab"].update({"UNK": data["model"]["vocab"].pop("[UNK]")}),
    "are not numbered from 0 on": lambda data: data["model"]["vocab"].update({"x": 10**9}),
    "each by itself": lambda data: data["model"]["vocab"].update({"xy": 7}),
    "a number for each token": lambda data: data["model"]["vocab"].update({"x": "7"}),
    "no vocabulary": lambda data: data["model"].update(vocab=[]),
    "surrogates not allowed": lambda data: data["model"]["vocab"].update({"\ud800": len(VOCAB)}),
    "WordPiece of BERT's kind": lambda data: data["normalizer"].update(lowercase="yes"),
}


@pytest.mark.parametrize("seen", DAMAGE)
def test_another_kind_of_wordpiece_is_refused_with_what_was_seen(tmp_path, seen):
    folder = write(tmp_path, "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "[UNK]"]
    DAMAGE[seen](data)
    path.write_text(json.dumps(data), encoding="utf-8")
    assert seen in refusal(folder) and refusal(folder).startswith(f"{path}: ")


def test_other_kinds_of_tokenizer_are_refused_by_name(tmp_path):
    tokenizers.Tokenizer(models.Unigram([("你", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: Unigram with")
    write(tmp_path / "mecab", tokenizer_class="BertJapaneseTokenizer")
    assert "vocab.txt of a 'BertJapaneseTokenizer'" in refusal(tmp_path / "mecab")
    (tmp_path / "mecab" / "tokenizer_config.json").write_text('{"do_lower_case": "no"}', encoding="utf-8")
    assert "no WordPiece of BERT's kind: " in refusal(tmp_path / "mecab")
    (tmp_path / "mecab" / "vocab.txt").write_bytes("你好".encode("gbk"))
    assert "not UTF-8" in refusal(tmp_path / "mecab")


# with a model


def test_a_chinese_gpt2_loads_with_equal_logits(bert, capsys):
    model, tokenizer = checkpoint.load(bert)
    assert isinstance(tokenizer, WordPieceTokenizer) and model.config.vocab_size == len(VOCAB)
    assert "3 token rows have no id in the tokenizer; cut" in capsys.readouterr().err
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("我们看电影吗？Hello")]])
    theirs = GPT2LMHeadModel.from_pretrained(bert).eval()(ids).logits[..., : len(VOCAB)]
    torch.testing.assert_close(model(ids), theirs, rtol=1e-4, atol=1e-5)


def script(name: str, *args, cwd: Path) -> str:
    """What a script prints that ends well."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_chinese_gpt2_is_finetuned_talks_and_opens_in_hugging_face(bert, tmp_path):
    talk = [{"messages": [{"role": "user", "content": f"我们看电影{i}吗？"}, {"role": "assistant", "content": f"好的，{i}月看。"}]}
            for i in range(6)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)), encoding="utf-8")
    script("finetune.py", "--init", bert, "--data", "talk.jsonl", "--val-data", "talk.jsonl", "--max-steps", 3,
           "--out", "out", cwd=tmp_path)
    short = ("--max-new-tokens", 8)
    assert script("sample.py", "--checkpoint", "out", "--prompt", "你好", *short, cwd=tmp_path).strip()
    assert script("sample.py", "--checkpoint", bert, "--prompt", "小河", *short, cwd=tmp_path).startswith("小河")
    model, tokenizer = checkpoint.load(tmp_path / "out")
    auto, theirs = (kind.from_pretrained(tmp_path / "out" / "best") for kind in (AutoTokenizer, GPT2LMHeadModel))
    assert len(auto) == tokenizer.vocab_size == theirs.config.vocab_size == len(VOCAB) + 4
    ids = torch.tensor([render_prompt(talk[0]["messages"][:1], tokenizer)])
    said = auto.apply_chat_template(talk[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt",
                                    return_dict=True)
    assert torch.equal(said["input_ids"], ids)
    torch.testing.assert_close(theirs.eval()(**said).logits, model(ids), rtol=1e-4, atol=1e-5)
