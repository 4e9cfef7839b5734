"""What all tests share: no network, tiny models, a tiny tokenizer."""

import os
import runpy
import signal
from functools import cache
from pathlib import Path

import pytest
import torch

OFFLINE = Path(__file__).parent / "offline"
runpy.run_path(str(OFFLINE / "sitecustomize.py"))  # this process; the line below: those it starts
os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and so would the tests
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

from nanochat import runtime  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402

product_speed = runtime.product_speed
runtime.product_speed = cache(lambda device, dtype, size=256: product_speed(device, dtype, size))  # of 2048 it takes seconds

TEXT = """A small river runs past the mill. The miller's daughter counts the boats: one, two, three, and
by noon she has counted forty. 小河流过磨坊，磨坊主的女儿数着船。 "Where do they go?" she asks. 他们去海边。🙂
Boats carry grain, salt and letters; letters carry news, and news carries on until the evening.
"""


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 384 ids with the chat tokens and the chat template."""
    return Tokenizer.train([TEXT * 20], 384).for_chat()


@pytest.fixture
def make_model():
    """make_model(**settings) → a tiny float64 GPT in eval mode whose every weight matters.

    At their start biases are zero and an erf GELU moves logits by less than 1e-4: nothing would
    show. So N(0, 0.1) is added to every weight, and all sizes differ.
    """

    def make(dtype=torch.float64, noise=0.1, **settings) -> GPT:
        sizes = dict(vocab_size=97, block_size=24, n_layer=2, n_head=3, n_embd=36)
        model = GPT(GPTConfig(**sizes | settings)).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p += noise * torch.randn_like(p)
        return model.eval()

    return make
