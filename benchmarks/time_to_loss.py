"""Time to a loss: held-out bits per byte against seconds of training, and what each choice of train.py gives.

The claim under test: nanochat reaches in S/2 seconds at least the bits per byte that a tuned Hugging Face
run reaches in S. Both train the same shape with the same tokenizer on the same crops of the same text, both
are scored by evaluate.score on the same held-out text in fp32.

nanochat: train.py's defaults. hugging face: GPT2LMHeadModel with its own loss and AdamW, no dropout, the
allocator as it is; batch, warm-up, linear decay to zero, β₂ = 0.999 and the decay of the blocks' matrices only are
what we found best for ours. Its rate is the best of --rates at the first seed, chosen on the held-out text itself,
which is to its advantage. The ablation: nanochat with one part changed, S/2 seconds each; where two or more rates
are given, the best one.

The clock runs while batches are drawn and steps are trained, and stands while they are scored; a GPU is waited for
after each step, on both sides. The rate falls with that clock from the first second on, so that each run takes the
seconds that it was given, however busy the machine is. (train.py's falls with the steps, whose number it plans
beforehand, and only once the warm-up is over: here the peak is cut off by the line that falls, the lower the slower
the steps are: at 0.75 of it for 59 steps, at 0.94 for 300.) Each run is a process of its own: an allocator
cannot be set back.
What is in out/time_to_loss/runs.jsonl is not measured again, so an interrupted measurement goes on; after a change of
the code, begin with --fresh.

    python benchmarks/time_to_loss.py                              all of it, S = 120: about 75 minutes on 2 cores
    python benchmarks/time_to_loss.py --only ablation --seeds 0    a part
    python benchmarks/time_to_loss.py --device cuda --n-layer 12 --n-head 12 --n-embd 768 --tokens 1024 --data FILE
"""

import argparse
import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers  # noqa: E402
import record  # noqa: E402

import nanochat.model  # noqa: E402
from data import find  # noqa: E402
from nanochat import InputError, checkpoint, corpus, evaluate, rehearsal, runtime, training  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from train import FINAL_TOKENS, Settings  # noqa: E402

DEFAULTS = Settings()
SHAPE = ("n_layer", "n_head", "n_embd")
RUNS = Path("out/time_to_loss/runs.jsonl")
OURS, THEIRS, KEPT = "nanochat", "hugging face", "hugging face, kept memory"
POINTS = 4  # of a curve; the ablation is scored at its end only
CURVE_TOKENS = 100_000  # held-out tokens for a curve; the end is scored on ten million, or all


