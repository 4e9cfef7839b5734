"""The numbers of a run: a line of metrics.jsonl for each step, and the picture of its losses."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanochat import InputError
from nanochat.processes import on_rank_0, rank


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed at once, so that a killed run keeps its log."""

    def __init__(self, path: Path, before: int):
        """Lines of this step and later ones, left by a run that is resumed, are dropped: they come again."""
        self.path, self.file = path, None
        if rank():
            return
        kept = [record for record in read_metrics(path) if record["step"] < before]
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")

    @on_rank_0
    def write(self, **record) -> None:
        """Add a line; InputError if the disk does not take it."""
        try:
            print(json.dumps(record, ensure_ascii=False), file=self.file, flush=True)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; --resume goes on once that is mended") from None

    def close(self) -> None:
        """Close the file, if this process has one."""
        if self.file is not None:
            with suppress(OSError):  # what a full disk did not take
                self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, in order; lines that a power cut left unreadable are left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            with suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


@on_rank_0
def draw_losses(log: Path, path: Path) -> None:
    """Draw training and validation loss against the step: metrics.jsonl → loss.png."""
    records = read_metrics(log)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    with picture(path) as axes:
        if train:
            steps, losses = zip(*train)
            axes.plot(steps, losses, color="#9db8d9", linewidth=0.7, label="training, each step")
            width = max(1, len(losses) // 50)
            smooth = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1)]
            axes.plot(steps[width - 1 :], smooth, color="#1f5fa8", label=f"training, mean of {width} steps")
        if val:
            axes.plot(*zip(*val), "o-", color="#d1495b", label="validation")
        axes.set(xlabel="step", ylabel="loss, nats per target")
        axes.grid(alpha=0.3)
        axes.legend()


@contextmanager
def picture(path: Path, size: tuple[float, float] = (8, 4.5)) -> Iterator:
    """Axes to draw on; at the end they are written to `path`, a .png. size: inches."""
    import matplotlib  # 0.5 s, needed once, at the end
    from matplotlib.figure import Figure  # not pyplot: a notebook keeps its own way of showing figures

    fonts = ["Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei", "DejaVu Sans"]
    with matplotlib.rc_context({"font.sans-serif": fonts}):  # labels may be Chinese: the first of these that the machine has
        figure = Figure(figsize=size, dpi=120)
        axes = figure.subplots()
        yield axes
        with warnings.catch_warnings(record=True) as missing:  # a line for each character that no font has
            warnings.simplefilter("always")
            figure.tight_layout()
            figure.savefig(path)
    if any("missing from" in str(warning.message) for warning in missing):
        print(f"note: no font for all characters of {path}; Noto Sans CJK SC is one", file=sys.stderr)
