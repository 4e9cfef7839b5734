"""Training, validation and test examples, and what of the held-out ones was seen in training all the same.

An example is a conversation or a labelled text: anything that JSON can write.

Sources: Broder 1997 (how alike two texts are, from a few of their pieces); Li, Owen and Zhang 2012 (all of these by
one hash); Indyk and Motwani 1998 (finding the alike ones without comparing all).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

SHINGLE = 8  # bytes of the pieces by which texts are compared: a word or two, or two or three Chinese characters
SKETCH = 64  # pieces that stand for a text, at most
BAND = 4  # of them in a row, by which texts that may be alike are found
ALIKE = 0.8  # share of them from which on two texts count as near duplicates
NOTHING = np.uint64(2**64 - 1)  # in a sketch, where a text has no piece


def split(examples: list, shares: Sequence[float] = (0.9, 0.05, 0.05)) -> list[list]:
    """Training, validation and test examples, by a hash of all that an example holds.

    The hash, not the place in the file, decides: equal examples fall on the same side, and
    adding some moves none. Sets are therefore near their shares, not exactly at them. Two that differ in
    anything, be it the label, may fall on two sides: `seen_in_training` tells.
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

    Nearly: of the places of both sketches that hold something, most hold the same. To be compared at all, two
    sketches need one band in common: of texts that are 80 % alike, one pair in five thousand has none.
    """
    sketches = np.array([sketch(text) for text in held_out]).reshape(-1, SKETCH)
    lists = defaultdict(list)
    for number, pieces in enumerate(sketches):
        for band in bands(pieces):
            lists[band].append(number)
    with_band = {band: np.array(numbers) for band, numbers in lists.items()}
    places = defaultdict(list)
    for number, text in enumerate(held_out):
        places[text].append(number)
    exact: set[int] = set()
    near: set[int] = set()
    for text in tqdm(train, "looking for duplicates", leave=False, unit="text", delay=2, disable=None):
        exact.update(places.get(text, ()))
        pieces = sketch(text)
        compare = np.zeros(len(sketches), dtype=bool)
        for band in bands(pieces):
            if band in with_band:
                compare[with_band[band]] = True
        if compare.any():
            numbers = compare.nonzero()[0]
            others = sketches[numbers]
            same = ((others == pieces) & (pieces != NOTHING)).sum(1)
            either = ((others != NOTHING) | (pieces != NOTHING)).sum(1)
            near.update(numbers[same >= ALIKE * either].tolist())
    return len(exact), len(near - exact)


def sketch(text: str) -> np.ndarray:
    """The hashes of a text's pieces fall into SKETCH classes; of each class the smallest, or NOTHING: (SKETCH,) uint64."""
    data = np.frombuffer(text.encode("utf-8", "replace").ljust(SHINGLE), np.uint8)
    pieces = np.lib.stride_tricks.sliding_window_view(data, SHINGLE).copy().view("<u8").ravel()
    mixed = (pieces ^ (pieces >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # two rounds of splitmix64's mixing
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    smallest = np.full(SKETCH, NOTHING)
    np.minimum.at(smallest, mixed >> np.uint64(64 - 6), mixed)  # the first 6 bits of a hash are its class
    return smallest


def bands(pieces: np.ndarray) -> list[tuple[int, bytes]]:
    """A sketch in parts of BAND places, each with its number; those with nothing in them are left out."""
    parts = pieces.reshape(-1, BAND)
    return [(int(i), parts[i].tobytes()) for i in (parts != NOTHING).any(1).nonzero()[0]]
