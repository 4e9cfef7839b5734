"""recipes/speculative.py: at temperature 0 the very text of the target alone, else its very distribution, whatever the draft."""

import copy
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from nanochat import InputError, checkpoint, generate
from nanochat.generate import SampleConfig
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import speculative  # noqa: E402
from speculative import speculate  # noqa: E402

BLOCK = 24  # of make_model


def alone(model: GPT, prompt: list[int], config: SampleConfig, stop_ids=()) -> list[int]:
    return generate.generate_ids(model, [prompt], config, stop_ids)[0][0]


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def near(model: GPT, noise: float) -> GPT:
    """A draft that mostly agrees with the model."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for p in draft.parameters():
            p += noise * torch.randn_like(p)
    return draft


# ------------------------------------------------------------------ temperature 0


@pytest.mark.parametrize("draft_tokens, penalty", [(1, 1.0), pytest.param(4, 1.0, marks=pytest.mark.slow), (30, 1.0), (4, 1.3)])
def test_greedy_text_is_the_targets_own_with_any_draft_also_past_the_block(make_model, draft_tokens, penalty):
    """Tokens 30 at BLOCK 24: the newest half is kept, of the draft's shorter block too."""
    target = make_model()
    drafts = [near(target, 0.02), make_model(), make_model(n_layer=1, block_size=7), make_model(n_layer=1, block_size=40)]
    counts = Counter()
    for draft in drafts:
        for prompt in prompts([1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]):
            config = SampleConfig(max_new_tokens=30, temperature=0, repetition_penalty=penalty)
            assert list(speculate(target, draft, prompt, config, (), draft_tokens, counts)) == alone(target, prompt, config)
    assert 0 < counts["accepted"] < counts["proposed"]


def test_a_draft_equal_to_the_target_is_always_accepted(make_model):
    target = make_model(block_size=64)
    for temperature in (0, 1):
        counts = Counter()
        config = SampleConfig(max_new_tokens=40, temperature=temperature, top_p=1)
        assert len(list(speculate(target, target, [1, 2, 3], config, (), 4, counts))) == 40
        assert counts == Counter(proposed=32, accepted=32, passes=8)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 11])
def test_it_gives_as_many_tokens_as_asked(make_model, count):
    target = make_model()
    config = SampleConfig(max_new_tokens=count, temperature=0)
    assert list(speculate(target, target, [5], config)) == alone(target, [5], config) and len(alone(target, [5], config)) == count


def test_it_ends_with_the_first_stop_id_wherever_that_falls_among_the_guesses(make_model):
    target = make_model(block_size=64)
    for seed in range(6):
        prompt, = prompts([4], seed)
        config = SampleConfig(max_new_tokens=20, temperature=0)
        text = alone(target, prompt, config)
        for stop in text[:9]:
            ended = list(speculate(target, near(target, 0.02), prompt, config, {stop}))
            assert ended == text[: text.index(stop)] == alone(target, prompt, config, {stop})


