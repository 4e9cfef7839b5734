"""Where we run: device, precision, seeds, the metrics log, and how a script ends.

Weights are fp32 in training; `autocast` computes the large products in a shorter type. On GPUs
that is bf16 from compute capability 8.0 (Ampere), fp16 with a loss scaler before; on CPUs bf16
where a short probe finds it faster, else fp32.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from nanochat import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Raises InputError for an absent device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; try auto or cpu") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the large products: "auto", or one of DTYPES."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            print("warning: --dtype float16 is emulated on a CPU, about 30 times slower", file=sys.stderr)
        return DTYPES[name]
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if bf16 else torch.float16
    if device.type == "cpu" and bf16_speedup() > 1.2:
        return torch.bfloat16
    return torch.float32


def bf16_speedup() -> float:
    """How many times faster this CPU multiplies in bf16 than in fp32, in 0.1 s."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
        torch.nn.functional.linear(x, weight)  # the first call sets up the kernel
        runs = []
        for _ in range(7):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            runs.append(time.perf_counter() - start)
        seconds[dtype] = median(runs)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which forward passes run; it changes nothing for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let glibc keep large buffers for the next step instead of returning them to the kernel.

    Each step needs the same tens of megabytes for logits; mapping and zeroing them anew costs a
    CPU run 40 % of its time. Elsewhere than on Linux with glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of torch's default generators, which only dropout and initialisation draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed at once, so that a killed run keeps its log."""

    def __init__(self, path: Path, keep_steps: int | None = None):
        """keep_steps: on resume, lines after this step are dropped, since they will come again."""
        self.path = path
        kept = [] if keep_steps is None else [r for r in read_metrics(path) if r["step"] <= keep_steps]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **record: float) -> None:
        print(json.dumps(record), file=self.file, flush=True)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, in order; an incomplete last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def draw_losses(log: Path, picture: Path) -> None:
    """Draw training and validation loss against the step: metrics.jsonl → loss.png."""
    import matplotlib  # 0.5 s, needed once, at the end

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(log)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="#9db8d9", linewidth=0.7, label="training, each step")
        width = max(1, len(losses) // 50)
        smooth = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1)]
        axes.plot(steps[width - 1 :], smooth, color="#1f5fa8", label=f"training, mean of {width} steps")
    if val:
        axes.plot(*zip(*val), "o-", color="#d1495b", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=picture.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def argument_text(argument: str) -> str:
    """The text of a command-line argument, read as UTF-8 whatever the locale says (not for paths)."""
    return os.fsencode(argument).decode("utf-8", "replace")


def run_as_script(main: Callable[[], None]) -> None:
    """Run main(); what the user can mend ends in one line and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # UTF-8 whatever the terminal's locale says
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (InputError, OSError) as error:
        missing = isinstance(error, OSError) and error.filename is not None
        print(f"error: {error.filename}: {error.strerror}" if missing else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
