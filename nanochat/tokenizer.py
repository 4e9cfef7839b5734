"""Text ↔ ids: byte-level byte-pair encoding (BPE), GPT-2's or one trained here.

A text is UTF-8 bytes; ids 0–255 are the bytes (visible ones first), id 256 + i is the i-th merge of
two earlier tokens, and the control tokens follow. So a list of merges is a whole tokenizer, any text has
ids, and any ids decode. tiktoken encodes; Hugging Face's `tokenizers` trains, is the format on disk,
and encodes the white space that overflows tiktoken's stack; both give the same ids.

Control tokens are never made from text: `encode` turns a typed "<|end|>" into ordinary tokens.
Only dialogue.render_turn and the corpus place control ids. (Hugging Face's own tokenizer does turn
typed markers into control ids unless it is called with split_special_tokens=True.)

Sources: Sennrich et al. 2016 (BPE); Radford et al. 2019 (bytes, the pattern below).
gpt2_merges.txt is OpenAI's vocab.bpe, under the Modified MIT licence of the GPT-2 release.
"""

import argparse
import hashlib
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat import InputError
from nanochat.records import read_json, read_text, whole_pairs

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
CHAT_TOKENS = (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)

# The conversation format as Hugging Face reads it; dialogue.render_turn is the same in Python, and
# test_template_and_mask_agree_with_hugging_face holds the two equal. {% generation %} marks what
# is supervised: the assistant's text and its end token.
TEMPLATE_NAME = "nanochat-1"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# GPT-2 cuts a text into pieces before merging: contractions, then words, numbers and signs, each
# with the space before it, then white space. Merges never cross a cut.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

BLANK = 100_000  # so much white space in a row goes to `tokenizers`; a million would make tiktoken panic
WORD = 10_000  # characters; longer words and blanks are cut for training, whose time grows with their square