def variants(args: argparse.Namespace, dtype: str) -> dict[str, tuple[dict, list[float]]]:
    """name: (all that decides a run but its seed and rate, the rates to choose from)."""
    config = DEFAULTS.training
    fixed = {name: getattr(config, name) for name in ("warmup_steps", "beta2", "weight_decay", "clip")}
    ours = {name: getattr(args, name) for name in ("device", "tokens", *SHAPE, "batch_size", "compile")}
    ours |= fixed | {"package": "nanochat", "vocab_size": DEFAULTS.vocab_size,
             "optimizer": config.optimizer, "schedule": "linear", "crops": "once an epoch", "attention": "own",
             "keep_memory": True, "dtype": dtype, "threads": torch.get_num_threads(),
             "seconds": args.seconds / 2, "points": POINTS}
    theirs = ours | {"package": "transformers", "keep_memory": False, "seconds": args.seconds}
    batch, rate = args.batch_size, config.learning_rate
    changes = {
        "tokenizer 16,384": {"vocab_size": 16384},
        "tokenizer 4,096": {"vocab_size": 4096},
        f"batch {batch // 2}": {"batch_size": batch // 2},
        f"batch {2 * batch}": {"batch_size": 2 * batch},
        "AdamW instead of Muon": {"optimizer": "adamw"},
        "cosine to 10 %, not linear to 0": {"schedule": "cosine"},
        "random crops": {"crops": "random"},
        "not compiled" if args.compile else "compiled": {"compile": not args.compile},
    }
    if dtype != "float32":
        changes["fp32"] = {"dtype": "float32"}
    if torch.device(args.device).type == "cpu":  # neither differs on a GPU
        changes |= {"fused attention kernel": {"attention": "fused"}, "allocator as it is": {"keep_memory": False}}
    rates = {"AdamW instead of Muon": args.rates, f"batch {2 * batch}": [rate, 1.5 * rate]}
    kept = {KEPT: (theirs | {"keep_memory": True}, [])} if torch.device(args.device).type == "cpu" else {}
    return {THEIRS: (theirs, args.rates), **kept, OURS: (ours, [rate]),
            **{name: (ours | {"points": 1} | change, rates.get(name, [rate])) for name, change in changes.items()}}


# ------------------------------------------------------------------ one run, in a process of its own


def measure(job: dict) -> dict:
    """Train and score as the job says; → its results."""
    if job["keep_memory"]:
        runtime.keep_freed_memory()
    if job["attention"] == "fused":
        nanochat.model.attention = peers.fused_attention
    device, rows, tokens = torch.device(job["device"]), job["batch_size"], job["tokens"]
    tokenizer = Tokenizer.load(job["corpus"])
    train, val = (corpus.TokenStream(job["corpus"], split, tokenizer, tokens) for split in ("train", "val"))
    torch.manual_seed(job["seed"])
    model, optimizer = build(job, tokenizer.vocab_size)
    network, compile_seconds = warmed_up(job, model, optimizer, train)

    batches = math.ceil(min(val.tokens - 1, FINAL_TOKENS) / (rows * tokens))
    some = min(batches, CURVE_TOKENS // (rows * tokens) + 1)
    points = [job["seconds"] * k / job["points"] for k in range(1, job["points"] + 1)]
    drawn, seconds, steps, curve = crops(job, train), 0.0, 0, []
    while seconds < job["seconds"]:
        started = runtime.clock(device)
        take_step(job, network, model, optimizer, next(drawn), rate_factor(job, steps, seconds / job["seconds"]))
        seconds += runtime.clock(device) - started
        steps += 1
        if seconds >= points[len(curve)]:
            curve.append([round(seconds, 2), bits_per_byte(model, tokenizer, islice(val.batches(rows), some))])
    at_end = curve[-1][1] if some == batches else bits_per_byte(model, tokenizer, islice(val.batches(rows), batches))
    return {name: job[name] for name in ("variant", "seed", "learning_rate")} | {
        "seconds": round(seconds, 2), "steps": steps, "epochs": round(steps * rows / len(train), 2),
        "compile_seconds": compile_seconds, "curve": curve, "bits_per_byte": at_end, "job": job}


def build(job: dict, vocab_size: int) -> tuple[torch.nn.Module, torch.optim.Optimizer | training.Optimizers]:
    """The network and its optimizer."""
    config = GPTConfig(vocab_size, job["tokens"], **{name: job[name] for name in SHAPE})
    if job["package"] == "transformers":
        model = peers.gpt2_of_hugging_face(config).to(job["device"]).train()
        return model, peers.adamw(model, job["learning_rate"])
    model = GPT(config).to(job["device"]).train()
    settings = replace(DEFAULTS.training, optimizer=job["optimizer"], learning_rate=job["learning_rate"])
    return model, training.build_optimizer(model, settings)


def crops(job: dict, train: corpus.TokenStream) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The (inputs, targets) of each step, without end."""
    rows, tokens = job["batch_size"], job["tokens"]
    generator = torch.Generator().manual_seed(job["seed"])
    for position in count(0, rows):
        if job["crops"] == "random":  # from any token on
            starts = torch.randint(train.tokens - tokens, (rows,), generator=generator).tolist()
            drawn = torch.stack([torch.from_numpy(train.ids(start, start + tokens + 1)) for start in starts]).to(job["device"])
            yield drawn[:, :-1], drawn[:, 1:]
        else:
            yield train.batch(training.example_order(position, rows, len(train), job["seed"])).to(job["device"])[:2]


def rate_factor(job: dict, step: int, done: float) -> float:
    """Share of the peak rate: it rises over the first steps, then falls to zero with the share `done` of the seconds.

    The cosine instead ends at a tenth.
    """
    fallen = 1 - done if job["schedule"] == "linear" else 0.55 + 0.45 * math.cos(math.pi * done)
    return min((step + 1) / (job["warmup_steps"] + 1), fallen)


def take_step(job: dict, network, model, optimizer, batch: tuple[torch.Tensor, torch.Tensor], factor: float) -> None:
    """One step of training; `network` is the model, or the same weights compiled."""
    inputs, targets = batch
    for group in optimizer.param_groups:
        group["lr"] = job["learning_rate"] * factor
    with runtime.autocast(inputs.device, runtime.DTYPES[job["dtype"]]):
        if job["package"] == "nanochat":
            loss = network(inputs, targets) / targets.numel()
        else:  # shift_labels: the targets as they are, or it would learn from one fewer a row
            loss = network(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job["clip"])
    if job["package"] == "nanochat":  # training.train looks at both in each step, for which a GPU waits
        loss.item(), norm.item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def warmed_up(job: dict, model, optimizer, train: corpus.TokenStream) -> tuple[torch.nn.Module, float | None]:
    """Some real steps, then all is put back: → (the network that is to step, seconds that compiling took)."""
    device, start, network = torch.device(job["device"]), copy.deepcopy(model.state_dict()), model
    clocks = [runtime.clock(device)]
    if job["compile"] and job["package"] == "nanochat":
        batch = train.batch(range(job["batch_size"])).to(device)
        network = rehearsal.compiled(model, optimizer, batch, runtime.DTYPES[job["dtype"]])
        assert network is not model, "the compiler does not work here"
    elif job["compile"]:
        network = torch.compile(model, dynamic=False)
    for batch in islice(crops(job, train), 4):
        take_step(job, network, model, optimizer, batch, 0.1)
        clocks.append(runtime.clock(device))
    model.load_state_dict(start)
    for part in getattr(optimizer, "parts", [optimizer]):
        part.state.clear()
    first, *_, last = [after - before for before, after in zip(clocks, clocks[1:])]
    return network, round(first - last, 1) if job["compile"] else None


def bits_per_byte(model, tokenizer: Tokenizer, batches: Iterator) -> float:
    """evaluate.score's, fp32; of Hugging Face's model by the same weights in our network, so that one function scores both."""
    if not isinstance(model, GPT):
        weights = {name: w.cpu() for name, w in model.state_dict().items()}
        config = GPTConfig(tokenizer.vocab_size, model.config.n_positions, **{name: getattr(model.config, name) for name in SHAPE})
        state = checkpoint.to_our_layout(weights, True, Path(THEIRS))
        model = checkpoint.build(config, state, Path(THEIRS)).to(model.device)
    score = evaluate.score(model, tokenizer, batches)["bits_per_byte"]
    return round(score, 5) if math.isfinite(score) else 99.0  # a run that has diverged


# ------------------------------------------------------------------ all runs


def main() -> None:
    """Read the flags; measure what is wanted and not yet in the file; print, save and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="S: Hugging Face's; nanochat and its ablation get half")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="to choose Hugging Face's from")
    parser.add_argument("--only", choices=("hf", "ours", "ablation"))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help='such as "tokenizer 4,096"; in place of --only')
    parser.add_argument("--fresh", action="store_true", help=f"delete {RUNS} first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="both sides")
    parser.add_argument("--data", default=DEFAULTS.data)
    parser.add_argument("--tokens", type=int, default=DEFAULTS.block_size, help="in a crop")
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.training.batch_size)
    for name in SHAPE:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(DEFAULTS, name))
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one run, as this script starts it
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return

    if args.seconds <= 0 or args.batch_size < 2:
        parser.error("--seconds must be above 0 and --batch-size at least 2: the ablation halves it")
    args.data = str(find(args.data))
    if (Path(args.data) / "corpus.json").exists():
        parser.error(f"--data {args.data} is tokenized already: the ablation needs the text itself")
    device = runtime.pick_device(args.device)
    args.device = str(device)
    dtype = "bfloat16" if device.type == "cuda" else str(runtime.pick_dtype("auto", device)).removeprefix("torch.")
    plan = variants(args, dtype)
    groups = {"hf": [name for name in (THEIRS, KEPT) if name in plan], "ours": [OURS], "ablation": [name for name in plan if name not in (THEIRS, KEPT, OURS)]}
    wanted = args.variants or groups.get(args.only, list(plan))
    if KEPT in wanted and THEIRS not in wanted:
        wanted = [THEIRS, *wanted]  # whose rate it takes
    if unknown := [name for name in wanted if name not in plan]:
        parser.error(f"--variants: {unknown} not among {list(plan)}")
    for name, (job, _) in plan.items():
        folder = corpus.folder_for(args.data, None, Path("out/corpus"), vocab_size=job["vocab_size"])
        job["corpus"] = str(folder)  # of the text as it is now
        if name in wanted:
            corpus.prepare(args.data, folder, vocab_size=job["vocab_size"])
    tried, best = measure_all(plan, wanted, args)
    rows = summary(best)
    verdicts = [verdict(best, rows, name) for name in (THEIRS, KEPT) if {name, OURS} <= best.keys()]
    print(*verdicts, sep="\n")
    runs = [one for name in best for one in [*best[name], *(one for one in tried[name] if one is not best[name][0])]]
    results = {"seconds": args.seconds, "verdicts": verdicts, "variants": list(rows.values()), "runs": runs}
    record.save("time_to_loss", device, results)
    draw(args.seconds, device, best, rows)


