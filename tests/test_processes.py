"""Several processes, as torchrun starts them: the same run, written once; and stopped, resumed and refused as one."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import TEXT
from safetensors.torch import load_file
from test_training import BLOCK, RandomExamples, assert_equal_states, run, tiny, without_times

from nanochat import checkpoint, evaluate, runs, runtime
from nanochat.model import GPT, IGNORED, Batch, forward_flops_per_token
from nanochat.runtime import read_metrics
from nanochat.tokenizer import Tokenizer
from nanochat.training import example_order

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


def torchrun(*command, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a script in several processes, as a user does."""
    paths = [str(ROOT), str(TESTS), os.environ["PYTHONPATH"]]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, command)],
        cwd=cwd, capture_output=True, encoding="utf-8", timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)})


# ------------------------------------------------------------------ one process and two, side by side

# Twelve examples, four micro-batches of three: a step is all of them. Two processes take every other micro-batch.
STEP = dict(batch_size=3, accumulate=4, max_steps=6, learning_rate=1e-2, clip=0.9)
UNEVEN = [1, 0, 0, 4, 3, 0, 0, 0, 0, 16, 16, 8]  # 1, 7, 0 and 40 tokens to learn from
ONE_SIDED = [3, 0, 16, 0, 0, 0, 9, 9, 9, 0, 0, 0]  # the second process has none
OPTIMIZERS = ["adamw", "muon"]
COMPILER = "inductor" if os.environ.get("COMPILED_FOR_REAL") else "eager"


def in_this_order(supervised: list[int]) -> RandomExamples:
    """Examples that the first step of a run meets with these numbers of supervised tokens."""
    counts = dict(zip(example_order(0, 12, 12, seed=3), supervised))
    return RandomExamples([counts[index] for index in range(12)])


class Numbered:
    """Batches of which it is told who has read them."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        data = RandomExamples([1, 7, 0, 16, 3, 16, 2])
        return (data.batch([index]) for index in range(self.count))


def in_each_process(folder: Path) -> None:
    """What both do, one process or two: every run into a folder of its own, and beside it what each process saw."""
    tokenizer = Tokenizer.train([TEXT * 20], 384).for_chat()
    seen: dict[str, object] = {}

    for optimizer in OPTIMIZERS:
        for name, supervised in (("uneven", UNEVEN), ("one-sided", ONE_SIDED)):
            model, gradients = tiny(tokenizer).double(), []

            def clip(parameters, limit, real=torch.nn.utils.clip_grad_norm_, model=model, gradients=gradients):
                if limit == STEP["clip"]:  # in a step, not in the rehearsal
                    gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
                return real(parameters, limit)

            with patch.object(torch.nn.utils, "clip_grad_norm_", clip), patch.object(runtime, "product_speed", lambda *_: 1e9):
                run(model, in_this_order(supervised), folder / f"{name}-{optimizer}", tokenizer, optimizer=optimizer, **STEP)
            seen[f"{name}-{optimizer}"] = dict(gradients=gradients, weights=model.state_dict())

        for compile_flag in ("no", "yes"):
            model = tiny(tokenizer)
            with patch.object(torch, "compile", partial(torch.compile, backend=COMPILER)):
                run(model, in_this_order(UNEVEN), folder / f"compile-{compile_flag}-{optimizer}", tokenizer,
                    optimizer=optimizer, compile=compile_flag, **STEP)

    model = tiny(tokenizer).double()
    for count in (0, 1, 5):
        seen[f"score-{count}"] = evaluate.score(model, tokenizer, Numbered(count))

    # three steps, cut, and three more
    cut = dict(STEP, save_every=3, eval_every=6)
    run(tiny(tokenizer, dropout=0.2), in_this_order(UNEVEN), folder / "dropout", tokenizer, **cut)
    run(tiny(tokenizer, dropout=0.2), in_this_order(UNEVEN), folder / "dropout-cut", tokenizer, **cut)
    runtime.from_rank_0(lambda: shutil.rmtree(folder / "dropout-cut" / "step-000006"))
    torch.manual_seed(99)
    go_on(folder / "dropout-cut", tokenizer, **cut)
    run(tiny(tokenizer), in_this_order(UNEVEN), folder / "to-move", tokenizer, **cut)
    runtime.from_rank_0(lambda: shutil.rmtree(folder / "to-move" / "step-000006"))
    torch.save(seen, folder / f"seen-{runtime.rank()}")


def go_on(out: Path, tokenizer: Tokenizer, **settings) -> None:
    step, state = runtime.from_rank_0(lambda: runs.open_run(out, resume=True, overwrite=False))
    run(checkpoint.load(step)[0], in_this_order(UNEVEN), out, tokenizer, resume=state, **settings)
