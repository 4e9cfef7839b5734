"""On a machine with a CUDA device: pytest -m gpu. The same network, loop and scripts, in half precision."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from queue import Queue

import pytest
import torch

from nanochat import InputError, rehearsal, runtime
from nanochat.batching import Batcher, Job
from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, Batch, GPTConfig
from nanochat.packed import int8, ready
from nanochat.training import TrainConfig, build_optimizer

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")


def test_logits_equal_the_cpus(make_model):
    gpt = make_model()
    tokens = torch.randint(97, (2, 20))
    expected = gpt(tokens)
    torch.testing.assert_close(gpt.to(CUDA)(tokens.to(CUDA)).cpu(), expected, rtol=1e-9, atol=1e-9)


def test_cached_decoding_equals_the_cpus(make_model):
    gpt = make_model()
    prompts, config = [[1, 2, 3], [4, 5, 6, 7, 8]], SampleConfig(temperature=0, max_new_tokens=60)
    expected = generate_ids(gpt, prompts, config)
    assert generate_ids(gpt.to(CUDA), prompts, config) == expected


@pytest.mark.parametrize("quantize, compile", [("int8", False), ("none", True), ("int8", True)])
def test_every_way_of_decoding_says_the_same(make_model, quantize, compile):
    gpt = make_model(torch.float32)
    prompts, config = [[1, 2, 3], [4, 5, 6, 7, 8]], SampleConfig(temperature=0, max_new_tokens=60)
    exact = GPT(gpt.config).eval()
    exact.load_state_dict(gpt.state_dict())
    if quantize == "int8":
        for name, p in exact.named_parameters():
            if p.dim() == 2 and name != "wpe.weight":
                numbers, scale = int8(p.data)
                p.data = numbers * scale
    expected = generate_ids(exact.to(CUDA), prompts, config)
    ready(gpt, CUDA, torch.float32, quantize, compile)
    assert generate_ids(gpt, prompts, config) == expected
    heard = [Queue() for _ in prompts]  # all of it again in the thread of a server
    batcher = Batcher(gpt, rows=2)
    batcher.submit(*(Job(prompt, config, queue.put) for prompt, queue in zip(prompts, heard)))
    batcher.close()
    assert [[token.id for token in list(queue.queue)[:-1]] for queue in heard] == expected[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_precision_learns_a_pattern(dtype, optimizer):
    gpt = GPT(GPTConfig(vocab_size=64, block_size=64, n_layer=2, n_head=2, n_embd=64)).to(CUDA)
    built = build_optimizer(gpt, TrainConfig(optimizer=optimizer, learning_rate=3e-3))
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    inputs = torch.arange(64, device=CUDA).expand(4, -1)
    targets = (inputs + 1) % 64
    losses = []
    for _ in range(60):
        with runtime.autocast(CUDA, dtype):
            loss = gpt(inputs, targets) / targets.numel()
        scaler.scale(loss).backward()
        scaler.unscale_(built)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        scaler.step(built)
        scaler.update()
        built.zero_grad()
        losses.append(loss.item())
    assert math.isclose(losses[0], math.log(64), rel_tol=0.1) and losses[-1] < 0.5
    assert all(p.dtype == torch.float32 for p in gpt.parameters())


def test_the_probe_chooses_a_half_precision():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert runtime.pick_dtype("auto", CUDA) == expected


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_three_scripts_run(dtype, tmp_path):
    samples = ROOT / "data" / "samples"
    tiny = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--vocab-size", "384", "--block-size", "128"]
    for command in (
        ["train.py", "--data", samples / "garden.txt", *tiny, "--max-steps", "20", "--dtype", dtype],
        ["finetune.py", "--data", samples / "dialogues.jsonl", "--val-data", samples / "dialogues.jsonl",
         "--max-steps", "20", "--dtype", dtype],
        ["sample.py", "--prompt", "Good evening!", "--max-new-tokens", "8"],
    ):
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=tmp_path,
                              capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert command[0] == "sample.py" or "on cuda" in done.stderr


@pytest.mark.parametrize("flags", [["--method", "lora"], ["--method", "freeze", "--learn", "1"], ["--task", "classify", "--balance"]])
def test_every_way_of_finetuning_runs_and_resumes(flags, tmp_path):
    assert train_tiny(tmp_path, "--max-steps", "4").returncode == 0
    texts = [{"text": f"{i} boats {'go' if i % 2 else 'come'}", "label": "go" if i % 2 else "come"} for i in range(120)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    data = tmp_path / "texts.jsonl" if "classify" in flags else ROOT / "data" / "samples" / "dialogues.jsonl"
    for more in (["--max-steps", "8", "--save-every", "4"], ["--resume"]):
        command = ["--data", data, "--val-data", data, *flags, *more] if "--resume" not in more else more
        done = subprocess.run([sys.executable, str(ROOT / "finetune.py"), *map(str, command)], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / "out" / "finetuned" / "step-000008")  # as a kill would leave it


def train_tiny(cwd: Path, *flags) -> subprocess.CompletedProcess:
    command = ["--data", ROOT / "data" / "samples" / "garden.txt", "--n-layer", "2", "--n-head", "2", "--n-embd", "64",
               "--vocab-size", "384", "--block-size", "128", *flags]
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, command)], cwd=cwd, capture_output=True,
                          encoding="utf-8")


@pytest.mark.parametrize("flags", [[], ["--compile", "yes"], ["--dtype", "float16"], ["--recompute"]])
def test_a_resumed_run_ends_where_the_whole_one_does(flags, tmp_path):
    flags = [*flags, "--max-steps", "8", "--save-every", "4", "--eval-every", "8", "--dropout", "0.1"]
    whole = train_tiny(tmp_path, *flags)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out" / "pretrained"
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out / "step-000008")  # as a kill after step 4 would leave it
    resumed = train_tiny(tmp_path, *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    again = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert again == pytest.approx(losses, rel=1e-5)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(tmp_path):
    # rows of 128 tokens: 33 million, some 300 GB of activations
    refused = train_tiny(tmp_path, "--batch-size", 2**18, "--max-steps", "1")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    flags = re.search(r"--batch-size \d+ --accumulate \d+(?= fits)", refused.stderr)
    assert flags, refused.stderr


def test_the_allocator_of_the_gpu_running_out_is_one_line_with_a_pair():
    """Where the estimate is too low, the rehearsal itself runs out, and finds the pair by trying."""
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        gpt = GPT(GPTConfig(vocab_size=8192, block_size=512, n_layer=4, n_head=4, n_embd=256)).to(CUDA)
        optimizer = build_optimizer(gpt, TrainConfig())
        tokens = torch.zeros(512, 512, dtype=torch.int64, device=CUDA)
        with pytest.raises(InputError, match=r"does not fit the memory of cuda.*--batch-size \d+ --accumulate \d+ fits"):
            rehearsal.rehearse(gpt, optimizer, Batch(tokens, tokens), 1, torch.float32, "no", 1, lambda seconds: 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
