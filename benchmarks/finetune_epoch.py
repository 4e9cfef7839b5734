"""One epoch of fine-tuning on dialogue, beside trl's SFTTrainer: supervised tokens a second, and the loss reached.

    python train.py                              makes out/pretrained, unless --init names another folder
    python benchmarks/finetune_epoch.py          all variants, each rate, one seed; --limit 400 for a quick look

nanochat packed, padded    training.train, as finetune.py calls it: several windows of conversations in a row, or one
trl padded, packed         SFTTrainer on {"messages"} with assistant_only_loss and our chat template; packed is its
                           "bfd", split its "bfd_split"
trl … windows              the same trainer, given our windows as input_ids and labels: the same text to learn from
trl …, kept memory         with the allocator's setting that nanochat has (runtime.keep_freed_memory; CPU)

All start from the same weights and take batches of the same number of rows, for one epoch: fused AdamW
without decay, linear warm-up and decay to zero, clipping at 1.0, the same precision, no recomputation, no logs,
evaluations or saves. (nanochat packed muon: finetune.py's optimizer and decay.) Each run is a process of its own.

From {"messages"} trl cuts off what is beyond max_length, unless it is to split ("bfd_split", wherever the
length falls); "supervised" counts the labels that a run really had. "seconds" are those of the steps;
"with set-up" is the whole call of train() or trainer.train(), with our rehearsal and any compiling. The
rate with the best validation loss is reported, and run with the other --seeds; losses are
evaluate.score of the final weights, fp32, on the same rows for all.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import record  # noqa: E402

from data import find  # noqa: E402
from nanochat import InputError, checkpoint, evaluate, formats, runtime, splits, training  # noqa: E402
from nanochat.dialogue import to_rows  # noqa: E402
from nanochat.formats import Conversation  # noqa: E402
from nanochat.model import GPT  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from nanochat.training import TrainConfig  # noqa: E402

VARIANTS = ["nanochat packed", "nanochat packed muon", "nanochat padded", "trl padded", "trl packed", "trl packed split",
            "trl padded windows", "trl packed windows", "trl padded windows, kept memory", "trl packed windows, kept memory"]
DTYPES = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}  # name here: setting there


def main() -> None:
    """Read the flags; compare the variants, or be the process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="out/pretrained", help="checkpoint to start from")
    parser.add_argument("--data", default="chitchat", help="conversations, as finetune.py takes them")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT conversations")
    parser.add_argument("--block-size", type=int, help="longest row, in tokens; otherwise the model's")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # VARIANT RATE SEED FOLDER, here and now
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    if args.one:
        variant, rate, seed, folder = args.one
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
            figures = run(variant, float(rate), int(seed), Path(folder), args, device)
        print(json.dumps(figures))
    else:
        compare(args, device)


# ------------------------------------------------------------------ all runs


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """Every variant at every rate, and at its best rate with the other seeds."""
    if args.init == "out/pretrained" and not Path(args.init).exists():
        raise InputError("there is no out/pretrained: python train.py makes it, --init names another checkpoint")
    args.dtype = str(runtime.pick_dtype(args.dtype, device)).removeprefix("torch.")  # once, for all
    found: dict[tuple[str, float, int], dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary) / "start"
        start.mkdir()
        model, tokenizer = checkpoint.load(args.init)
        tokenizer = tokenizer.for_chat()
        if tokenizer.vocab_size > model.config.vocab_size:
            model.grow(tokenizer.vocab_size)
        checkpoint.write_hugging_face(start, model, tokenizer)
        args.block_size = min(args.block_size or model.config.block_size, model.config.block_size)
        total = len(args.variants) * (len(args.learning_rates) + len(args.seeds) - 1)
        began = time.perf_counter()

        def measure(variant: str, rate: float, seed: int) -> None:
            """One run, with a line on how many are left."""
            done = len(found)
            left = f", about {(time.perf_counter() - began) / done * (total - done) / 60:.0f} minutes left" if done else ""
            print(f"run {done + 1} of {total}{left}: {variant}, rate {rate:g}, seed {seed}", file=sys.stderr)
            figures = found[variant, rate, seed] = in_a_process(variant, rate, seed, start, args)
            print(json.dumps(figures), file=sys.stderr)

        for rate in args.learning_rates:
            for variant in args.variants:
                measure(variant, rate, args.seeds[0])
        best = {}
        for variant in args.variants:
            losses = {rate: found[variant, rate, args.seeds[0]]["val_loss"] for rate in args.learning_rates}
            best[variant] = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
        for seed in args.seeds[1:]:
            for variant in args.variants:
                measure(variant, best[variant], seed)
    show(args, device, found, best)


