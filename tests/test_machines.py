"""Any machine, any locale: the scripts and tools on a host without a GPU, and where Python's text is not UTF-8."""

import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import finetune
import sample
import train
from nanochat import checkpoint, runtime, sources

ROOT = Path(__file__).parent.parent
GARDEN, DIALOGUES = (ROOT / "data" / "samples" / name for name in ("garden.txt", "dialogues.jsonl"))
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--vocab-size", "384", "--block-size", "128"]
SHORT = ["--max-steps", "2", "--batch-size", "2"]
BOM = b"\xef\xbb\xbf"


# any machine


def without_gpu(monkeypatch) -> None:
    """Make this a host without a GPU, on which whatever would start CUDA, or compile, is an error."""

    def forbidden(*args, **kwargs):
        raise AssertionError("CUDA, or the compiler, on a host that has none")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", forbidden)
    monkeypatch.setattr(torch._C, "_cuda_init", forbidden, raising=False)
    monkeypatch.setattr(torch, "compile", forbidden)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder in which each script has run on such a host, with no flag about devices or types.

    float32/ and bfloat16/ are what two CPUs made of it, a slow and a fast one by bf16's measure,
    with all that was printed in log.
    """
    folder = tmp_path_factory.mktemp("machines")
    lines = [
        (train.main, "--data", GARDEN, *TINY, *SHORT),
        (finetune.main, "--data", DIALOGUES, "--val-data", DIALOGUES, *SHORT),
        (sample.main, "--prompt", "Hi", "--max-new-tokens", 4),
    ]
    for dtype, faster in (("float32", 1.0), ("bfloat16", 3.0)):
        (folder / dtype).mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch, open(folder / dtype / "log", "w", encoding="utf-8") as log:
            without_gpu(monkeypatch)
            monkeypatch.setattr(runtime, "bf16_speedup", lambda faster=faster: faster)
            monkeypatch.chdir(folder / dtype)
            for main, *flags in lines:
                monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
                with redirect_stdout(log), redirect_stderr(log):
                    main()
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_script_runs_without_a_gpu_and_without_a_flag_for_it(runs, dtype):
    assert (runs / dtype / "log").read_text(encoding="utf-8").count(f"on cpu in {dtype}") == 2
    model, _ = checkpoint.load(runs / dtype / "out" / "finetuned")
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # whatever the products were made in


@pytest.mark.parametrize("faster, dtype", [(0.9, torch.float32), (1.1, torch.float32), (2.0, torch.bfloat16)])
def test_a_cpu_computes_in_bf16_only_where_the_probe_finds_it_clearly_faster(monkeypatch, faster, dtype):
    without_gpu(monkeypatch)
    monkeypatch.setattr(runtime, "bf16_speedup", lambda: faster)
    device = runtime.pick_device()
    assert (device.type, runtime.pick_dtype("auto", device)) == ("cpu", dtype)


def test_the_pool_that_cleans_articles_is_spawned_not_forked(tmp_path, monkeypatch):
    """A forked copy of a process that has threads, as torch has, may hang."""
    asked = []

    class Pool(sources.ProcessPoolExecutor):
        def __init__(self, *args, **kwargs):
            given = [*args, *kwargs.values()]
            asked.extend(value.get_start_method() for value in given if hasattr(value, "get_start_method"))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sources, "ProcessPoolExecutor", Pool)
    page = "<page><title>Lake</title><ns>0</ns><revision><text>A lake is a body of water, and a river is not.</text></revision></page>"
    (tmp_path / "lake.xml").write_text(f"<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>{page}</mediawiki>", encoding="utf-8")
    assert [title for title, _ in sources.documents(tmp_path / "lake.xml", workers=3)] == ["Lake"]
    assert asked == ["spawn"]


# any locale

# Several commands, one after the other, in one Python: a start takes seconds.
IN_ONE_PYTHON = """
import runpy, sys
commands = [[]]
for argument in sys.argv[1:]:
    commands.append([]) if argument == "then" else commands[-1].append(argument)
for command in commands:
    sys.argv, code = command, 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"\\x1e{code}", file=stream, flush=True)
"""
LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
]


def named(env: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in env.items())


in_every_locale = pytest.mark.parametrize("env", LOCALES, ids=named)


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def commands(*lines: list[str | Path], cwd: Path, env: dict[str, str], stdin: bytes = b"") -> list[Finished]:
    """Run each line, the path of a script or tool and its flags, with names and texts in UTF-8 bytes."""
    arguments = [os.fsencode(word) for line in lines for word in (*line, "then")][:-1]
    here = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    here |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IN_ONE_PYTHON, *arguments], cwd=cwd, env=here | env, input=stdin,
                          capture_output=True, timeout=300)
    out, err = (re.split("\x1e(\\d+)\n", stream.decode("utf-8")) for stream in (done.stdout, done.stderr))
    assert len(out) == 2 * len(lines) + 1 and done.returncode == 0, done.stderr.decode("utf-8")[-3000:]
    return [Finished(int(code), *texts) for code, *texts in zip(out[1::2], out[::2], err[::2])]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder whose names are Chinese, with an emoji; one text and one dialogue begin with a BOM, one of each is GBK."""
    (tmp_path / "小河🙂.txt").write_bytes(BOM + GARDEN.read_bytes())
    (tmp_path / "对话🙂.jsonl").write_bytes(BOM + DIALOGUES.read_bytes())
    (tmp_path / "小河.gbk.txt").write_bytes("小河流过磨坊。".encode("gbk") * 100)
    (tmp_path / "对话.gbk.jsonl").write_bytes(DIALOGUES.read_text("utf-8").encode("gbk", "replace"))
    return tmp_path


