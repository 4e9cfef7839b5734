"""nanochat: a GPT you can read in an afternoon, train, fine-tune and talk to.

The rooms are modules; import the one that you need:

    from nanochat import checkpoint
    model, tokenizer = checkpoint.load("gpt2")
"""

__version__ = "0.1.0"


class InputError(Exception):
    """What the user gave cannot be used; the message is one line and says what to change."""
