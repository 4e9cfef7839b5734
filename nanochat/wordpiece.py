"""BERT's WordPiece behind the calls of Tokenizer: the vocabulary of the common Chinese GPT-2s.

A text is cleaned (of control characters, in most vocabularies of capitals), cut at white space and
around every Chinese character and sign, and each word becomes the longest pieces there are, from left
to right, with "##" before all but the first. A word that they do not make up, such as an emoji, is [UNK].

    Hello, 小河🙂  →  hello  ,  小  河  [UNK]  →  " hello,小河\ufffd"

So a text does not come back as it was: spaces, line breaks, perhaps capitals, and what is unknown are
lost. Streaming needs bytes for each token, whatever stands beside it: a word in letters brings a space
before it; Chinese, digits and signs bring none; [UNK] is U+FFFD. (BertTokenizer puts spaces between
all tokens, "小 河 2001 年", and takes some away before signs. What `save` writes decodes there as here.)

These models learned from documents of the form [CLS] text [SEP] (UER-py's LmDataset), so [CLS] begins
our rows, and is bos and pad in what we save. A generated [SEP] ends a text, as every control token does.

Sources: Wu et al. 2016 (WordPiece); Devlin et al. 2019 and their tokenization.py (the cleaning);
tests hold the ids equal to Hugging Face's BertTokenizer.
"""

import hashlib
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from nanochat import InputError
from nanochat.records import not_utf8, read_json, whole_pairs
from nanochat.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, Tokenizer, read_template

UNKNOWN = "[UNK]"
CONTROL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", *CHAT_TOKENS)
CLEANING = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}  # BERT's own
SETTINGS = {"lowercase": "do_lower_case", "handle_chinese_chars": "tokenize_chinese_chars", "strip_accents": "strip_accents"}
LONGEST_WORD = 100  # characters, as in BERT; what is longer is [UNK]
ALPHABETS = "\u2e80"  # below it are the scripts that put spaces between words, above it Chinese and Japanese