def in_a_process(variant: str, rate: float, seed: int, start: Path, args: argparse.Namespace) -> dict:
    """The figures of a run, in a process of its own: an allocator cannot be set back."""
    flags = {name: getattr(args, name.replace("-", "_")) for name in
             ("data", "limit", "block-size", "batch-size", "warmup-steps", "dtype", "device")}
    given = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, __file__, *given, "--one", variant, repr(rate), str(seed), str(start)],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{variant}: exit code {done.returncode} (its words are above)")
    return json.loads(done.stdout.splitlines()[-1])


def show(args: argparse.Namespace, device: torch.device, found: dict, best: dict[str, float]) -> None:
    """The table: means over the seeds at each variant's best rate."""
    summary = {}
    for variant, rate in best.items():
        figures = [found[variant, rate, seed] for seed in args.seeds]
        summary[variant] = {"learning_rate": rate} | {key: mean(f[key] for f in figures) for key in figures[0]}
    names = {"steps": ",.0f", "seconds": ",.1f", "seconds_with_set_up": ",.1f", "supervised": ",.0f",
             "supervised_per_second": ",.0f", "val_loss": ".4f", "test_loss": ".4f"}
    heads = ["rate", "steps", "seconds", "with set-up", "supervised", "a second", "val loss", "test loss"]
    width = max(map(len, summary))
    print(" " * width + "".join(f"{head:>13}" for head in heads))
    for variant, figures in summary.items():
        cells = "".join(f"{figures[key]:>13{form}}" for key, form in names.items())
        print(f"{variant:<{width}}{figures['learning_rate']:>13g}{cells}")
    record.save("finetune_epoch", device, {
        "init": args.init, "data": args.data, "limit": args.limit, "block_size": args.block_size, "batch_size": args.batch_size,
        "dtype": args.dtype, "seeds": args.seeds, "learning_rates": args.learning_rates,
        "variants": summary,
        "runs": [{"variant": variant, "learning_rate": rate, "seed": seed} | figures
                 for (variant, rate, seed), figures in found.items()],
    }, packages=("torch", "transformers", "trl", "accelerate", "datasets"))
    record.bars("finetune_epoch", device, f"Fine-tuning, one epoch of {args.data}, {args.batch_size} rows of {args.block_size}",
                "supervised tokens per second", {name: f["supervised_per_second"] for name, f in summary.items()})


# ------------------------------------------------------------------ one run


def run(variant: str, rate: float, seed: int, start: Path, args: argparse.Namespace, device: torch.device) -> dict:
    """Train one variant and score it: → its figures."""
    if variant.startswith("nanochat") or "kept memory" in variant:
        runtime.keep_freed_memory()
    conversations = formats.read(find(args.data))[0][: args.limit]
    train_split, val_split, test_split = splits.split(conversations)
    if not (train_split and val_split and test_split):
        raise InputError(f"--limit {args.limit}: too few conversations to hold some out")
    tokenizer = Tokenizer.load(start)
    take = nanochat if variant.startswith("nanochat") else trl
    model, figures = take(variant, rate, seed, start, train_split, tokenizer, args, device)

    def loss(split: list[Conversation]) -> float:
        rows = to_rows(split, tokenizer, args.block_size)
        total = math.ceil(len(rows) / args.batch_size)
        return evaluate.score(model, tokenizer, rows.batches(args.batch_size), total=total)["loss"]

    speed = {"supervised_per_second": figures["supervised"] / figures["seconds"]}
    return figures | speed | {"val_loss": loss(val_split), "test_loss": loss(test_split)}


