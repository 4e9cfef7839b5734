"""Task 4. One step of byte-pair encoding.

Count how often each two tokens stand side by side, and make the most frequent pair one token, everywhere. (Sennrich et
al. 2016, algorithm 1.) If several pairs are equally frequent, take the one that comes first in the text.

Careful: in "aaa" the pair (a, a) occurs twice, but can be merged only once: from left to right, to "aa" and "a".

    pytest exercises/04_merge_step.py
"""

from nanochat.tokenizer import Tokenizer


def merge_step(tokens: list[bytes]) -> tuple[tuple[bytes, bytes], list[bytes]]:
    """A text as tokens → (the pair that was merged, the tokens afterwards)."""
    raise NotImplementedError("collections.Counter(zip(tokens, tokens[1:])) counts the pairs")


def test_merge_step():
    found = merge_step([b"a", b"b", b"c", b"a", b"b"])
    assert found == ((b"a", b"b"), [b"ab", b"c", b"ab"]), f"a b c a b: the pair (a, b) twice becomes ab, not {found}"
    pair, after = merge_step([b"a"] * 5 + [b"b"])
    assert after == [b"aa", b"aa", b"a", b"b"], f"each token belongs to one merge at most; five a and a b became {after}"
    assert merge_step([b"x", b"y", b"x", b"z"])[0] == (b"x", b"y"), "of equally frequent pairs the first"
    word = b"banana" * 3
    tokens = [bytes([byte]) for byte in word]
    learned = []
    for _ in range(4):
        pair, tokens = merge_step(tokens)
        learned.append(pair)
        assert b"".join(tokens) == word, "merging must not lose or move a byte"
    ids = Tokenizer(learned).encode(word.decode())
    assert tokens == [Tokenizer(learned).decode_bytes([i]) for i in ids], "the project's tokenizer with your merges cuts otherwise"