class Tokenizer:
    """merges: pairs of byte strings in order of priority; control: names of the control tokens.

    chat_template: set once the model was fine-tuned on dialogue, and saved with it.
    wordpiece.WordPieceTokenizer does the same with BERT's vocabulary.
    """

    boundary = END_OF_TEXT  # begins every row and ends every document
    unknown: str | None = None  # bytes leave nothing unknown
    system = ""  # the system text that a chat begins with if nobody names another; kept in nanochat.json

    def __init__(self, merges: Sequence[tuple[bytes, bytes]], control: Sequence[str] = (END_OF_TEXT,),
                 chat_template: str | None = None):
        self.merges = list(merges)
        self.chat_template = chat_template
        text_tokens = [bytes([b]) for b in BYTES_IN_ORDER] + [left + right for left, right in self.merges]
        self.control = {name: len(text_tokens) + i for i, name in enumerate(control)}
        self.token_bytes = text_tokens + [name.encode() for name in control]  # id → bytes
        ranks = {token: i for i, token in enumerate(text_tokens)}
        if len(ranks) < len(text_tokens):
            raise InputError("two merges make the same token")
        self._bpe = tiktoken.Encoding("nanochat", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: the rows that a model needs."""
        return len(self.token_bytes)

    @property
    def end_of_text(self) -> int:
        """The id of `boundary`."""
        return self.control[self.boundary]

    @property
    def hash(self) -> str:
        """16 hex digits that are equal only for tokenizers that give the same ids."""
        content = json.dumps([[left.hex(), right.hex()] for left, right in self.merges] + list(self.control))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id, whatever the text contains."""
        if _has_blank(text):
            return self._hugging_face().encode(whole_pairs(text)).ids
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        if any(map(_has_blank, texts)):
            return [self.encode(text) for text in texts]
        return self._bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind the ids; a token may end in the middle of a character. InputError for an id it has not."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InputError(f"ids from {min(ids)} to {max(ids)}: this tokenizer has 0 … {self.vocab_size - 1}")
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, control tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text behind each id, 0 for control tokens: for bits per byte."""
        return [0 if i in self.control.values() else len(b) for i, b in enumerate(self.token_bytes)]

    def character_counts(self) -> list[int]:
        """Characters that begin in the text behind each id, 0 for control tokens: for bits per character."""
        return [sum(byte & 0xC0 != 0x80 for byte in b[len(b) - length :])  # other bytes go on with a character
                for b, length in zip(self.token_bytes, self.byte_lengths())]

    def for_chat(self) -> "Tokenizer":
        """This tokenizer with the chat tokens, added where missing, and the chat template."""
        missing = [name for name in CHAT_TOKENS if name not in self.control]
        return Tokenizer(self.merges, [*self.control, *missing], CHAT_TEMPLATE)

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's tokenizer, 50,257 ids, from the file in this package."""
        lines = Path(__file__).with_name("gpt2_merges.txt").read_text(encoding="utf-8").splitlines()
        return cls([_printable_merge(line.split(" ")) for line in lines[1:]])  # line 0: a version

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges that shorten `texts` most; the chat tokens have ids from birth.

        The total is vocab_size rounded down to a multiple of 64 (wide products like that), or
        fewer if the texts have too few repetitions. At least 320: bytes, control tokens and 59 merges.
        """
        if not 320 <= vocab_size <= 1_000_000:  # the trainer asks for the memory of all of them
            raise InputError(f"--vocab-size is {vocab_size}, must be at least 320 and at most a million")

        def pieces():
            for text in texts:
                if len(text) > WORD and max(map(len, re.findall(r"\S+|\s+", text))) > WORD:
                    yield from (text[i : i + WORD] for i in range(0, len(text), WORD))
                else:
                    yield text

        control = [END_OF_TEXT, *CHAT_TOKENS]
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size // 64 * 64 - len(control),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        bpe.train_from_iterator(pieces(), trainer)
        merges = json.loads(bpe.to_str())["model"]["merges"]
        total = 256 + len(merges) + len(control)
        if total >= 320:
            merges = merges[: total // 64 * 64 - 256 - len(control)]
        return cls([_printable_merge(merge) for merge in merges], control)

    def _hugging_face(self) -> tokenizers.Tokenizer:
        """The same without the control tokens, for `tokenizers`."""
        vocab = {_printable(token): i for i, token in enumerate(self.token_bytes[: 256 + len(self.merges)])}
        merges = [(_printable(left), _printable(right)) for left, right in self.merges]
        bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        return bpe

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer opens."""
        bpe = self._hugging_face()
        bpe.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in self.control]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # token_type_ids would be added to the input, as words
            "bos_token": self.boundary,
            "eos_token": END_OF_TURN if self.chat_template else self.boundary,
            "pad_token": self.boundary,
            "additional_special_tokens": [name for name in self.control if name != self.boundary],
        }
        if self.unknown:
            config["unk_token"] = self.unknown
        if self.chat_template:
            config["chat_template"] = self.chat_template
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Open tokenizer.json, or the older vocab.json + merges.txt, of a Hugging Face folder.

        Raises InputError if there is none, or if it is not a byte-level BPE in merge order
        (wordpiece.load opens BERT's vocabularies too). A chat template other than ours is left
        out, with a line: dialogue.py could not render it.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            path = folder / "tokenizer.json"
            vocab, merges, control = _read_tokenizer_json(path)
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            path = folder / "merges.txt"
            vocab, merges, control = _read_vocab_and_merges(folder)
        else:
            raise InputError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
        if not (isinstance(vocab, dict) and isinstance(merges, list)
                and all(type(i) is int for i in (*vocab.values(), *control.values()))):
            raise InputError(f"{path}: damaged: no vocabulary with a number for each token, and list of merges")
        text_tokens = 256 + len(merges)
        control |= {name: i for name, i in vocab.items() if i >= text_tokens}
        template = read_template(folder)
        try:
            merges = [_printable_merge(m.split(" ") if isinstance(m, str) else m) for m in merges]
            tokenizer = cls(merges, sorted(control, key=control.__getitem__), template)
        except (InputError, UnicodeEncodeError) as error:  # the second: half a surrogate pair in a name
            raise InputError(f"{path}: {error}") from None
        ours = {_printable(token): i for i, token in enumerate(tokenizer.token_bytes[:text_tokens])}
        if tokenizer.control != control or ours | control != vocab | control:
            raise InputError(f"{path}: ids do not follow the order of the merges, as GPT-2's do")
        if not _reaches_all(ours, merges):
            raise InputError(f"{path}: its merges do not lead to all of its tokens, as trained ones do")
        if END_OF_TEXT not in control:
            raise InputError(f"{path}: has no {END_OF_TEXT} token; found {reprlib.repr(list(control))}")
        return tokenizer


def _read_tokenizer_json(path: Path) -> tuple:
    """(vocabulary, merges, ids of control tokens) as the file has them; InputError if it is no byte-level BPE."""
    data = read_json(path)
    model, splitter = data.get("model") or {}, data.get("pre_tokenizer") or {}
    added = data.get("added_tokens", [])
    if not (isinstance(model, dict) and isinstance(splitter, dict) and isinstance(added, list)
            and all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added)):
        raise InputError(f"{path}: damaged: no model, pre_tokenizer and added_tokens as `tokenizers` writes them")
    kind = model.get("type", "BPE")
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if kind != "BPE" or not plain or splitter.get("add_prefix_space") or data.get("normalizer"):
        seen = f"{kind} with pre-tokenizer {splitter.get('type')} and normalizer {data.get('normalizer')}"
        seen = " ".join(seen.split())[:200]
        raise InputError(f"{path}: {seen}; only byte-level BPE, GPT-2's kind, and BERT's WordPiece are read")
    return model.get("vocab"), model.get("merges"), {token["content"]: token.get("id") for token in added}


