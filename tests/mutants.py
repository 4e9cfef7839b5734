"""Sixty mistakes that people make in a GPT: each is planted in a copy of this repository, and a test must find it.

    python tests/mutants.py                        plant all, one after the other; exit code 1 if one is not found
    python tests/mutants.py --only warm-up tied    those whose name holds one of these words
    python tests/mutants.py --list                 the table of docs/mutants.md

A mutant is one replacement in one file, and the one test that must fail then. That test must pass before: a
test that fails by itself would find everything. A mutant that nothing finds is a hole in the tests.

Source: DeMillo, Lipton and Sayward 1978 (program mutation).
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds for one test, which takes a few
HEAVY = ("torch._dynamo", "transformers.models.gpt2", "peft", "hypothesis.strategies")  # imported once, for all tests


PAGE = """# Sixty mistakes

Each is one that people make in a GPT. Many raise no error: the model still learns, and is worse. So each has a test that
fails when it is made. `python tests/mutants.py` makes them one after the other in a copy of this repository and runs that
test; a mistake that it does not find gives exit code 1. `--only warm-up` takes those with this word in their name. Make
one by hand, train for a minute, and look at what it does. ⏎ is a line break. This page is `python tests/mutants.py --list`.
"""


class Mutant(NamedTuple):
    """A mistake, where it is made, and what finds it."""

    name: str
    file: str
    old: str  # stands in the file once
    new: str
    test: str  # a pytest node below tests/


MUTANTS = {
    "The network": [
        Mutant("the scores are not divided by √D", "nanochat/model.py",
               "(q / math.sqrt(q.size(-1))) @ k.mT", "q @ k.mT",
               "test_model.py::test_fused_attention_equals_the_formula"),
        Mutant("the causal mask is aligned to the first key instead of the last", "nanochat/model.py",
               ".tril(S - T)", ".tril()",
               "test_model.py::test_fused_attention_equals_the_formula"),
        Mutant("GELU is the exact one instead of GPT-2's", "nanochat/model.py",
               'lambda x: F.gelu(x, approximate="tanh")', "F.gelu",
               "test_checkpoint.py::test_logits_equal_hugging_face"),
        Mutant("the head reads what has not passed the last layer norm", "nanochat/model.py",
               "return self.ln_f(self.blocks(", "return (self.blocks(",
               "test_checkpoint.py::test_logits_equal_hugging_face"),
        Mutant("the last layer norm has the library's epsilon", "nanochat/model.py",
               "self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)", "self.ln_f = nn.LayerNorm(config.n_embd)",
               "test_model.py::test_every_layer_norm_has_the_epsilon_of_the_settings"),
        Mutant("a projection adds no bias", "nanochat/model.py",
               'self.c_proj(rearrange(y, "B H T D -> B T (H D)"))', 'F.linear(rearrange(y, "B H T D -> B T (H D)"), self.c_proj.weight)',
               "test_checkpoint.py::test_logits_equal_hugging_face"),
        Mutant("what the head teaches does not reach the table that it is tied to", "nanochat/model.py",
               "return F.linear(x, self.wte.weight)", "return F.linear(x, self.wte.weight.detach())",
               "test_model.py::test_head_and_embedding_are_one_tensor_everywhere"),
        Mutant("residual projections start as if each block added once, not twice", "nanochat/model.py",
               "std=0.02 / math.sqrt(2 * config.n_layer)", "std=0.02 / math.sqrt(config.n_layer)",
               "test_model.py::test_initial_weights_have_the_stds_of_the_paper"),
        Mutant("the MLP's branch has no dropout", "nanochat/model.py",
               "x = self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x)))", "return self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x)))",
               "test_model.py::test_dropout_zeroes_its_share_of_the_embedding_and_of_each_branch"),
    ],
    "The loss": [
        Mutant("the loss of a micro-batch is already a mean", "nanochat/model.py",
               "return self.nll(tokens, targets, segments).sum()", "return self.nll(tokens, targets, segments).mean()",
               "test_model.py::test_loss_is_the_sum_over_supervised_targets"),
        Mutant("token 0 is taken for padding", "nanochat/model.py",
               "(targets.flatten() != IGNORED)", "(targets.flatten() > 0)",
               "test_model.py::test_token_0_is_learned_like_any_other"),
        Mutant("each micro-batch is divided by its own tokens: a mean of means", "nanochat/training.py",
               "/ max(supervised, 1)", "/ max(int((batch.targets != IGNORED).sum()), 1) / len(batches)",
               "test_training.py::test_accumulating_equals_one_batch_of_8_with_uneven_masks"),
        Mutant("a step with nothing to learn divides by zero", "nanochat/training.py",
               "/ max(supervised, 1)", "/ supervised",
               "test_training.py::test_batches_without_supervised_tokens_change_nothing"),
        Mutant("the logged loss is that of the last micro-step", "nanochat/training.py",
               "step_loss += loss.detach()", "step_loss = loss.detach()",
               "test_training.py::test_accumulating_equals_one_batch_of_8_with_uneven_masks"),
        Mutant("the score is a mean over batches of unequal size", "nanochat/evaluate.py",
               "torch.tensor([nll.sum(), targets.numel(),", "torch.tensor([nll.mean(), 1,",
               "test_generate.py::test_the_score_is_the_mean_over_all_targets_however_they_are_batched"),
        Mutant("bits per byte are divided by characters", "nanochat/evaluate.py",
               "[tokenizer.byte_lengths(), tokenizer.character_counts()]", "[tokenizer.character_counts(), tokenizer.character_counts()]",
               "test_generate.py::test_where_every_token_is_equally_likely_the_score_is_known_by_hand"),
    ],
    "The loss mask": [
        Mutant("targets are the inputs themselves", "nanochat/corpus.py",
               "rows[:, 1:].contiguous())", "rows[:, :-1].contiguous())",
               "test_corpus.py::test_a_batch_is_crops_with_targets_one_token_later"),
        Mutant("targets are shifted by one too few", "nanochat/rows.py",
               "torch.where(supervised, ids, IGNORED)[1:]", "torch.where(supervised, ids, IGNORED)[:-1]",
               "test_dialogue.py::test_a_model_that_knows_the_next_token_has_loss_zero"),
        Mutant("targets are shifted, their mask is not", "nanochat/rows.py",
               "torch.where(supervised, ids, IGNORED)[1:]", "torch.where(supervised[:-1], ids[1:], IGNORED)",
               "test_dialogue.py::test_targets_are_the_next_ids_of_replies_and_padding_has_none"),
        Mutant("padding is learned", "nanochat/rows.py",
               "targets = torch.full((len(rows), T), IGNORED)", "targets = torch.zeros(len(rows), T, dtype=torch.int64)",
               "test_dialogue.py::test_targets_are_the_next_ids_of_replies_and_padding_has_none"),
        Mutant("the end token is not learned", "nanochat/dialogue.py",
               '[message["role"] == "assistant"] * len(said)', '[message["role"] == "assistant"] * (len(said) - 1) + [False]',
               "test_dialogue.py::test_a_dialogue_has_exactly_these_ids_and_labels"),
        Mutant("the role token is learned", "nanochat/dialogue.py",
               '[False] + [message["role"] == "assistant"] * len(said)', '[message["role"] == "assistant"] * (1 + len(said))',
               "test_dialogue.py::test_a_dialogue_has_exactly_these_ids_and_labels"),
        Mutant("what the user says is learned too", "nanochat/dialogue.py",
               '[message["role"] == "assistant"] * len(said)', '[message["role"] != "system"] * len(said)',
               "test_dialogue.py::test_what_the_user_says_changes_no_label"),
        Mutant("a reply that is the context of a later one is learned twice", "nanochat/dialogue.py",
               "supervised if i >= done else [False] * len(turn)", "supervised",
               "test_dialogue.py::test_each_reply_is_supervised_once_with_all_context_that_fits"),
        Mutant("a reply that is cut gets an end that it never had", "nanochat/dialogue.py",
               "Window(ids[: block_size + 1], mask[: block_size + 1])", "Window(ids[:block_size] + ids[-1:], mask[:block_size] + mask[-1:])",
               "test_dialogue.py::test_a_reply_longer_than_the_block_is_cut_without_an_invented_end"),
    ],
    "The step and its schedule": [
        Mutant("warm-up begins at a rate of zero", "nanochat/training.py",
               "return (step + 1) / (warmup_steps + 1)", "return step / warmup_steps",
               "test_training.py::test_the_schedule_counts_optimizer_steps"),
        Mutant("the last step has a rate of zero", "nanochat/training.py",
               "(max_steps - step) / max(1, max_steps - warmup_steps)", "(max_steps - 1 - step) / max(1, max_steps - 1 - warmup_steps)",
               "test_training.py::test_the_schedule_counts_optimizer_steps"),
        Mutant("only the first group of parameters follows the schedule", "nanochat/training.py",
               'group["lr"] = learning_rate', 'optimizer.param_groups[0]["lr"] = learning_rate',
               "test_training.py::test_every_group_steps_at_the_rate_that_is_logged"),
        Mutant("a skipped step advances the schedule", "nanochat/training.py",
               "continue  # the schedule does not advance", "progress.step += 1\n                continue",
               "test_training.py::test_a_skipped_step_does_not_advance_the_schedule"),
        Mutant("the gradient of the step before stays", "nanochat/training.py",
               "optimizer.zero_grad(set_to_none=True)", "pass",
               "test_training.py::test_a_step_has_only_its_own_gradient_and_consumes_all_its_examples"),
        Mutant("the gradient is clipped with its scale", "nanochat/training.py",
               "scaler.unscale_(optimizer)", "pass",
               "test_training.py::test_the_clipped_step_does_not_depend_on_the_scale"),
        Mutant("the gradient is clipped before it is unscaled", "nanochat/training.py",
               "scaler.unscale_(optimizer)", "torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip), scaler.unscale_(optimizer)",
               "test_training.py::test_a_step_is_scale_backward_unscale_clip_step_update"),
        Mutant("the gradient is clipped to 1, whatever --clip says", "nanochat/training.py",
               "clip_grad_norm_(model.parameters(), config.clip)", "clip_grad_norm_(model.parameters(), 1.0)",
               "test_training.py::test_a_gradient_is_scaled_down_as_a_whole_to_the_norm_of_clip"),
        Mutant("AdamW's two memories change places", "nanochat/training.py",
               "betas=(0.9, config.beta2)", "betas=(config.beta2, 0.9)",
               "test_formulas.py::test_adamw_divides_a_mean_of_gradients_by_the_root_of_a_mean_of_squares"),
        Mutant("biases, layer norms and tables decay too", "nanochat/training.py",
               '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}',
               "test_training.py::test_every_parameter_is_in_one_group_and_only_matrices_of_the_blocks_decay"),
    ],
    "Sampling and the cache": [
        Mutant("logits are multiplied by the temperature", "nanochat/generate.py",
               "(logits - largest) / max(config.temperature, 1e-30)", "(logits - largest) * max(config.temperature, 1e-30)",
               "test_generate.py::test_20_000_draws_have_the_distribution_of_hugging_faces_filters"),
        Mutant("top-p drops the token that crosses the threshold", "nanochat/generate.py",
               "ordered.cumsum(dim=-1) - ordered >= p", "ordered.cumsum(dim=-1) >= p",
               "test_generate.py::test_top_p_keeps_the_token_that_crosses_the_threshold"),
        Mutant("at temperature 0 all of several likeliest tokens are certain", "nanochat/generate.py",
               "torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)", "(logits == largest).float()",
               "test_generate.py::test_at_temperature_zero_one_of_several_likeliest_has_all_the_probability"),
        Mutant("the repetition penalty makes negative logits likelier", "nanochat/generate.py",
               "torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)", "row[ids] / penalty",
               "test_generate.py::test_a_repeated_token_becomes_less_likely_whatever_its_sign"),
        Mutant("is_causal is set for one new token too, which then sees the first key only", "nanochat/model.py",
               "causal = mask is None and q.size(-2) > 1", "causal = mask is None",
               "test_generate.py::test_cached_decoding_equals_full_forward"),
        Mutant("keys are written one place too early", "nanochat/model.py",
               "self.keys[self.row, :, self.positions]", "self.keys[self.row, :, self.positions - 1]",
               "test_generate.py::test_cached_decoding_equals_full_forward"),
        Mutant("the shorter rows of a batch see what lies beyond their end", "nanochat/model.py",
               "if not (alike and (T == 1 or from_the_start)):", "if not (T == 1 or from_the_start):",
               "test_generate.py::test_prompts_of_different_length_in_a_batch_give_the_logits_of_each_alone"),
        Mutant("the cache does not forget what a text no longer has", "nanochat/generate.py",
               "self.cache.lengths[r] = shared_prefix(self.ids[r], text)", "self.cache.lengths[r] = min(len(self.ids[r]), len(text))",
               "test_generate.py::test_a_reader_gives_the_logits_of_any_texts_and_reads_no_id_twice"),
        Mutant("rows of the cache change places, their lengths do not", "nanochat/generate.py",
               "self.cache.lengths[[a, b]] = self.cache.lengths[[b, a]]", "pass",
               "test_generate.py::test_rows_that_change_places_keep_what_they_have_read"),
    ],
    "Packing": [
        Mutant("texts in one row see each other", "nanochat/model.py",
               "segment_positions(segments), visible(segments)", "segment_positions(segments), None",
               "test_model.py::test_segments_are_separate_texts"),
        Mutant("texts in one row see their own future", "nanochat/model.py",
               "(causal & (segments[:, :, None] == segments[:, None, :]))", "(segments[:, :, None] == segments[:, None, :])",
               "test_model.py::test_segments_are_separate_texts"),
        Mutant("positions do not restart with each text", "nanochat/model.py",
               "segment_positions(segments), visible(segments)", "torch.arange(T, device=tokens.device), visible(segments)",
               "test_model.py::test_segments_are_separate_texts"),
        Mutant("all texts of a row have one number", "nanochat/rows.py",
               "segments[b, start:end] = number", "segments[b, start:end] = 1",
               "test_dialogue.py::test_dialogues_packed_into_one_row_do_not_see_each_other"),
        Mutant("a text never fills a row to its last place", "nanochat/rows.py",
               "for n in range(size, block_size) if", "for n in range(size + 1, block_size) if",
               "test_dialogue.py::test_packing_wastes_little"),
        Mutant("int8 has one scale for the whole matrix", "nanochat/packed.py",
               "torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True))", "weight.abs().amax().expand(len(weight), 1)",
               "test_packed.py::test_int8_rounds_each_weight_to_a_step_of_its_rows_largest"),
        Mutant("int8 cuts off where it should round", "nanochat/packed.py",
               "(rows / steps).round().to(torch.int8)", "(rows / steps).to(torch.int8)",
               "test_packed.py::test_int8_rounds_each_weight_to_a_step_of_its_rows_largest"),
        Mutant("rows that are looked up in an int8 table come without their scale", "nanochat/packed.py",
               "rows * F.embedding(tokens, self.scale)", "rows",
               "test_packed.py::test_int8_errs_by_a_few_hundredths_of_the_logits_spread"),
    ],
    "Resuming": [
        Mutant("the random state is not restored", "nanochat/resume.py",
               'set_rng_state(state["rng"][rank], model.wpe.weight.device)', "pass",
               "test_training.py::test_resume_reproduces_the_uninterrupted_run"),
        Mutant("the data begins anew", "nanochat/resume.py",
               'Progress(**state["progress"])', 'Progress(**state["progress"] | {"examples": 0})',
               "test_training.py::test_resume_reproduces_the_uninterrupted_run"),
        Mutant("the best loss is forgotten", "nanochat/resume.py",
               'Progress(**state["progress"])', 'Progress(**state["progress"] | {"best_loss": math.inf})',
               "test_resume.py::test_patience_and_best_count_on_across_a_kill"),
        Mutant("AdamW counts its steps from zero again", "nanochat/resume.py",
               "{key: value.to(p.device) for key, value in saved.items()}",
               "{key: value.to(p.device) if value.dim() else value.zero_() for key, value in saved.items()}",
               "test_training.py::test_resume_reproduces_the_uninterrupted_run"),
        Mutant("the optimizer's state goes by place instead of by name", "nanochat/resume.py",
               'state["optimizer"].get(name_of[p], {})', 'list(state["optimizer"].values())[len(part.state)]',
               "test_training.py::test_resume_reproduces_the_uninterrupted_run"),
        Mutant("the scale of fp16 begins anew", "nanochat/resume.py",
               'scaler.load_state_dict(state["scaler"])', "pass",
               "test_resume.py::test_the_scale_of_fp16_goes_on_from_what_it_had_come_to"),
        Mutant("the minutes become another number of steps", "nanochat/training.py",
               "progress, record = restore(resume, model, optimizer, scaler)",
               "progress, record = restore(resume, model, optimizer, scaler)\n        progress.max_steps = steps_in(config, seconds, len(data))",
               "test_resume.py::test_max_minutes_is_measured_once_and_resumes_with_the_same_steps"),
        Mutant("the run goes on from its oldest step", "nanochat/runs.py",
               "for folder in reversed(saved_steps(out)):", "for folder in saved_steps(out):",
               "test_checkpoint.py::test_a_run_copied_with_folders_for_links_loads_resumes_and_keeps_its_best"),
    ],
}


def copy_of_the_repository(folder: Path) -> None:
    """The package, the scripts and the tests are copied into `folder`, all else is linked."""
    for path in ROOT.iterdir():
        if path.name in ("nanochat", "tests"):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix in (".py", ".toml"):
            shutil.copy2(path, folder)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)


def run_tests(tests: list[str], mutant: Mutant | None = None) -> tuple[int | None, str]:
    """Run pytest on a copy, with a mutant in it: → (exit code, what pytest said). 0: all pass, 1: a test fails, None: not done in time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_repository(folder)
        if mutant:
            path = folder / mutant.file
            path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=in_a_child, args=(folder, tests))
        process.start()
        process.join(LIMIT if mutant else None)
        if process.is_alive():
            process.kill()
            process.join()
            return None, f"not done after {LIMIT} s"
        return process.exitcode, (folder / "said").read_text(encoding="utf-8", errors="replace")