@pytest.mark.parametrize("env", LOCALES, ids=named)
def test_a_tokenizer_is_trained_from_and_into_any_file_name(env, folder):
    [ended] = commands([ROOT / "nanochat" / "tokenizer.py", "小河🙂.txt", "--vocab-size", "384", "--out", "词🙂"],
                       cwd=folder, env=env)
    assert ended.code == 0 and ": 384 ids" in ended.out and (folder / "词🙂" / "tokenizer.json").exists()


@pytest.mark.slow
@in_every_locale
def test_the_tools_and_sampling_take_any_text_and_any_file_name(env, runs, folder):
    (folder / "模型🙂").symlink_to(runs / "float32" / "out" / "finetuned")
    ended = commands(
        [ROOT / "nanochat" / "corpus.py", "小河🙂.txt", "片🙂", "--vocab-size", "384"],
        [ROOT / "nanochat" / "checkpoint.py", "模型🙂", "转🙂"],
        [ROOT / "nanochat" / "model.py", "--n-layer", "1"],
        [ROOT / "sample.py", "--checkpoint", "转🙂", "--raw", "--prompt", "小河🙂", "--stop", "停🙂", "--max-new-tokens", "4"],
        [ROOT / "sample.py", "--checkpoint", "模型🙂", "--system", "和气🙂", "--max-new-tokens", "4"],
        cwd=folder, env=env, stdin="你好🙂\n".encode() + b"\xff\xfe\xfa\n",
    )
    assert [command.code for command in ended] == [0] * 5, [command.err for command in ended]
    prepared, converted, _, completed, chat = ended
    assert "held out 1: 小河🙂.txt" in prepared.out and not (folder / "片🙂" / "train.jsonl").read_bytes().count(BOM)
    assert (folder / "转🙂" / "config.json").exists() and "wrote " in converted.out
    assert completed.out.startswith("小河🙂") and chat.out.count("\n") >= 2 and completed.err == chat.err == ""


def test_what_cannot_be_read_is_one_line_with_exit_code_2_where_text_is_ascii(runs, folder):
    ended = commands(
        [ROOT / "nanochat" / "tokenizer.py", "小河.gbk.txt", "--out", "x"],
        [ROOT / "nanochat" / "tokenizer.py", "没有🙂.txt", "--out", "x"],
        [ROOT / "nanochat" / "corpus.py", "小河.gbk.txt", "x"],
        [ROOT / "nanochat" / "checkpoint.py", "没有🙂", "y"],
        [ROOT / "train.py", "--data", "小河.gbk.txt"],
        [ROOT / "train.py", "--data", "没有🙂.txt"],
        [ROOT / "finetune.py", "--init", runs / "float32" / "out" / "pretrained", "--data", "对话.gbk.jsonl"],
        [ROOT / "sample.py", "--checkpoint", "没有🙂"],
        cwd=folder, env=LOCALES[1],
    )
    for command, expected in zip(ended, ("UTF-8", "o such", "UTF-8", "no such", "UTF-8", "no such", "UTF-8", "no such")):
        line = command.err.replace("\r", "\n").strip().splitlines()[-1]
        assert command.code == 2 and line.startswith("error: ") and expected in line
        assert "Traceback" not in command.err


@pytest.mark.slow
@pytest.mark.parametrize("env", LOCALES, ids=named)
def test_training_takes_any_file_name(env, folder):
    text, talks = ["--data", "小河🙂.txt"], ["--data", "对话🙂.jsonl", "--val-data", "对话🙂.jsonl"]
    ended = commands(
        [ROOT / "train.py", *text, "--out", "出🙂/预", *TINY, *SHORT],
        [ROOT / "train.py", *text, "--out", "出🙂/预", *TINY, *SHORT, "--resume"],
        [ROOT / "finetune.py", "--init", "出🙂/预", *talks, "--out", "出🙂/调", *SHORT],
        [ROOT / "finetune.py", "--init", "出🙂/预", *talks, "--show-batch"],
        [ROOT / "sample.py", "--checkpoint", "出🙂/调", "--prompt", "你好🙂", "--max-new-tokens", "4"],
        cwd=folder, env=env,
    )
    assert [command.code for command in ended] == [0] * 5, [command.err[-500:] for command in ended]
    assert "⟦晚上好，请坐。<|end|>⟧" in ended[3].out
    about = (folder / "出🙂" / "调" / "last" / "nanochat.json").read_text("utf-8")
    assert "对话🙂.jsonl" in about
