"""The exercises keep their word: a page's snippets print what it says; a task fails untouched and on a typical mistake, and its answer passes."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in ("exercises.md", "exercises.zh-CN.md")]
QUESTION = re.compile(r"### (\d+)\. .*?```python\n(.*?)```\n\n<details>.*?```text\n(.*?)```.*?</details>", re.DOTALL)
TASKS = sorted((ROOT / "exercises").glob("[0-9]*.py"))


def opened(path: Path) -> ModuleType:
    """A new copy of a file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


answers = opened(ROOT / "exercises" / "answers.py")


def try_task(path: Path, name: str | None = None, function=None) -> None:
    """Run a task's test, with `function` in the place of the one of that name."""
    module = opened(path)
    if function:
        assert hasattr(module, name)
        setattr(module, name, function)
    [test] = [value for name, value in vars(module).items() if name.startswith("test_")]
    test()


# ------------------------------------------------------------------ predict, run, explain


def questions(page: Path) -> list[tuple[int, str, str]]:
    """(number, snippet, what it prints) of each question of a page."""
    return [(int(number), code, printed) for number, code, printed in QUESTION.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("number, code, printed", questions(PAGES[0]), ids=lambda value: value if isinstance(value, int) else "")
def test_a_snippet_of_at_most_ten_lines_prints_what_the_page_says(number, code, printed):
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    torch.manual_seed(number)  # a snippet that needs a seed sets its own
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, f"question {number}", "exec"), {"__name__": "__main__"})
    assert out.getvalue() == printed


def test_both_languages_ask_the_same_ten_questions():
    ours, theirs = map(questions, PAGES)
    assert ours == theirs and [number for number, _, _ in ours] == list(range(1, 11))


def test_both_languages_link_the_same_files_and_each_is_there():
    ours, theirs = ([link for link in re.findall(r"\]\((.*?)\)", page.read_text(encoding="utf-8")) if ".md" not in link] for page in PAGES)
    assert ours == theirs
    assert {f"../exercises/{path.name}" for path in TASKS} < set(ours)
    for page in PAGES:
        for link in re.findall(r"\]\((.*?)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


# ------------------------------------------------------------------ tasks


def typical_mistakes() -> dict:
    """The function of each task → a wrong answer that many give."""

    def head_counted_twice(vocab_size, block_size, n_layer, n_embd):
        return answers.count_parameters(vocab_size, block_size, n_layer, n_embd) + vocab_size * n_embd

    def divided_by_c_minus_one(x, gain, bias, epsilon=1e-5):
        return gain * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + epsilon).sqrt() + bias

    def aligned_at_the_start(T, S):
        return torch.ones(T, S, dtype=torch.bool).tril()

    def one_token_in_two_merges(tokens):
        pair = answers.merge_step(tokens)[0]
        return pair, [b"".join(pair) if (a, b) == pair else a for a, b in zip(tokens, [*tokens[1:], b""])]

    def first_step_at_zero(step, max_steps, warmup_steps):
        return step / warmup_steps if step < warmup_steps else answers.learning_rate(step, max_steps, warmup_steps)

    def k_of_all_rows_together(logits, k):
        return logits.masked_fill(logits < logits.flatten().topk(min(k, logits.numel())).values[-1], -torch.inf)

    def role_token_learned_too(start, turns):
        ids = [start] + [i for _, turn in turns for i in turn]
        learned = [False] + [role == "assistant" for role, turn in turns for _ in turn]
        return ids[:-1], [i if yes else -100 for i, yes in zip(ids[1:], learned[1:])]

    def bits_per_token(model, tokenizer, text):
        perplexity, _ = answers.perplexity_and_bits_per_byte(model, tokenizer, text)
        return perplexity, torch.tensor(perplexity).log2().item()

    def scaled_by_alpha_alone(W, A, B, alpha, sign=1):
        return W + sign * alpha * B @ A

    def everything_read_again(model, prompt, count):
        ids = list(prompt)
        for _ in range(count):
            ids.append(model.head(model.features(torch.tensor([ids]))[0, -1]).argmax().item())
        return ids[len(prompt) :]

    return dict(count_parameters=head_counted_twice, layer_norm=divided_by_c_minus_one, causal_mask=aligned_at_the_start,
                merge_step=one_token_in_two_merges, learning_rate=first_step_at_zero, top_k=k_of_all_rows_together,
                inputs_and_targets=role_token_learned_too, perplexity_and_bits_per_byte=bits_per_token,
                merged=scaled_by_alpha_alone, greedy=everything_read_again)


MISTAKES = typical_mistakes()


@pytest.mark.parametrize("path, name", list(zip(TASKS, MISTAKES)), ids=[path.stem for path in TASKS])
def test_a_task_fails_untouched_and_on_a_typical_mistake_and_passes_with_its_answer(path, name):
    with pytest.raises(NotImplementedError) as hint:
        try_task(path)
    assert len(str(hint.value)) > 20
    with pytest.raises(AssertionError) as said:
        try_task(path, name, MISTAKES[name])
    assert len(str(said.value)) > 20, "a wrong answer gets a reason"
    try_task(path, name, getattr(answers, name))


def test_pytest_runs_the_ten_tasks_when_asked_and_not_otherwise(request):
    assert request.config.getini("testpaths") == ["tests"]
    reports = []
    listener = SimpleNamespace(pytest_runtest_logreport=lambda report: reports.append(report) if report.when == "call" else None)
    assert pytest.main([str(ROOT / "exercises"), "-p", "no:faulthandler"], plugins=[listener]) == pytest.ExitCode.TESTS_FAILED
    assert [report.nodeid.split("::")[0] for report in reports] == [path.name for path in TASKS]
    for report in reports:
        assert report.failed and re.search("NotImplementedError: .{20,}", report.longreprtext)
