"""A run folder: what a run leaves on disk, whole at every moment, whatever kills the run.

    out/
      metrics.jsonl  loss.png                 metrics.py
      report.md  report.json                  report.py, with its pictures
      base/                                   with LoRA: what the steps, which are adapters, stand on
      best -> step-000400    last -> step-000400
      step-000400/                            a checkpoint (checkpoint.py), and for --resume:
        resume/state.pt  optimizer, scaler, random state, data position, settings
        SHA256SUMS       of all files but nanochat.json, as `sha256sum -c` takes it

A step folder is written as `.tmp-…`, flushed to disk and renamed once, so it is whole or absent;
`best` and `last` are swapped by one rename each. What a disk or a hand has changed since is told by
its sum: `open_run` falls back to the step before.
"""

import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanochat import InputError, __version__, lora, processes
from nanochat.checkpoint import (
    ADAPTER,
    SUMS,
    followed,
    one_line,
    read_config,
    read_tensors,
    read_tokenizer,
    sha256_of,
    verify,
    write,
    write_hugging_face,
    write_json,
)
from nanochat.model import GPT
from nanochat.records import read_json
from nanochat.tokenizer import TEMPLATE_NAME, Tokenizer

REPORTS = ("metrics.jsonl", "loss.png", "report.md", "report.json", "lengths.png", "confusion.png")  # written beside the steps

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def open_run(out: Path, resume: bool, overwrite: bool) -> tuple[Path | None, dict | None]:
    """Look at the run folder before anything is prepared; with resume, → (step folder, state) to go on from.

    That is the newest sound step. A folder that holds a run is never written over unasked:
    InputError names the two flags.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite: one goes on with a run, the other deletes it; give one of them")
    if not resume:
        if not overwrite and out.exists() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty: --resume goes on, --overwrite starts anew")
        return None, None
    if not out.is_dir():
        raise InputError(f"--resume: there is no run folder {out}")
    claim(out)
    remove_litter(out)
    folder, state = newest_sound(out)
    point(out / "last", folder)
    if not keep_best(out, folder):
        state["progress"]["best_loss"] = math.inf
    return folder, state


def newest_sound(out: Path) -> tuple[Path, dict]:
    """The newest step that is sound, and its state; newer ones are set aside, with a line each.

    If there is none, all stays as it is: InputError.
    """
    damaged: dict[Path, Exception] = {}
    for folder in reversed(saved_steps(out)):
        try:
            state = read_resume(folder)
            break
        except PermissionError:
            raise
        except (InputError, OSError) as error:
            damaged[folder] = error
    else:
        reason = next(iter(damaged.values()), "no step is saved")
        raise InputError(f"--resume: {out} has no sound checkpoint ({reason}); --overwrite starts anew")
    for step, trouble in damaged.items():
        aside = step.with_name(f"damaged-{step.name}")
        remove(aside)
        os.replace(step, aside)
        print(f"{trouble}\nmoved to {aside}; going on from the step before", file=sys.stderr)
    return folder, state


def keep_best(out: Path, folder: Path) -> bool:
    """Whether `best` names a sound step that is no newer than `folder`; if not, it is removed, with a line."""
    try:
        best = followed(out / "best")
        check(best)
        if step_of(best) > step_of(folder):
            raise InputError(f"{best} is newer than {folder}")
    except PermissionError:
        raise
    except (InputError, OSError) as error:
        if os.path.lexists(out / "best"):
            print(f"{error}\nremoved {out / 'best'}; the next evaluation sets it anew", file=sys.stderr)
            remove(out / "best")
        return False
    point(out / "best", best)  # anew, in case it is the copy that scp or zip made of a step
    return True


def check(folder: Path, resume: bool = False) -> None:
    """InputError or OSError if a step is damaged; only weights without SHA256SUMS are believed unread."""
    verify(folder, resume)
    whole = folder.parent / "base" if (folder / ADAPTER).exists() else folder
    read_tokenizer(folder, read_config(whole / "config.json"))
    if read_json(folder / "nanochat.json").get("step") != step_of(folder):
        raise InputError(f"{folder / 'nanochat.json'}: is of another step")


def read_resume(folder: Path) -> dict:
    """The state to resume from in a step, all of which is sound: else as `check`."""
    check(folder, resume=True)
    state = read_tensors(folder / "resume" / "state.pt")
    if not isinstance(progress := state.get("progress"), dict) or progress.get("step") != step_of(folder):
        raise InputError(f"{folder / 'resume' / 'state.pt'}: is of another step")
    return state


@processes.on_rank_0
def clear(out: Path) -> None:
    """Delete the run in `out`, and nothing else there: when all is ready, so that an error costs none."""
    out.mkdir(parents=True, exist_ok=True)
    claim(out)
    for name in ("best", "last", "base", *REPORTS):
        remove(out / name)
    for folder in [*saved_steps(out), *out.glob("damaged-step-*")]:
        os.replace(folder, out / f".tmp-{folder.name}")  # one rename, so that a kill leaves no half of it
    remove_litter(out)


_claimed: dict[Path, int] = {}  # run folders that this process writes into, each with an open handle


def claim(out: Path) -> None:
    """Keep other processes from training into `out` as long as this one lives; InputError if one does already."""
    if fcntl is None or out.resolve() in _claimed:
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"--out {out}: another process is training into this folder") from None
    except OSError:  # a file system without locks
        pass
    _claimed[out.resolve()] = handle


def saved_steps(out: Path) -> list[Path]:
    """The step folders of a run, oldest first."""
    return sorted((path for path in out.glob("step-*") if re.fullmatch(r"step-[0-9]{6,}", path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The number in the name of a step folder."""
    return int(folder.name.removeprefix("step-"))


