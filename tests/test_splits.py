"""splits: what of the held-out texts was seen in training (that the split is by content: test_dialogue.py)."""

import random

import pytest

from nanochat.splits import NOTHING, seen_in_training, sketch, split, text_of
from nanochat.tasks import TASKS

WORDS = "river mill boat salt grain letter evening noon daughter sea count news carry wind water stone".split()


def story(seed: int, words: int = 120) -> str:
    """Words that no other story has in this order."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) + str(generator.randrange(1000)) for _ in range(words))


def test_texts_that_are_the_same_are_found_word_for_word():
    train = [story(i) for i in range(50)]
    assert seen_in_training(train, [train[7], story(99), train[7], "short", ""]) == (2, 0)
    assert seen_in_training([*train, "short", ""], ["short", "", "shorter"]) == (2, 0)
    assert seen_in_training([], train) == seen_in_training(train, []) == (0, 0)


@pytest.mark.parametrize("text", [story(1), "".join(chr(0x4E00 + i * 37 % 5000) for i in range(300))], ids=["English", "Chinese"])
def test_a_text_with_a_few_other_words_is_found_as_nearly_so(text):
    half = len(text) // 2
    changed = [text[:half] + "XYZ" + text[half + 3 :], "Well, " + text, text + " 🙂", text[:-9]]
    train = [*map(story, range(100, 140)), text]
    assert seen_in_training(train, changed) == (0, 4)
    assert seen_in_training(changed, [text, *changed[:1]]) == (1, 1)  # what is there word for word is not counted twice
    assert seen_in_training([text] * 5, changed[:1] * 2) == (0, 2)  # places are counted, not pairs


def test_texts_with_half_in_common_or_nothing_are_not_found():
    texts = [story(i) for i in range(300)]
    assert seen_in_training(texts[:250], texts[250:]) == (0, 0)
    halves = [story(i, 60) + " " + story(i + 1000, 60) for i in range(20)]
    others = [story(i, 60) + " " + story(i + 2000, 60) for i in range(20)]
    assert seen_in_training(halves, others) == (0, 0)
    assert seen_in_training(["yes, please", "no, thanks"], ["yes, thank you", "no"]) == (0, 0)


def test_a_sketch_estimates_the_share_of_pieces_in_common():
    one, other = story(1, 400), story(1, 400)[:1500] + story(2, 300)
    pieces = [{text.encode()[i : i + 8] for i in range(len(text) - 7)} for text in (one, other)]
    truth = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
    ours, theirs = sketch(one), sketch(other)
    assert abs((ours == theirs).mean() - truth) < 0.15 and 0.2 < truth < 0.8 and (ours != NOTHING).all()
    assert (sketch("ab") != NOTHING).sum() == 1 and (sketch("ab") == sketch("ab")).all()
    assert (sketch("ab\ud800") != NOTHING).any()  # of any text there is one


def test_a_system_text_that_all_share_makes_no_duplicates():
    task = TASKS["chat"]()
    conversations = [[{"role": "system", "content": story(0)}, {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]
                     for i in range(20)]
    texts = [task.text(conversation) for conversation in conversations]
    assert seen_in_training(texts[:10], texts[10:]) == (0, 0) and len(set(texts)) == 20


def test_labelled_texts_split_by_text_and_label():
    texts = [(story(i, 5), "a") for i in range(500)]
    parts = split(texts * 2)
    assert not set(parts[0]) & set(parts[1] + parts[2]) and sum(map(len, parts)) == 1000
    assert text_of(("a", "b")) == text_of(["a", "b"]) != text_of(["a", "c"])
