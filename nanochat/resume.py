"""How a run goes on as if it had never stopped: its state beside the weights, and what may change meanwhile.

`snapshot` takes all that a step depends on, `restore` puts it back; runs.py keeps it, as resume/state.pt of a step.
`settings_to_resume` refuses by name what would make it another run, and `meet_conditions` other texts; of another machine
it says what differs.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass

import torch

from nanochat import InputError, processes
from nanochat.model import GPT
from nanochat.runtime import rng_state, set_rng_state

# What may change on --resume: nothing here touches the weights of any step.
FREE = {"resume", "overwrite", "out", "device", "keep", "save_every", "patience", "show_batch", "recompute"}


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint."""

    max_steps: int  # decided once, before the first step
    step: int = 0  # optimizer steps taken
    examples: int = 0  # examples consumed: the whole data position
    best_loss: float = math.inf  # lowest validation loss
    evaluations_since_best: int = 0
    skipped_in_a_row: int = 0  # fp16 steps whose gradient overflowed
    seconds: float = 0.0  # of training, without evaluations and saves


def snapshot(progress: Progress, record: dict, model: GPT, optimizer, scaler: torch.amp.GradScaler) -> dict:
    """All that a run needs, beside its weights, to go on as if it had never stopped."""
    name_of = {p: name for name, p in model.named_parameters()}
    return {
        "progress": asdict(progress),
        "record": record,  # its line of metrics.jsonl, which is written after the checkpoint
        "optimizer": {name_of[p]: dict(state) for part in optimizer.parts for p, state in part.state.items()},
        "scaler": scaler.state_dict(),
        "rng": processes.from_all_ranks(rng_state(model.wpe.weight.device)),
    }


def restore(state: dict, model: GPT, optimizer, scaler: torch.amp.GradScaler) -> tuple[Progress, dict]:
    """Put a snapshot back: into the optimizer, scaler and generators; → (progress, record)."""
    name_of = {p: name for name, p in model.named_parameters()}
    for part in optimizer.parts:
        for group in part.param_groups:
            for p in group["params"]:
                saved = state["optimizer"].get(name_of[p], {})
                if any(value.shape not in (p.shape, ()) for value in saved.values()) or not saved:
                    raise InputError(f"--resume: the optimizer's state of {name_of[p]} is missing or of another shape")
                part.state[p] = {key: value.to(p.device) for key, value in saved.items()}
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    rank, progress = processes.rank(), Progress(**state["progress"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank], model.wpe.weight.device)
    else:  # this process was not there
        torch.manual_seed(1_000_003 * progress.step + rank)
    return progress, state["record"]


# ------------------------------------------------------------------ settings and conditions


def settings_to_resume(settings, resume: dict, parse: Callable):
    """The settings with which the run began, and what this command line may change of them.

    settings: the dataclass of a script, as parsed; resume: the state of a checkpoint;
    parse(default=…) parses the command line again over other defaults. InputError names each flag
    that would make it another run.
    """
    try:
        values = resume["conditions"]["settings"] | {"out": settings.out, "resume": False, "overwrite": False}
        began = from_plain(settings, values)
        if "processes" not in resume["conditions"]:  # which the first versions did not note
            raise KeyError("processes")
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--resume: {settings.out} is not a run of this script and version ({error}); "
                         "--init goes on from its weights") from None
    now = parse(default=began)
    before, after = (flat(asdict(s)) for s in (began, now))
    changed = [f"--{name.replace('_', '-')} {after[name]} (it began with {before[name]})"
               for name in after if name not in FREE and after[name] != before[name]]
    if changed:
        raise InputError(f"--resume: {', '.join(changed)} would make it another run; leave it out, or start one with --init")
    return now


def from_plain(like, values: dict):
    """A dataclass like the one given, of the values that a JSON file kept; TypeError for another set of names."""
    built = dict(values)
    for name, value in values.items():
        if is_dataclass(old := getattr(like, name)):
            built[name] = from_plain(old, value)
        elif isinstance(old, tuple):  # of which JSON made a list
            built[name] = tuple(value)
    return type(like)(**built)


def flat(values: dict) -> dict:
    """The entries of a dict, and in place of each dict in it that one's entries: names as on the command line."""
    found: dict = {}
    for name, value in values.items():
        found |= flat(value) if isinstance(value, dict) else {name: value}
    return found


def meet_conditions(saved: dict, device: torch.device, texts: str) -> None:
    """Meet the conditions under which a run was saved, as far as this machine can; say what differs."""
    if texts != saved["texts"]:
        raise InputError("--resume: the training data, or the held-out data, is not what the run began with; "
                         "--init goes on with other data")
    if saved["processes"] == processes.world_size():  # else it cannot be the same bit for bit
        torch.set_num_threads(min(saved["threads"], os.cpu_count() or 1))
    here = {"device": device.type, "threads": torch.get_num_threads(), "processes": processes.world_size()}
    for name, value in here.items():
        there = saved[name].split(":")[0] if name == "device" else saved[name]
        if value != there:
            print(f"note: the run was on {there} {name}, now {value}: equal but for rounding and dropout's draws", file=sys.stderr)