def _read_vocab_and_merges(folder: Path) -> tuple:
    """The same of the older files."""
    added = folder / "added_tokens.json"
    lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return read_json(folder / "vocab.json"), merges, read_json(added) if added.exists() else {}


def read_template(folder: Path) -> str | None:
    """The folder's chat template if it is ours; newer versions of transformers keep it in a file of its own."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = None
    if file.exists():
        template = file.read_text(encoding="utf-8", errors="replace")
    elif config.exists():
        template = read_json(config).get("chat_template")
    if template not in (None, CHAT_TEMPLATE):
        print(f"{folder}: its chat template is not {TEMPLATE_NAME}; left out", file=sys.stderr)
        return None
    return template


def _has_blank(text: str) -> bool:
    """Finds any 2 · BLANK white-space characters in a row, and some shorter; costs a short text nothing."""
    return any(text[i : i + BLANK].isspace() for i in range(0, len(text) - BLANK + 1, BLANK))


# On disk each byte is a printable character, so that a vocabulary is a text file: a visible
# Latin-1 character stands for itself, the other bytes are shifted up by 256, in order ("Ġ" is a
# space). The visible ones come first among the ids.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
BYTES_IN_ORDER = VISIBLE + HIDDEN
CHARACTER = {b: chr(b) for b in VISIBLE} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
BYTE = {character: b for b, character in CHARACTER.items()}


def _printable(token: bytes) -> str:
    return "".join(CHARACTER[b] for b in token)


@lru_cache(maxsize=1 << 16)
def _raw(token: str) -> bytes:
    return bytes(BYTE[c] for c in token)


def _printable_merge(pair: Sequence[str]) -> tuple[bytes, bytes]:
    try:
        left, right = pair
        return _raw(left), _raw(right)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{reprlib.repr(pair)} is no merge of two byte-level tokens") from None


def _reaches_all(vocab: dict[str, int], merges: list[tuple[bytes, bytes]]) -> bool:
    """Whether the bytes of each token are merged into it, as in every trained BPE.

    tiktoken joins any two pieces that make a token, Hugging Face only the two of a merge: they
    give equal ids where this holds.
    """
    pairs = [(_printable(left), _printable(right)) for left, right in merges]
    if not all(part in vocab for pair in pairs for part in pair):
        return False
    bpe = models.BPE(vocab, pairs)
    return all(len(bpe.tokenize(token)) == 1 for token in vocab)


def main() -> None:
    """Train a byte-level BPE on text files and show what it saves."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.tokenizer", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="UTF-8 text files: the training split only")
    parser.add_argument("--vocab-size", type=int, default=8192, help="ids in all (default: 8192)")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale says
    args = parser.parse_args()

    def chunks():  # bounded memory, whatever the file size; a cut costs at most one merge
        for path in args.files:
            try:
                with open(path, encoding="utf-8-sig") as file:
                    while chunk := "".join(islice(file, 1000)):
                        yield chunk
            except UnicodeDecodeError as error:
                read_text(path)  # says where; of a pipe there is nothing left to read
                raise InputError(f"{path}: not UTF-8: {error}") from None
            except IsADirectoryError:
                raise InputError(f"{path} is a folder: name its files") from None

    try:
        tokenizer = Tokenizer.train(chunks(), args.vocab_size)
        sample = next(chunks(), "")
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.out)
    except (InputError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    ours, gpt2 = len(tokenizer.encode(sample)), len(Tokenizer.gpt2().encode(sample))
    print(f"{args.out}: {tokenizer.vocab_size:,} ids, hash {tokenizer.hash}")
    print(f"first {len(sample):,} characters: {ours:,} tokens; GPT-2's tokenizer needs {gpt2:,}")


if __name__ == "__main__":
    main()
