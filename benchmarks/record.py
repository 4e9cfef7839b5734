"""What every benchmark does with its figures: a JSON file with machine, versions and command, and a picture.

    benchmarks/results/NAME-cpu.json        benchmarks/results/NAME-nvidia-h200.json
    docs/NAME-cpu.png
"""

import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def machine(device: torch.device, packages: Iterable[str]) -> dict:
    """Where and with what a figure was measured."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": str(date.today()),
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", *(str(Path(arg).resolve().relative_to(ROOT)) if i == 0 else arg for i, arg in enumerate(sys.argv))]),
    }


def place(device: torch.device) -> str:
    """The end of a result's name: cpu, nvidia-h200, …"""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-")


def save(name: str, device: torch.device, results: dict, packages: Iterable[str] = ("torch", "transformers")) -> None:
    """Write results, below where they were measured and with which versions."""
    path = ROOT / "benchmarks" / "results" / f"{name}-{place(device)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(machine(device, packages) | {"results": results}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def bars(name: str, device: torch.device, title: str, unit: str, values: dict[str, float]) -> None:
    """Horizontal bars, one a variant, ours in blue: docs/NAME-DEVICE.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.42 * len(values)), dpi=120)
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[n] for n in names], color=["#1f5fa8" if n.startswith("nanochat") else "#b9bec6" for n in names])
    axes.bar_label(drawn, fmt="{:,.4g}", padding=4)
    axes.set(title=title, xlabel=unit)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = ROOT / "docs" / f"{name}-{place(device)}.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path.relative_to(ROOT)}")