def nanochat(variant: str, rate: float, seed: int, start: Path, conversations: list[Conversation], tokenizer: Tokenizer,
             args: argparse.Namespace, device: torch.device) -> tuple[GPT, dict]:
    """What finetune.py does."""
    rows = to_rows(conversations, tokenizer, args.block_size, pack="packed" in variant)
    steps = math.ceil(len(rows) / args.batch_size)
    config = TrainConfig(batch_size=args.batch_size, accumulate=1, max_steps=steps, learning_rate=rate,
                         warmup_steps=args.warmup_steps, seed=seed, eval_every=steps, weight_decay=0.0)
    if "muon" in variant:
        config = replace(config, optimizer="muon", weight_decay=TrainConfig.weight_decay)
    torch.manual_seed(seed)
    model, _ = checkpoint.load(start)
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        progress = training.train(model, tokenizer, rows, config, out=Path(out), settings={}, device=device,
                                  dtype=getattr(torch, args.dtype), evaluate=lambda: {"val_loss": 0.0}, sample=lambda: {})
        whole = time.perf_counter() - began
    taken = training.example_order(0, progress.examples, len(rows), seed)  # the last batch is filled from the next epoch
    each = [sum(sum(window.supervised) for window in row) for row in rows.rows]
    return model, {"steps": progress.step, "seconds": progress.seconds, "seconds_with_set_up": whole,
                   "supervised": sum(each[index] for index in taken)}


def trl(variant: str, rate: float, seed: int, start: Path, conversations: list[Conversation], tokenizer: Tokenizer,
        args: argparse.Namespace, device: torch.device) -> tuple[GPT, dict]:
    """SFTTrainer on the same folder and conversations. → its weights as a GPT of ours."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of all steps: the first, which is cold here and rehearsed in ours, counts as the mean of the others."""

        def on_step_end(self, args, state, *_, **__):
            if state.global_step == 1:
                self.began = runtime.clock(device)

        def on_train_end(self, args, state, *_, **__):
            self.seconds = (runtime.clock(device) - self.began) * state.global_step / max(1, state.global_step - 1)

    windows = "windows" in variant
    if windows:  # of block_size ids, not of one more: a row of trl's is its inputs and its labels in one
        rows = to_rows(conversations, tokenizer, args.block_size - 1, pack=False).rows
        data = [{"input_ids": w.ids, "labels": [i if s else -100 for i, s in zip(w.ids, w.supervised)]} for [w] in rows]
    else:
        data = [{"messages": conversation} for conversation in conversations]
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(start),
            train_dataset=Dataset.from_list(data),
            callbacks=[clock],
            args=SFTConfig(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=args.batch_size, max_length=args.block_size,
                packing="packed" in variant, packing_strategy="bfd_split" if "split" in variant else "bfd",
                assistant_only_loss=not windows,
                learning_rate=rate, lr_scheduler_type="linear", warmup_steps=args.warmup_steps, max_grad_norm=1.0,
                optim="adamw_torch_fused", weight_decay=0.0, adam_beta1=0.9, adam_beta2=TrainConfig.beta2,
                activation_checkpointing=False, gradient_checkpointing=None,  # two names of one thing, on by default
                use_cpu=device.type == "cpu", **{"bf16": False} | DTYPES[args.dtype],
                save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none", seed=seed,
            ),
        )
        began = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - began
    # HF shifts the labels: the first of a row is nobody's target.
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in trainer.get_train_dataloader())
    state = {name: w.detach().float().cpu() for name, w in trainer.model.state_dict().items()}
    source = checkpoint.read_config(start / "config.json")
    model = checkpoint.build(source, checkpoint.to_our_layout(state, conv1d=True, path=start), start).to(device)
    return model, {"steps": trainer.state.global_step, "seconds": clock.seconds, "seconds_with_set_up": whole,
                   "supervised": supervised}


if __name__ == "__main__":
    runtime.run_as_script(main)