def in_a_child(folder: Path, tests: list[str]) -> None:
    """pytest in a process of its own, where what the parent has imported is there already and the package is the copy's."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = pytest.main(["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
    sys.stdout.flush()
    os._exit(code)


def main() -> int:
    """Plant mutants; → 1 if one of them is not found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="those whose name holds one of these words")
    parser.add_argument("--list", action="store_true", help="print the table of all mutants and end")
    args = parser.parse_args()
    if args.list:
        print(table(), end="")
        return 0
    chosen = [mutant for mutants in MUTANTS.values() for mutant in mutants
              if not args.only or any(word in mutant.name for word in args.only)]
    if not chosen:
        parser.error(f"no mutant's name holds {' or '.join(args.only)}; --list shows them all")
    for mutant in chosen:
        if (count := (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)) != 1:
            parser.error(f"{mutant.file} has {mutant.old!r} {count} times instead of once: {mutant.name}")

    os.environ["OMP_NUM_THREADS"] = "1"
    for module in HEAVY:
        importlib.import_module(module)
    started = time.perf_counter()
    tests = list(dict.fromkeys(mutant.test for mutant in chosen))
    code, said = run_tests(tests)
    if code != 0:
        print(f"not all of the {len(tests)} tests pass on the unchanged copy:\n{said}")
        return 1
    print(f"{len(tests)} tests pass on the unchanged copy: {time.perf_counter() - started:.0f} s", flush=True)

    started, missed = time.perf_counter(), 0
    for count, mutant in enumerate(chosen, 1):
        code, said = run_tests([mutant.test], mutant)
        missed += code != 1
        gone = time.perf_counter() - started
        print(f"{count:3}/{len(chosen)}  {gone / count * (len(chosen) - count):4.0f} s left  "
              f"{'found ' if code == 1 else 'MISSED'}  {mutant.name}", flush=True)
        if code != 1:
            print(f"    {mutant.file}: {mutant.test} ended with {code}, not 1\n{said}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found in {gone:.0f} s")
    return int(missed > 0)


def table() -> str:
    """The mutants as docs/mutants.md."""

    def code(text: str) -> str:
        return "`" + " ⏎ ".join(line.strip() for line in text.split("\n")).replace("|", "\\|") + "`"

    lines = [PAGE]
    for area, mutants in MUTANTS.items():
        lines += [f"## {area}\n", "| mistake | file | instead of | it says | found by |", "|---|---|---|---|---|"]
        for m in mutants:
            file, test = m.test.split("::")
            lines.append(f"| {m.name} | [{m.file.removeprefix('nanochat/')}](../{m.file}) | {code(m.old)} | {code(m.new)} | [{test}](../tests/{file}) |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
