"""The package alone, from its wheel, away from the repository: it loads, generates, trains, serves and explores."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE
from transformers import GPT2Config, GPT2LMHeadModel

import nanochat
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
PROGRAM = '''
import importlib, json, pkgutil, sys
from pathlib import Path

for name in ("data", "train", "finetune", "sample"):
    sys.modules[name] = None  # to import it is an error: the wheel has none of them

import torch
import nanochat

for module in pkgutil.iter_modules(nanochat.__path__):
    importlib.import_module(f"nanochat.{module.name}")

from nanochat import checkpoint, corpus, evaluate, generate, training
from nanochat.generate import SampleConfig
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training import TrainConfig

model, gpt2 = checkpoint.load("gpt2-folder")
new, _ = generate.generate_ids(model, [gpt2.encode("The river runs")], SampleConfig(max_new_tokens=5, temperature=0))

shards = corpus.prepare("text.txt", "shards", vocab_size=320)
tokenizer = Tokenizer.load(shards)
small = GPT(GPTConfig(tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16))
train_split, val_split = (corpus.TokenStream(shards, split, tokenizer, 16) for split in ("train", "val"))

def evaluation():
    return {f"val_{key}": value for key, value in evaluate.score(small, tokenizer, val_split.batches(8)).items()}

progress = training.train(small, tokenizer, train_split, TrainConfig(max_steps=4, warmup_steps=1), out=Path("out"), settings={},
                          device=torch.device("cpu"), dtype=torch.float32, evaluate=evaluation, sample=dict)
again, _ = checkpoint.load("out")
print(json.dumps({"package": nanochat.__file__, "new": new, "steps": progress.step, "loss": progress.best_loss,
                  "reloaded": all(map(torch.equal, again.state_dict().values(), small.state_dict().values()))}))
'''


def run(*command, cwd: Path, **env) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, encoding="utf-8", timeout=300, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from copies, with the setuptools that is installed: nothing is downloaded, nothing written in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nanochat", source / "nanochat", ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", source / "wheels", source, cwd=source)
    [found] = (source / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder outside the repository with a small GPT-2 and a text, and the environment in which the wheel is installed."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=folder)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)).save_pretrained(folder / "gpt2-folder")
    (folder / "text.txt").write_text("The river runs past the mill, and the boats go by.\n\n" * 200, encoding="utf-8")
    return folder, {"PYTHONPATH": os.pathsep.join(map(str, (site, OFFLINE))), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = [path.relative_to(ROOT).as_posix() for path in (ROOT / "nanochat").iterdir() if path.suffix in (".py", ".html", ".txt")]
    assert packed == set(here) and {"nanochat/gpt2_merges.txt", "nanochat/chat.html", "nanochat/explore.html"} <= packed


@pytest.mark.slow
def test_the_installed_package_loads_generates_and_trains(elsewhere):
    folder, env = elsewhere
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    result = json.loads(run("program.py", cwd=folder, **env).stdout.splitlines()[-1])
    site = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    assert Path(result["package"]).is_relative_to(site)
    assert [found.version for found in distributions(path=[str(site)])] == [nanochat.__version__]
    prompt = torch.tensor([Tokenizer.gpt2().encode("The river runs")])
    theirs = GPT2LMHeadModel.from_pretrained(folder / "gpt2-folder").generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert result["new"] == theirs[:, prompt.size(1) :].tolist()
    assert result["steps"] == 4 and result["reloaded"]
    assert 4 < result["loss"] < 6.5  # ln 320 is 5.77


@pytest.mark.slow
def test_the_installed_server_answers(elsewhere):
    folder, env = elsewhere
    command = [sys.executable, "-m", "nanochat.server", "--checkpoint", "gpt2-folder", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, encoding="utf-8", env=os.environ | env) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with urllib.request.urlopen(address, timeout=30) as page, urllib.request.urlopen(f"{address}/v1/models", timeout=30) as models:
                assert page.read().lower().startswith(b"<!doctype html>")
                assert b'"gpt2-folder"' in models.read()
        finally:
            server.send_signal(signal.SIGTERM)
            server.stderr.read()
        assert server.wait(30) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_installed_explorer_writes_its_page(elsewhere):
    folder, env = elsewhere
    run("-m", "nanochat.explore", "--checkpoint", "gpt2-folder", "--prompt", "The river runs", "--out", "page.html", cwd=folder, **env)
    assert "river" in (folder / "page.html").read_text(encoding="utf-8")