def test_each_pass_reads_only_what_is_new(make_model, monkeypatch):
    target, read = make_model(block_size=64), []
    features = generate.Reader.features
    monkeypatch.setattr(generate.Reader, "features", lambda self, row, ids: read.append((self.model, len(ids[0]))) or features(self, row, ids))
    draft = near(target, 0)
    list(speculate(target, draft, [1, 2, 3], SampleConfig(max_new_tokens=15, temperature=0), (), 4))
    assert [n for model, n in read if model is target] == [3 + 4, 1 + 4, 1 + 4]
    assert [n for model, n in read if model is draft] == [3, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


# ------------------------------------------------------------------ sampling

V, RUNS = 5, 6000
SAMPLINGS = {
    "plain": SampleConfig(temperature=1, top_p=1),
    "cut": SampleConfig(temperature=0.7, top_k=4, top_p=0.95, min_p=0.05),
    "penalised": SampleConfig(temperature=1.3, top_p=1, repetition_penalty=1.6),
}


@pytest.fixture
def pair(make_model, monkeypatch) -> tuple[GPT, GPT]:
    """A target and a draft of five ids that often agree; what they say of a text is computed once."""
    target = make_model(vocab_size=V, n_layer=1, noise=0.3, block_size=16)
    draft = near(target, 0.2)
    known: dict[tuple, torch.Tensor] = {}
    forward = speculative.Reader.features

    def remembered(reader, row, ids):
        start = int(reader.cache.lengths[row])
        whole = (reader.model, *reader.history[:start], *ids[0])
        reader.history = whole[1:]
        if (whole, start) not in known:
            reader.cache.lengths[row] = 0
            known[whole, start] = forward(reader, row, [list(whole[1:])])[:, start:]
        reader.cache.lengths[row] = len(whole) - 1
        return known[whole, start]

    monkeypatch.setattr(speculative.Reader, "history", (), raising=False)
    monkeypatch.setattr(speculative.Reader, "features", remembered)
    return target, draft


@torch.no_grad()
def exact(model: GPT, prompt: list[int], config: SampleConfig, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of so many ids, by the chain rule."""
    found = {}
    for ids in product(range(V), repeat=length):
        p = 1.0
        for i, token in enumerate(ids):
            row = prompt + list(ids[:i])
            p *= generate.probabilities(model(torch.tensor([row]))[:, -1], config, [row])[0, token].item()
        found[ids] = p
    return found


def p_value(pair: tuple[GPT, GPT], config: SampleConfig, length: int, counts: Counter) -> float:
    """Of a chi-squared test of RUNS continuations against their exact probabilities; rare ones share a cell."""
    target, draft = pair
    prompt = [0, 3]
    expected = exact(target, prompt, config, length)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    seen = Counter(tuple(speculate(target, draft, prompt, SampleConfig(**vars(config) | {"max_new_tokens": length, "seed": seed}), (), 2, counts))
                   for seed in range(RUNS))
    assert all(expected[ids] > 0 for ids in seen), "an id that cannot follow"
    frequent = [ids for ids, p in expected.items() if p * RUNS >= 5]
    observed = [seen[ids] for ids in frequent]
    wanted = [RUNS * expected[ids] for ids in frequent]
    rest = RUNS - sum(observed), RUNS - sum(wanted)
    if rest[1] > 1e-2:
        observed, wanted = [*observed, rest[0]], [*wanted, rest[1]]
    scale = sum(observed) / sum(wanted)
    return chisquare(observed, [w * scale for w in wanted]).pvalue


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("length", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sampled_continuations_have_the_targets_distribution(pair, sampling, length):
    counts = Counter()
    assert p_value(pair, SAMPLINGS[sampling], length, counts) > 0.01
    assert 0.2 * counts["proposed"] < counts["accepted"] < 0.95 * counts["proposed"]  # the two do differ


def always_accept(p, q, proposed, generator):
    return [*proposed, int(torch.multinomial(p[-1], 1, generator=generator))]


def redraw_from_p(p, q, proposed, generator):
    """As `verified`, but for the residual."""
    for i, token in enumerate(proposed):
        if torch.rand(1, generator=generator) * q[i, token] >= p[i, token]:
            return [*proposed[:i], int(torch.multinomial(p[i], 1, generator=generator))]
    return always_accept(p, q, proposed, generator)


@pytest.mark.parametrize("wrong", [always_accept, redraw_from_p])
def test_the_test_of_the_distribution_finds_wrong_rules(pair, monkeypatch, wrong):
    monkeypatch.setattr(speculative, "verified", wrong)
    assert p_value(pair, SAMPLINGS["plain"], 2, Counter()) < 1e-6


def test_the_rule_survives_rounding():
    """p and q equal but for the last bit: nothing is left of max(0, p − q), and p itself is drawn from."""
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        new = speculative.verified(p, p[:1] * 2, [1], generator)  # accepted in half of the cases
        assert len(new) in (1, 2) and set(new) <= {0, 1}


# ------------------------------------------------------------------ the script


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recipes/speculative.py", *flags])
    with pytest.raises(SystemExit) as end:
        speculative.runtime.run_as_script(lambda: speculative.main(speculative.tyro.cli(speculative.Settings, description=speculative.__doc__)))
    return end.value.code


def write(folder: Path, tokenizer: Tokenizer, n_layer: int) -> str:
    folder.mkdir()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=n_layer, n_head=2, n_embd=32))
    checkpoint.write(folder, model, tokenizer)
    return str(folder)


def test_the_script_prints_text_acceptance_and_speed(tokenizer, tmp_path, monkeypatch, capsys):
    flags = ("--target", write(tmp_path / "target", tokenizer, 2), "--draft", write(tmp_path / "draft", tokenizer, 1), "--prompt", "A river",
             "--pairs", "1", "--max-new-tokens", "9", "--temperature", "0")
    speculative.main(speculative.tyro.cli(speculative.Settings, args=flags))
    out = capsys.readouterr().out
    assert "guesses accepted" in out and "tokens/s, alone" in out and "times as fast" in out


def test_wrong_input_of_the_script_is_one_line(tokenizer, tmp_path, monkeypatch, capsys):
    target = write(tmp_path / "target", tokenizer, 2)
    other = write(tmp_path / "other", Tokenizer.train(["What other letters have to say, and to whom. " * 20], 384), 1)
    for flags in (("--draft", other), ("--draft", target, "--draft-tokens", "0"), ("--draft", target, "--pairs", "0")):
        assert run(monkeypatch, "--target", target, "--prompt", "A", *flags) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="384 ids, the target 97"):
        list(speculate(GPT(GPTConfig(97, 24, 1, 1, 4)), checkpoint.load(target)[0], [1], SampleConfig()))