def measure_all(plan: dict[str, tuple[dict, list[float]]], wanted: list[str], args: argparse.Namespace) -> tuple[dict, dict]:
    """Measure what is wanted and not in the file.

    → by the name of the variant: (a run for each rate at the first seed, a run for each seed at the best rate).
    """
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        RUNS.unlink(missing_ok=True)
    RUNS.touch()
    done = {json.dumps(run["job"], sort_keys=True): run for run in map(json.loads, RUNS.read_text().splitlines())}
    failed: list[str] = []

    def run(name: str, seed: int, rate: float) -> dict | None:
        """One run: from the file or, if it is wanted, measured now."""
        job = plan[name][0] | {"variant": name, "seed": seed, "learning_rate": rate}
        key = json.dumps(job, sort_keys=True)
        if key in done:
            bar.total -= job["seconds"] * (name in wanted)
        elif name in wanted:
            bar.set_description(f"{name}, seed {seed}, rate {rate:g}")
            child = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
            if child.returncode == 0:
                done[key] = json.loads(child.stdout.splitlines()[-1])
                with RUNS.open("a") as file:
                    print(json.dumps(done[key]), file=file)
            else:
                failed.append(f"{name}, seed {seed}: {(child.stderr.strip().splitlines() or ['?'])[-1]}")
                bar.write(failed[-1])
            bar.update(job["seconds"])
        return done.get(key)

    tried: dict[str, list[dict]] = {}  # one run a rate, at the first seed
    best: dict[str, list[dict]] = {}  # one run a seed, at the best rate
    total = sum(plan[name][0]["seconds"] * (max(1, len(plan[name][1])) + len(args.seeds) - 1) for name in wanted)
    with tqdm(total=total, unit="s", dynamic_ncols=True) as bar:
        for name, (_, rates) in plan.items():
            if name == KEPT and THEIRS in best:
                rates = [best[THEIRS][0]["learning_rate"]]
            if runs := [one for rate in rates if (one := run(name, args.seeds[0], rate))]:
                tried[name], best[name] = runs, [min(runs, key=lambda one: one["bits_per_byte"])]
        for seed in args.seeds[1:]:  # all variants at one seed, then at the next: a machine drifts
            for runs in best.values():
                if one := run(runs[0]["variant"], seed, runs[0]["learning_rate"]):
                    runs.append(one)
    if failed:
        raise InputError(f"{len(failed)} runs failed, so nothing is saved but {RUNS}; the first: {failed[0]}")
    return tried, best


