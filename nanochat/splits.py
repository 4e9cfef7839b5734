"""Training, validation and test examples, and what of the held-out ones was seen in training all the same.

An example is a conversation or a labelled text: anything that JSON can write.

Source: Broder 1997 (sketches: how alike two texts are, from a few of their pieces).
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

SHINGLE = 8  # bytes of the pieces by which texts are compared: a word or two, or two or three Chinese characters
SKETCH = 64  # pieces that stand for a text
ALIKE = 0.8  # share of them from which on two texts count as near duplicates


def split(examples: list, shares: Sequence[float] = (0.9, 0.05, 0.05)) -> list[list]:
    """Training, validation and test examples, by a hash of their text.

    The hash, not the place in the file, decides: equal examples fall on the same side, and
    adding some moves none. Sets are therefore near their shares, not exactly at them.
    """
    parts: list[list] = [[] for _ in shares]
    for example in examples:
        draw = int.from_bytes(hashlib.sha256(text_of(example).encode("utf-8", "replace")).digest()[:8], "big") / 2**64
        for part, share in zip(parts, shares):
            if draw < share or part is parts[-1]:
                part.append(example)
                break
            draw -= share
    return parts


def text_of(example) -> str:
    """An example as one text, equal only for equal examples."""
    return json.dumps(example, ensure_ascii=False, sort_keys=True)


def seen_in_training(train: Iterable[str], held_out: Sequence[str]) -> tuple[int, int]:
    """How many held-out texts are also training texts: → (word for word, nearly so).

    Nearly: the smallest hashes of the pieces of both texts together are mostly in both, which
    estimates what share of all their pieces they have in common.
    """
    sketches = [sketch(text) for text in held_out]
    with_piece = defaultdict(list)  # hash of a piece → held-out texts that have it in their sketch
    for number, pieces in enumerate(sketches):
        for piece in pieces:
            with_piece[piece].append(number)
    places = defaultdict(list)
    for number, text in enumerate(held_out):
        places[text].append(number)
    exact, near = set(), set()
    for text in tqdm(train, "looking for duplicates", leave=False, unit="text", delay=2, disable=None):
        exact.update(places.get(text, ()))
        pieces = sketch(text)
        shared = Counter(number for piece in pieces for number in with_piece.get(piece, ()))
        for number, count in shared.items():
            if count < ALIKE * min(len(pieces), len(sketches[number])) or number in near:
                continue
            together = sorted({*pieces, *sketches[number]})[:SKETCH]
            if len({*pieces} & {*sketches[number]} & {*together}) >= ALIKE * len(together):
                near.add(number)
    return len(exact), len(near - exact)


def sketch(text: str) -> list[int]:
    """The SKETCH smallest hashes of a text's pieces of SHINGLE bytes."""
    data = np.frombuffer(text.encode("utf-8", "replace").ljust(SHINGLE), np.uint8)
    pieces = np.lib.stride_tricks.sliding_window_view(data, SHINGLE).copy().view("<u8").ravel()
    mixed = (pieces ^ (pieces >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # two rounds of splitmix64's mixing
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return np.unique(mixed)[:SKETCH].tolist()