class WordPieceTokenizer(Tokenizer):
    """vocab: the names of all ids in order, such as "河", "##ing", "[CLS]"; control: those that no text may make.

    cleaning: settings of `tokenizers`' BertNormalizer. chat_template: as in Tokenizer.
    """

    boundary, unknown = "[CLS]", UNKNOWN

    def __init__(self, vocab: Sequence[str], control: Sequence[str] = CONTROL,
                 cleaning: dict[str, Any] = CLEANING, chat_template: str | None = None):
        self.vocab, self.cleaning, self.chat_template = list(vocab), dict(cleaning), chat_template
        if missing := [name for name in (self.boundary, UNKNOWN) if name not in self.vocab]:
            raise InputError(f"has no {' and no '.join(missing)} token")
        silent = set(control) - {UNKNOWN}
        self.control = {name: i for i, name in enumerate(self.vocab) if name in silent}
        self.token_bytes = [_text(name).encode() for name in self.vocab]
        self._wordpiece = self._hugging_face(without=self.control)

    @property
    def hash(self) -> str:
        """As Tokenizer's: equal only for tokenizers that give the same ids."""
        content = json.dumps([self.vocab, list(self.control), sorted(self.cleaning.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id, whatever the text contains."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return [found.ids for found in self._wordpiece.encode_batch_fast([whole_pairs(text) for text in texts])]

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text behind each id, for bits per byte; 0 for control tokens.

        Spaces and [UNK] count 0 too: nobody knows how much was there. So bits per byte errs on the
        high side, beside a tokenizer that must tell all of the text.
        """
        silent = {self.vocab.index(UNKNOWN), *self.control.values()}
        return [0 if i in silent else len(b.lstrip()) for i, b in enumerate(self.token_bytes)]

    def for_chat(self) -> "WordPieceTokenizer":
        """This tokenizer with the chat tokens, added after the vocabulary where missing, and the chat template."""
        missing = [name for name in CHAT_TOKENS if name not in self.control]
        return WordPieceTokenizer([*self.vocab, *missing], [*self.control, *missing], self.cleaning, CHAT_TEMPLATE)

    def _hugging_face(self, without: Container[str] = ()) -> tokenizers.Tokenizer:
        """The same for `tokenizers`, without some tokens; its decoder joins the others as `_text` does."""
        ids = {name: i for i, name in enumerate(self.vocab) if name not in without}
        fast = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD))
        fast.normalizer = normalizers.BertNormalizer(**self.cleaning)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        rules = {r"^(?=[\x00-\x{2e7f}])(?=\p{L})": " ", r"^##": "", r"^\[UNK\]$": "\ufffd"}
        steps = [decoders.Replace(Regex(pattern), text) for pattern, text in rules.items()]
        fast.decoder = decoders.Sequence([*steps, decoders.Fuse()])
        return fast

    @classmethod
    def load(cls, folder: Path) -> "WordPieceTokenizer":
        """Open tokenizer.json, or the older vocab.txt, of a Hugging Face folder, as its tokenizer_config.json says.

        Raises InputError for whatever would make other ids than BertTokenizer; a foreign chat
        template is left out, with a line.
        """
        folder = Path(folder)
        path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        config = read_json(settings) if settings.exists() else {}
        kind = str(config.get("tokenizer_class") or "")
        if path.exists():
            vocab, added, cleaning = _read_tokenizer_json(path)
        elif kind and not kind.startswith("BertTokenizer"):
            raise InputError(f"{folder}: vocab.txt of a {kind[:80]!r}; only BertTokenizer's is read")
        else:
            path, kind, more = folder / "vocab.txt", "BertTokenizer", folder / "added_tokens.json"
            try:
                lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
            except UnicodeDecodeError as error:
                raise not_utf8(path, error) from None
            added = read_json(more) if more.exists() else {}
            vocab = {name: i for i, name in enumerate(lines)} | added
        if kind.startswith("BertTokenizer"):  # Hugging Face then cleans as its settings say, not as tokenizer.json does
            cleaning = CLEANING | {ours: config[theirs] for ours, theirs in SETTINGS.items() if theirs in config}
        try:
            return cls(_in_order(vocab), [*CONTROL, *added], cleaning, read_template(folder))
        except (InputError, TypeError, UnicodeEncodeError) as error:  # a setting of another type; half a surrogate pair
            raise InputError(f"{path}: no WordPiece of BERT's kind: {' '.join(str(error).split())[:200]}") from None


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, whichever of the two kinds it is; raises InputError as they do."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model")
        wordpiece = isinstance(model, dict) and model.get("type") == "WordPiece"
    else:
        wordpiece = (folder / "vocab.txt").exists() and not (folder / "vocab.json").exists()
    return (WordPieceTokenizer if wordpiece else Tokenizer).load(folder)


def _text(name: str) -> str:
    """The text of a token, whatever stands beside it."""
    if name == UNKNOWN:
        return "\ufffd"
    return " " + name if name[:1].isalpha() and name < ALPHABETS else name.removeprefix("##")


def _read_tokenizer_json(path: Path) -> tuple[object, dict, dict]:
    """(vocabulary, added control tokens, cleaning); InputError for another normalizer, pre-tokenizer or setting."""
    data = read_json(path)
    model, normalizer, splitter = (data.get(part) or {} for part in ("model", "normalizer", "pre_tokenizer"))
    added = data.get("added_tokens") or []
    if not (all(isinstance(part, dict) for part in (model, normalizer, splitter)) and isinstance(added, list)
            and all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added)):
        raise InputError(f"{path}: damaged: its parts are not as `tokenizers` writes them")
    settings = {"unk_token": UNKNOWN, "continuing_subword_prefix": "##", "max_input_chars_per_word": LONGEST_WORD}
    odd = [f"{name} {model.get(name)}" for name, usual in settings.items() if model.get(name) != usual]
    if normalizer.get("type") != "BertNormalizer" or set(normalizer) != {"type", *CLEANING}:
        odd.append(f"normalizer {normalizer}")
    if splitter != {"type": "BertPreTokenizer"}:
        odd.append(f"pre_tokenizer {splitter}")
    # Hugging Face cuts added words out of a text before all else; control tokens no text should have
    odd += [f"added word {token['content']}" for token in added if not token.get("special")]
    if odd:
        seen = " ".join(", ".join(odd).split())[:200]
        raise InputError(f"{path}: WordPiece with {seen}; only BERT's own kind is read")
    added = {token["content"]: token.get("id") for token in added}
    vocab = model.get("vocab")
    return (vocab | added if isinstance(vocab, dict) else vocab), added, {name: normalizer[name] for name in CLEANING}


def _in_order(vocab: object) -> list[str]:
    """Names by id. Where a doubled line of vocab.txt left an id without a name, it gets one that no text makes."""
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int for i in vocab.values()):
        raise InputError("no vocabulary with a number for each token")
    names = {i: name for name, i in vocab.items()}
    if len(names) < len(vocab) or min(names) < 0 or max(names) >= 2 * len(names):
        raise InputError(f"its {len(vocab)} tokens are not numbered from 0 on, each by itself")
    return [names.get(i, f"[no token {i}]") for i in range(max(names) + 1)]