# ------------------------------------------------------------------ what came out


def summary(best: dict[str, list[dict]]) -> dict[str, dict]:
    """A row for each variant, printed as a table."""
    rows = {}
    print(f"\n{'variant':<33}{'rate':>7}{'seeds':>7}{'steps':>8}{'seconds':>9}{'bits per byte':>18}{'difference':>12}")
    for name, runs in best.items():
        mean_of = {key: mean(one[key] for one in runs) for key in ("steps", "seconds", "bits_per_byte")}
        ours = mean(one["bits_per_byte"] for one in best[OURS]) if OURS in best else math.nan
        rows[name] = row = {
            "variant": name, "learning_rate": runs[0]["learning_rate"], "seeds": len(runs), **mean_of,
            "spread": stdev(one["bits_per_byte"] for one in runs) if len(runs) > 1 else math.nan,
            "difference": mean_of["bits_per_byte"] - ours,
        }
        print("{variant:<33}{learning_rate:>7g}{seeds:>7}{steps:>8,.0f}{seconds:>9.1f}{bits_per_byte:>9.4f} ± {spread:.4f}"
              "{difference:>+12.4f}".format(**row).replace("+nan", "   -").replace(" nan", "   -"),
              f"  compiling: {runs[0]['compile_seconds']:.0f} s more" if runs[0]["compile_seconds"] is not None else "")
    print("±: standard deviation over the seeds; difference: to nanochat, above 0 is worse\n")
    return {name: {key: None if value != value else round(value, 6) if isinstance(value, float) else value
                   for key, value in row.items()} for name, row in rows.items()}


