"""Task 7. Of a dialogue, what is learned?

A conversation becomes one row of ids: <|endoftext|>, then of each message its role's token, its text and <|end|>. Learned
is what the assistant has to say by itself: its text and the <|end|> that stops it. Not its role token: that one is given.

Then the shift: at position t the network is asked for id t + 1. A target that is not learned is −100 (IGNORED).

    pytest exercises/07_loss_mask.py
"""

from nanochat import dialogue
from nanochat.model import IGNORED
from nanochat.rows import Rows, Window
from nanochat.tokenizer import Tokenizer


def inputs_and_targets(start: int, turns: list[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """→ inputs and targets, of equal length.

    start: the id of <|endoftext|>. turns: (role, ids) pairs; ids are the role token, the text, and <|end|>.
    """
    raise NotImplementedError("first ids and a mask of equal length, then inputs = ids[:-1] and targets from ids[1:]")


def test_inputs_and_targets():
    inputs, targets = inputs_and_targets(0, [("user", [1, 50, 51, 9]), ("assistant", [2, 60, 9])])
    assert inputs == [0, 1, 50, 51, 9, 2, 60], "all ids but the last"
    assert IGNORED in targets and 51 not in targets, "what the user says is not learned"
    assert targets[-1] == 9, "the <|end|> of a reply is learned, or the model never stops"
    assert 2 not in targets, "the role token is given, not said"
    assert targets[5] == 60, "at the role token the network is asked for the first id of the reply: shift by one"

    tokenizer = Tokenizer.gpt2().for_chat()
    said = [("system", "Be brief."), ("user", "Where is the mill?"), ("assistant", "By the river."), ("user", "Old?"), ("assistant", "Very.")]
    messages = [{"role": role, "content": content} for role, content in said]
    turns = [(m["role"], dialogue.render_turn(m, tokenizer)[0]) for m in messages]
    batch = Rows([[Window(*dialogue.render(messages, tokenizer))]], 64).batch([0])
    inputs, targets = inputs_and_targets(tokenizer.end_of_text, turns)
    assert inputs == batch.inputs[0, : len(inputs)].tolist()
    assert targets == batch.targets[0, : len(targets)].tolist()