@processes.on_rank_0
def save(out: Path, step: int, model: GPT, tokenizer: Tokenizer, *, settings: dict, results: dict,
         resume: dict | None = None, keep: int = 2) -> Path:
    """Write out/step-NNNNNN and point `last` at it; drop older steps but `keep` and the best.

    At any moment of it, a kill or a full disk leaves the steps before whole. InputError for weights
    that are not finite, or when it cannot be written.
    """
    out = Path(out)
    if broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
        raise InputError(f"step {step} is not saved: {broken[0]} is not finite; the checkpoints in {out} stay as they were")
    final, temporary = out / f"step-{step:06d}", out / f".tmp-step-{step:06d}"
    remove_litter(out)
    about = {
        "step": step,
        "results": results,
        "settings": settings,
        "template": TEMPLATE_NAME if tokenizer.chat_template else None,
        "system": tokenizer.system or None,
        "tokenizer_hash": tokenizer.hash,
        "versions": {"nanochat": __version__, "torch": torch.__version__},
    }
    try:
        temporary.mkdir(parents=True)
        keep_base(out, model, tokenizer)
        write(temporary, model, tokenizer)
        if resume is not None:
            (temporary / "resume").mkdir()
            with open(temporary / "resume" / "state.pt", "wb") as file:
                torch.save(resume, file)
        write_sums(temporary)
        write_json(temporary / "nanochat.json", about)
        for path in [*temporary.rglob("*"), temporary]:
            flush_to_disk(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # what torch.save met
        raise InputError(f"step {step} cannot be saved in {out} ({one_line(str(reason))}); earlier ones are whole") from None
    if final.exists():  # the same step saved again, by a run that repeats it
        os.replace(final, out / f".tmp-old-{final.name}")
    os.replace(temporary, final)
    flush_to_disk(out)
    point(out / "last", final)
    best = followed(out / "best") if os.path.lexists(out / "best") else None
    for old in saved_steps(out)[:-keep]:
        if old not in (best, final):
            os.replace(old, out / f".tmp-{old.name}")  # one rename, so that a kill leaves no half of it
    remove_litter(out)
    return final


def keep_base(out: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Of a model with LoRA write out/base, once: what its checkpoints, which are adapters, stand on."""
    if not lora.is_adapted(model) or (out / "base").exists():
        return
    temporary = out / ".tmp-base"
    temporary.mkdir()
    write_hugging_face(temporary, model, tokenizer, merge=False)
    write_sums(temporary)
    for path in [*temporary.iterdir(), temporary]:
        flush_to_disk(path)
    os.replace(temporary, out / "base")


@processes.on_rank_0
def add_results(out: Path, step: int, results: dict, best: bool) -> None:
    """Add the evaluation of a saved step to its nanochat.json; if it is the best so far, point `best` at it."""
    folder, temporary = out / f"step-{step:06d}", out / ".tmp-nanochat.json"
    about = read_json(folder / "nanochat.json")
    try:
        write_json(temporary, about | {"results": about.get("results", {}) | results})
        flush_to_disk(temporary)
    except OSError as error:
        if temporary.exists():
            remove(temporary)
        raise InputError(f"the results of step {step} cannot be saved in {folder} ({error}); its weights are") from None
    os.replace(temporary, folder / "nanochat.json")
    if best:
        point(out / "best", folder)


def write_sums(folder: Path) -> None:
    """SHA256SUMS of all files in the folder."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------ files


def point(pointer: Path, target: Path) -> None:
    """Make `pointer` name `target`, its neighbour, in one step: a link, or a file with the name."""
    temporary = pointer.with_name(f".tmp-{pointer.name}")
    remove(temporary)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        temporary.write_text(target.name + "\n", encoding="utf-8")
    if pointer.is_dir() and not pointer.is_symlink():  # the copy that scp or zip made of a step
        remove(pointer)
    os.replace(temporary, pointer)
    flush_to_disk(pointer.parent)


def remove_litter(out: Path) -> None:
    """Remove what an interrupted save left behind; a step that it had only moved aside comes back."""
    for aside in Path(out).glob(".tmp-old-*"):
        if not (final := aside.with_name(aside.name.removeprefix(".tmp-old-"))).exists():
            os.replace(aside, final)
    for litter in Path(out).glob(".tmp-*"):
        remove(litter)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link (not what it names), if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, would survive a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what may be written
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():  # Windows, and some network disks, cannot flush a folder
            raise