def verdict(best: dict[str, list[dict]], rows: dict[str, dict], name: str) -> str:
    """Whether half the seconds of the variant `name` were enough, and how many would have been."""
    ours, theirs = ([[mean(values) for values in zip(*points)] for points in zip(*(one["curve"] for one in best[who]))]
                    for who in (OURS, name))
    words = "was enough" if rows[OURS]["bits_per_byte"] <= rows[name]["bits_per_byte"] else "was NOT enough"
    line = f"half the time {words}: " + ", ".join(
        f"{who} {rows[who]['bits_per_byte']:.4f} after {rows[who]['seconds']:.3g} s" for who in (OURS, name))
    # Where our curve passes the end of theirs. A run planned for so few seconds would have been there
    # sooner: its rate would have fallen to zero by then.
    seconds, goal = theirs[-1]
    for (t0, b0), (t1, b1) in zip([ours[0], *ours], ours):
        if b1 <= goal:
            t = t1 if b0 == b1 else t0 + (t1 - t0) * (b0 - goal) / (b0 - b1)
            return line + f"; nanochat was there after {t:.3g} s, {seconds / t:.1f} times as fast"
    return line


def draw(S: float, device: torch.device, best: dict[str, list[dict]], rows: dict[str, dict]) -> None:
    """Left the curves of both sides, right the ablation: docs/time_to_loss-PLACE.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "frameon": False}  # legends, where no line passes
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.8), dpi=120, layout="constrained")
    for name, look in {THEIRS: "-#70767f", KEPT: ":#70767f", OURS: "-#1f5fa8"}.items():
        label = f"{name}: {rows[name]['bits_per_byte']:.3f} after {rows[name]['seconds']:.3g} s" if name in rows else None
        for one in best.get(name, []):
            left.plot(*zip(*one["curve"]), look[0], color=look[1:], marker="o", markersize=3, linewidth=1.3, label=label)
            label = None  # one line of the legend for all its seeds
    left.set(title=f"nanochat with {S / 2:g} s, Hugging Face with {S:g} s; each line a seed", xlabel="seconds of training",
             ylabel="bits per byte, held-out text")
    left.set_xlim(left=0)
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(title="bits per byte at the end, mean of the seeds", **below)
    parts = {name: row["difference"] for name, row in rows.items() if name not in (THEIRS, KEPT, OURS) and OURS in rows}
    parts = dict(sorted(parts.items(), key=lambda part: part[1]))
    right.bar_label(right.barh(list(parts), list(parts.values()), color="#b9bec6"), fmt="{:+.3f}", padding=4)
    right.axvline(0, color="#1f5fa8", linewidth=1.3)
    if OURS in rows and (spread := rows[OURS]["spread"]):
        right.axvspan(-spread, spread, color="#1f5fa8", alpha=0.15, lw=0, label="nanochat: ± standard deviation over its seeds")
        right.legend(**below)
    right.margins(x=0.15)
    right.set(title=f"nanochat with one part changed, {S / 2:g} s each",
              xlabel="bits per byte more than nanochat as it is; to the right is worse")
    right.spines[["top", "right"]].set_visible(False)
    path = record.ROOT / "docs" / f"time_to_loss-{record.place(device)}.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    runtime.run_as_script(main)
